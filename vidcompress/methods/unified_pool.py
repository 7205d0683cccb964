"""Outer half of the Unified spatiotemporal compression: one pool of salient tokens, like none other in it, per video.

What the pool turns away is recycled: clustered by density peaks, every cluster handed on as its mean. The peaks are
global and exact, which takes all N x N distances, a tile at a time: some fourteen times FastVID's time on a CPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from vidcompress import ops
from vidcompress.method import Method, setting
from vidcompress.tokens import Reduction, Site, VideoTokens


@dataclass(kw_only=True)
class UnifiedPool(Method):
    needs = frozenset({"saliency.received"})
    budget_rule = "frame_round"
    costly = "exact density peaks of all that the pool turns away"

    tau: float = setting(0.7, "a token joins the pool if its cosine to all in it is below this (eq. 2)", low=0)
    cluster_share: float = setting(0.3, "share of the budget that is cluster means", low=0, high=1)
    neighbours: int = setting(7, "k of the density estimate (eq. 3), the token itself included", low=1)
    density_ties: Literal["index", "strict"] = setting("index", "which of two equally dense tokens counts as denser")

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
        left = len(x) - len(pool)
        clusters = ops.density_clusters(
            x, budget - len(pool), self.neighbours, self.density_ties, recycled, members=left
        )
        keep, notes = torch.cat([pool, clusters.centre]).sort().values, {"pool": pool, "centres": clusters.centre}
        return Reduction.merging(keep, len(x), [(clusters.joined, clusters.member, 1 / clusters.size)], notes)
