from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from vidcompress.ops.bipartite_match.naive import DIGITS
from vidcompress.ops.nearest import nearest

NOISE = 2.0**-22
"""Rounding of a product of two unit vectors in fp32, over the square root of their length: more than is usual."""


def bipartite_match(tokens: Tensor, count: int, protected: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    first, second = protected + protected % 2, protected + 1 - protected % 2
    x, y = tokens[first::2].float(), tokens[second::2].float()
    free = torch.arange(first, len(tokens), 2, device=tokens.device)
    if not len(x) or not len(y):
        return free[:0], free[:0], free
    noise = NOISE * tokens.shape[1] ** 0.5
    scale, other = (1 / part.norm(dim=1).clamp_min(1e-30) for part in (x, y))
    likeness = (x @ y.T).mul_(scale[:, None]).mul_(other)
    best, chosen = likeness.max(1)
    # Whom a token joins, where several are too close to call.
    close = likeness >= best[:, None] - 2 * noise
    unsure = (close.sum(1) > 1).nonzero()[:, 0]
    if len(unsure):
        able = close[unsure].any(0).nonzero()[:, 0]
        chosen[unsure] = able[nearest(x[unsure], y[able], "cosine")]
    value = best.double()
    # Which pairs are more alike, where it is too close to call.
    order = value.argsort(descending=True)
    near = value[order].diff().abs() <= 2 * noise
    again = order[torch.cat([near, near.new_zeros(1)]) | torch.cat([near.new_zeros(1), near])]
    a, b = (normalize(part.double(), dim=-1, eps=1e-300) for part in (x[again], y[chosen[again]]))
    value[again] = (a * b).sum(-1).round(decimals=DIGITS)
    order = value.argsort(descending=True, stable=True)
    gone, left = order[:count], order[count:]
    return free[gone], second + 2 * chosen[gone], free[left]
