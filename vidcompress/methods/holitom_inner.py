"""Inner half of HoliTom: at decoder layer K keep what the prompt's last token attends to, and merge the others into it.

Each of the others, in their order, is averaged with the kept token that it is most like: the later one weighs more. On
its own it compares half of all tokens with the other half, in two to three times the time of FastVID; behind the outer
half that is next to nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vidcompress import ops
from vidcompress.method import DEPTH, Method, setting
from vidcompress.tokens import Grid, Reduction, Site, VideoTokens


@dataclass(kw_only=True)
class HoliTomInner(Method):
    needs = frozenset({"last_query_attention.previous"})
    costly = "alone, half of the video is compared with the other half"

    retention_ratio: float = setting(0.5, "1 - r: fraction of the tokens at layer K that is kept", above=0, high=1)
    layer: int | None = setting(None, "K, counted from 0; null: 18 of 28 layers, in proportion", low=1)

    @property
    def inner_ratio(self) -> float:
        """1 - r, where `retention_ratio` may mean something else."""
        return self.retention_ratio

    def sites(self, depth: int = DEPTH) -> list[Site]:
        return [Site.decoder(max(1, round(18 / 28 * depth)) if self.layer is None else self.layer)]

    def count(self, site: Site, grid: Grid, entered: int, before: int) -> int:
        return max(1, round(self.inner_ratio * before))

    def reduce(self, tokens: VideoTokens, site: Site) -> Reduction:
        x = tokens.features
        attention = tokens.signal("last_query_attention.previous")  # of layer K - 1, the mean over its heads
        kept = ops.top_tokens(attention[None], self.wanted(tokens, site))[0]
        # A token that is averaged with m others, one after the other, has weight 2^-m; the i-th last of them 2^-i.
        keep, gone = kept.nonzero().squeeze(1), (~kept).nonzero().squeeze(1)
        joined, order = keep[ops.nearest(x[gone], x[keep], "cosine")].sort(stable=True)
        size = joined.bincount(minlength=len(x))
        from_last = size.cumsum(0)[joined] - torch.arange(len(joined), device=x.device)
        grown = joined.unique()
        own, other = (torch.ldexp(torch.ones_like(i, dtype=torch.float32), -i) for i in (size[grown], from_last))
        return Reduction.merging(keep, len(x), [(grown, grown, own), (joined, gone[order], other)])
