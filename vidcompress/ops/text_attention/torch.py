from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

CHUNK_ELEMENTS = 16 << 20
"""Attention weights that exist at once: all heads of one key head, some queries, all keys."""

TILE_ELEMENTS = 1 << 20
"""Elements of the keys that exist in fp32 at once."""


def text_attention(
    query: Tensor,
    key: Tensor,
    scale: float,
    rows: Tensor,
    columns: Tensor,
    reduce: Literal["max", "none"] = "max",
) -> Tensor:
    (heads, queries, _), (groups, n, _) = query.shape, key.shape
    shared = heads // groups
    step = max(1, CHUNK_ELEMENTS // (shared * n))
    # Queries first, so that the heads of a query lie together: their mean is then one product.
    by_group = query.unflatten(0, (groups, shared)).transpose(1, 2)  # [G, Q, H / G, D]
    greatest = torch.zeros(n, dtype=torch.float32, device=query.device)
    out = greatest.new_empty(heads if reduce == "none" else 0, queries, len(columns))
    place = torch.arange(n, device=query.device)
    for r in range(0, queries, step):
        unseen = place > rows[r : r + step, None, None]  # [q, 1, N]
        total = greatest.new_zeros(len(unseen), 1, n)
        for g in range(groups):
            weights = _exponentials(by_group[g, r : r + step].float() * scale, key[g], unseen)
            share = weights.sum(-1).reciprocal_()  # [q, H / G]
            if reduce == "none":
                chosen = weights[..., columns].mul_(share[..., None])
                out[g * shared : (g + 1) * shared, r : r + step] = chosen.transpose(0, 1)
            else:
                total.baddbmm_(share[:, None], weights)
        greatest = torch.maximum(greatest, total.amax((0, 1)))
    return out if reduce == "none" else greatest[columns] / heads


def _exponentials(query: Tensor, key: Tensor, unseen: Tensor) -> Tensor:
    """[q, h, N] softmax without its division, of [q, h, D] to [N, D]."""
    n, channels = key.shape
    weights = query.new_empty(*query.shape[:2], n)
    flat = query.flatten(0, 1)
    step = max(1, TILE_ELEMENTS // channels)
    for c in range(0, n, step):
        torch.mm(flat, key[c : c + step].float().T, out=weights.flatten(0, 1)[:, c : c + step])
    weights.masked_fill_(unseen, -torch.inf)
    return weights.sub_(weights.amax(-1, keepdim=True)).exp_()
