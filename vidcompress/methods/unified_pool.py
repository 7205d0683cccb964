"""Outer half of the Unified spatiotemporal compression: one pool of salient tokens, like none other in it, per video.

What the pool turns away is recycled: clustered by density peaks, every cluster handed on as its mean. The peaks are
global and exact, which takes all N x N distances, a tile at a time: eighteen times FastVID's time on a CPU. In a
video of more than `exact_up_to` tokens windows of frames are clustered (docs/decisions.md, D30); the pool stays one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from vidcompress import ops
from vidcompress.method import Method, setting
from vidcompress.tokens import Grid, Reduction, Site, VideoTokens


@dataclass(kw_only=True)
class UnifiedPool(Method):
    needs = frozenset({"saliency.received"})
    budget_rule = "frame_round"
    costly = "exact density peaks of all that the pool turns away"

    tau: float = setting(0.7, "a token joins the pool if its cosine to all in it is below this (eq. 2)", low=0)
    cluster_share: float = setting(0.3, "share of the budget that is cluster means", low=0, high=1)
    neighbours: int = setting(7, "k of the density estimate (eq. 3), the token itself included", low=1)
    density_ties: Literal["index", "strict"] = setting("index", "which of two equally dense tokens counts as denser")
    exact_up_to: int | None = setting(25_088, "a video of more tokens is clustered in windows; null: none is", low=1)
    window_frames: int = setting(32, "most frames of such a window, if there are clusters for all", low=1)

    def reduce(self, tokens: VideoTokens, site: Site) -> Reduction:
        x, budget = tokens.features, self.budget(tokens.grid)
        # 1. Visit all tokens by descending attention; the pool takes those that are like none in it (eq. 1-2).
        visits = tokens.signal("saliency.received").argsort(descending=True, stable=True)
        pool = ops.retention_pool(x, visits, self.tau, round(round((1 - self.cluster_share) * budget, 9)))
        # 2. Everything else is recycled; a pool that could not fill leaves its part of the budget to the clusters.
        recycled = torch.ones(len(x), dtype=torch.bool, device=x.device)
        recycled[pool] = False
        if len(pool) == budget:
            return Reduction(pool.sort().values, len(x), notes={"pool": pool, "centres": pool[:0]})
        # 3. Each recycled token joins the nearest density peak, a peak its own; a cluster becomes its mean (eq. 3-4).
        left, p = budget - len(pool), tokens.grid[1] * tokens.grid[2]
        windows = self._windows(tokens.grid, left)
        members = [len(x) - len(pool)]
        if len(windows) > 1:
            members = torch.stack([recycled[a * p : b * p].sum() for a, b in windows]).tolist()
        centres, parts = [], []
        for (a, b), some, count in zip(windows, members, ops.fair_shares(left, members), strict=True):
            if not count:  # all of the window is in the pool
                continue
            own, ties = slice(a * p, b * p), self.density_ties
            found = ops.density_clusters(x[own], count, self.neighbours, ties, recycled[own], members=some)
            member, joined, centre = (i + a * p if a else i for i in (found.member, found.joined, found.centre))
            parts.append((joined, member, 1 / found.size))
            centres.append(centre)
        centre = centres[0] if len(centres) == 1 else torch.cat(centres)
        keep = torch.cat([pool, centre]).sort().values
        return Reduction.merging(keep, len(x), parts, {"pool": pool, "centres": centre})

    def _windows(self, grid: Grid, clusters: int) -> list[tuple[int, int]]:
        """Frames whose recycled tokens are clustered together; no more windows than there are clusters."""
        t, h, w = grid
        if self.exact_up_to is None or t * h * w <= self.exact_up_to:
            return [(0, t)]
        count = min(-(-t // self.window_frames), clusters)
        return [(i * t // count, (i + 1) * t // count) for i in range(count)]
