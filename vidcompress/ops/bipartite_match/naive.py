from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

DIGITS = 12
"""Decimals to which cosines are compared."""


def bipartite_match(tokens: Tensor, count: int, protected: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    place = torch.arange(protected, len(tokens), device=tokens.device)
    free, taker = place[place % 2 == 0], place[place % 2 == 1]
    if not len(taker):
        return free[:0], free[:0], free
    unit = normalize(tokens.double(), dim=-1, eps=1e-300)
    # Taker by taker, without a matrix product: equal takers are then equally like to the last bit.
    likeness = torch.stack([(unit[free] * unit[other]).sum(-1) for other in taker], 1).round(decimals=DIGITS)
    value, chosen = likeness.max(1)
    order = value.argsort(descending=True, stable=True)
    gone, left = order[:count], order[count:]
    return free[gone], taker[chosen[gone]], free[left]
