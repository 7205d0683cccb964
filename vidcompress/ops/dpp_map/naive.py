from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize

TIED = 1e-9
"""Gains whose logarithms are at most this far apart are equal."""


def dpp_map(
    tokens: Tensor,
    log_relevance: Tensor,
    sizes: Sequence[int],
    counts: Sequence[int],
    rank_eps: float = 1e-6,
    kernel: Literal["dot", "cosine"] = "dot",
) -> Tensor:
    picked, start = [], 0
    for size, count in zip(sizes, counts, strict=True):
        h, own = tokens[start : start + size].double(), log_relevance[start : start + size].double()
        features = normalize(h, dim=-1, eps=1e-30) if kernel == "cosine" else h / h.shape[1] ** 0.5
        order = _greedy(features @ features.T, own, count, rank_eps)
        order += [i for i in own.argsort(descending=True, stable=True).tolist() if i not in order]
        picked += [start + i for i in order[:count]]
        start += size
    return torch.tensor(picked, dtype=torch.long, device=tokens.device)


def _greedy(kernel: Tensor, log_relevance: Tensor, count: int, rank_eps: float) -> list[int]:
    """Picks until `count`, or until all are exhausted: the Cholesky form of Chen et al., 2018."""
    left = kernel.diagonal().clone()  # [n] what the picked ones do not span of a token, relevance aside
    limit = rank_eps * left
    factor = kernel.new_zeros(len(kernel), count)  # Cholesky factor, a column a pick
    order: list[int] = []
    while len(order) < count:
        left[left <= limit] = 0
        gain = 2 * log_relevance + left.log()  # [n] what a token would add, as a logarithm
        best = gain.max()
        if best == -torch.inf:
            break
        pick = int((gain >= best - TIED).nonzero()[0])
        column = (kernel[pick] - factor @ factor[pick]) / left[pick].sqrt()
        factor[:, len(order)] = column
        left -= column**2
        left[pick] = 0
        order.append(pick)
    return order
