"""Inner half of PruneVid: at decoder layer K keep what any text token, in any head, attends to most.

The same share is kept of each of the groups that the outer half formed: a scene's static tokens, a frame's others. On
its own it takes the frames for groups. `official` rounds every group's share down, as the code does, so that a small
group can vanish.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vidcompress import ops
from vidcompress.method import DEPTH, Method, floor, setting
from vidcompress.tokens import Grid, Reduction, Site, VideoTokens


@dataclass(kw_only=True)
class PruneVidInner(Method):
    needs = frozenset({"text_attention.heads"})

    retention_ratio: float = setting(0.4, "alpha: fraction of the tokens at layer K that is kept", above=0, high=1)
    layer: int | None = setting(None, "K, counted from 0; null: 10 of 32 layers, in proportion", low=0)
    official: bool = setting(False, "round the share of every group down, as the official code does")

    @property
    def exact(self) -> bool:
        return not self.official

    @property
    def inner_ratio(self) -> float:
        """alpha, where `retention_ratio` may mean something else."""
        return self.retention_ratio

    def sites(self, depth: int = DEPTH) -> list[Site]:
        return [Site.decoder(round(10 / 32 * depth) if self.layer is None else self.layer)]

    def count(self, site: Site, grid: Grid, entered: int, before: int) -> int:
        return min(before, max(1, floor(self.inner_ratio * before)))

    def reduce(self, tokens: VideoTokens, site: Site) -> Reduction:
        n, (_, h, w) = len(tokens), tokens.grid
        score = tokens.signal("text_attention.heads").amax((0, 1))  # [M]
        index = torch.arange(n, device=score.device)
        place = index if tokens.index is None else tokens.index
        group = tokens.notes["group"][place] if "group" in tokens.notes else place // (h * w)
        # Each group keeps its share.
        sizes = group.bincount()
        if self.official:
            shares = [int(self.inner_ratio * size) for size in sizes.tolist()]
        else:
            shares = ops.fair_shares(self.wanted(tokens, site), sizes.tolist())
        if not any(shares):  # the code would keep nothing
            return Reduction.pruning(ops.top_tokens(score[None], 1)[0])
        # The best of each: tokens sorted by group, then by score.
        order = score.argsort(descending=True, stable=True)
        order = order[group[order].argsort(stable=True)]
        own = group[order]
        rank = index - (sizes.cumsum(0) - sizes)[own]
        kept = torch.zeros(n, dtype=torch.bool, device=score.device)
        kept[order] = rank < torch.tensor(shares, device=score.device)[own]
        return Reduction.pruning(kept, {"shares": shares})
