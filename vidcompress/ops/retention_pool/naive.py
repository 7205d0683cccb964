from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

ROUNDING = 1e-12
"""A cosine this close below the threshold has reached it: fp64 leaves 1 - 1e-16 of the 1 of two copies."""


def retention_pool(tokens: Tensor, order: Tensor, threshold: float, size: int) -> Tensor:
    unit = normalize(tokens.double(), dim=-1, eps=1e-30)
    pool: list[int] = []
    for candidate in order.tolist():
        if len(pool) == size:
            break
        if not pool or (unit[pool] @ unit[candidate]).max() < threshold - ROUNDING:
            pool.append(candidate)
    return torch.tensor(pool, dtype=torch.long, device=tokens.device)
