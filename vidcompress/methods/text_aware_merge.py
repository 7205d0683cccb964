"""Inner half of the Unified spatiotemporal compression: at decoder layer K, merge tokens the text does not ask for.

On its own, on a whole video, it takes five to six times FastVID's time: half of the tokens are compared with the other
half, and all of them with every word, in fp64 where it matters. Behind an outer half that is next to nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

from vidcompress import ops
from vidcompress.method import DEPTH, Method, setting
from vidcompress.tokens import Grid, Reduction, Site, VideoTokens


@dataclass(kw_only=True)
class TextAwareMerge(Method):
    needs = frozenset({"text_attention", "text_hidden"})
    costly = "alone, half of the video is compared with the other half, and all of it with every word"

    retention_ratio: float = setting(0.5, "R: fraction of the tokens at layer K that is kept", above=0, high=1)
    text_weight: float = setting(0.5, "lambda: weight of the likeness to text, against attention", low=0, high=1)
    layer: int | None = setting(None, "K, counted from 0; null: 18 of 28 layers, in proportion", low=0)

    @property
    def inner_ratio(self) -> float:
        """R, where `retention_ratio` may mean something else."""
        return self.retention_ratio

    def sites(self, depth: int = DEPTH) -> list[Site]:
        return [Site.decoder(round(18 / 28 * depth) if self.layer is None else self.layer)]

    def count(self, site: Site, grid: Grid, entered: int, before: int) -> int:
        return max(1, round(self.inner_ratio * before))

    def reduce(self, tokens: VideoTokens, site: Site) -> Reduction:
        x = tokens.features
        # 1. Relevance: the most attention, and the highest cosine, of any text token (eq. 5-9).
        attention = ops.minmax(tokens.signal("text_attention"))
        likeness = ops.minmax(ops.max_cosine(x, tokens.signal("text_hidden")))
        score = (1 - self.text_weight) * attention + self.text_weight * likeness
        kept = ops.top_tokens(score[None], self.wanted(tokens, site))[0]
        # 2. Each other token joins the kept token that it is most like; a group becomes its mean (eq. 10).
        keep, gone = kept.nonzero().squeeze(1), (~kept).nonzero().squeeze(1)
        joined = keep[ops.nearest(x[gone], x[keep], "cosine")]
        weight = 1 / (joined.bincount(minlength=len(x)) + 1).float()
        grown = joined.unique()
        return Reduction.merging(keep, len(x), [(grown, grown, weight[grown]), (joined, gone, weight[joined])])
