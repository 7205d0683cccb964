from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

TIED = 1e-9
"""Distances that are at most this far apart are equal, and tokens at most this far apart are copies."""


def farthest_points(tokens: Tensor, count: int, period: int = 1) -> Tensor:
    unit = normalize(tokens.double(), dim=-1, eps=1e-300)
    distance = 1 - unit @ unit.T
    reach = distance.clone().fill_diagonal_(torch.inf).amin(0) if len(tokens) else distance.new_empty(0)
    free = torch.ones_like(reach, dtype=torch.bool)
    picks: list[int] = []
    while len(picks) < count:
        best = (reach > TIED) & free
        best = best & (reach >= reach[best].max() - TIED) if best.any() else free
        pick = int(best.nonzero()[0])
        reach = reach.minimum(distance[pick]) if picks else distance[pick].clone()
        free[pick] = False
        picks.append(pick)
    return torch.tensor(picks, dtype=torch.long, device=tokens.device)
