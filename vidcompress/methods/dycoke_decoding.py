"""Second half of DyCoke: once decoding begins, the KV cache keeps the video tokens that the answer looks at.

After the first token was decoded, the caches from layer L on give up all but those that this token attended to most in
the layer before. They are gone, and their memory with them: what the code chooses anew when attention turns elsewhere
is here chosen once.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from vidcompress import ops
from vidcompress.method import DEPTH, Method, floor, setting
from vidcompress.tokens import CachedTokens, Grid, Site


@dataclass(kw_only=True)
class DyCokeDecoding(Method):
    needs = frozenset({"last_query_attention.previous"})

    retention_ratio: float = setting(
        0.3, "1 - P: fraction, of the tokens in the LLM, that stays in the caches from layer L on", above=0, high=1
    )
    layer: int = setting(3, "L: the first layer whose cache is pruned, counted from 0", low=1)

    @property
    def inner_ratio(self) -> float:
        """1 - P, where `retention_ratio` may mean something else."""
        return self.retention_ratio

    def sites(self, depth: int = DEPTH) -> list[Site]:
        return [Site.decoding(self.layer)]

    def count(self, site: Site, grid: Grid, entered: int, before: int) -> int:
        return min(before, max(1, floor(self.inner_ratio * entered)))

    def evict(self, tokens: CachedTokens, site: Site) -> Tensor:
        attention = tokens.signal("last_query_attention.previous")  # of layer L - 1, the mean over its heads
        count = self.count(site, tokens.grid, tokens.entered, len(tokens))
        return ops.top_tokens(attention[None], count)[0].nonzero().squeeze(1)
