"""StreamingLLM (Xiao et al., ICLR 2024, arXiv:2309.17453) at one decoder layer: attention sinks and a recent window.

The first tokens of the video, to which attention flows whatever they show, and its last ones stay. The code evicts from
the KV cache of a whole stream, again and again while it grows; here it happens once, to the video's tokens in a prompt.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from vidcompress.method import DEPTH, Method, setting
from vidcompress.tokens import Grid, Reduction, Site, VideoTokens


@dataclass(kw_only=True)
class StreamingLLM(Method):
    retention_ratio: float = setting(0.5, "fraction of the video tokens kept, sinks and window", above=0, high=1)
    positions: Literal["keep", "renumber"] = setting("renumber", "positions are those within the cache")
    sinks: int = setting(4, "start_size: tokens kept at the beginning", low=0)
    recent: int | None = setting(None, "recent_size: tokens kept at the end; null: by retention_ratio", low=1)
    layer: int = setting(2, "the first layer that runs over the kept tokens, counted from 0", low=0)

    def sites(self, depth: int = DEPTH) -> list[Site]:
        return [Site.decoder(self.layer)]

    def count(self, site: Site, grid: Grid, entered: int, before: int) -> int:
        if self.recent is None:
            return super().count(site, grid, entered, before)
        return min(before, self.sinks + self.recent)

    def reduce(self, tokens: VideoTokens, site: Site) -> Reduction:
        n, count = len(tokens), self.wanted(tokens, site)
        sinks = min(self.sinks, count - 1)  # the last token always stays
        index = torch.arange(n, device=tokens.features.device)
        return Reduction.pruning((index < sinks) | (index >= n - count + sinks))
