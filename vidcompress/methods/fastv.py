"""FastV: an image is worth half its tokens after layer 2; keep those that the last token of the prompt attends to."""

from __future__ import annotations

from dataclasses import dataclass

from vidcompress import ops
from vidcompress.method import DEPTH, Method, setting
from vidcompress.tokens import Reduction, Site, VideoTokens


@dataclass(kw_only=True)
class FastV(Method):
    needs = frozenset({"last_query_attention.previous"})

    retention_ratio: float = setting(0.5, "1 - R: fraction of the video tokens kept from layer K on", above=0, high=1)
    layer: int = setting(2, "K: the first layer that runs over the kept tokens, counted from 0", low=1)

    def sites(self, depth: int = DEPTH) -> list[Site]:
        return [Site.decoder(self.layer)]

    def reduce(self, tokens: VideoTokens, site: Site) -> Reduction:
        attention = tokens.signal("last_query_attention.previous")  # of layer K - 1, the mean over its heads
        return Reduction.pruning(ops.top_tokens(attention[None], self.wanted(tokens, site))[0])
