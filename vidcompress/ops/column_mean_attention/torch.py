from __future__ import annotations

import torch
from torch import Tensor

CHUNK_ELEMENTS = {"cpu": 1 << 20, "cuda": 64 << 20}
"""Attention weights that exist at once: a tile that stays in a CPU's cache, or that fills a GPU."""


def column_mean_attention(query: Tensor, key: Tensor, scale: float) -> Tensor:
    batch, heads, n, _ = query.shape
    out = torch.zeros(batch, n, dtype=torch.float32, device=query.device)
    limit = CHUNK_ELEMENTS.get(query.device.type, 16 << 20)
    rows = max(1, min(n, limit // n))
    group = max(1, limit // (rows * n))  # (frame, head) pairs a tile
    q, k = query.flatten(0, 1), key.flatten(0, 1)  # [B * H, N, d]
    frame = torch.arange(batch, device=query.device).repeat_interleave(heads)
    for b in range(0, batch * heads, group):
        keys = k[b : b + group].float().transpose(1, 2)
        column = torch.zeros(keys.shape[0], n, dtype=torch.float32, device=query.device)
        for r in range(0, n, rows):
            weights = torch.bmm(q[b : b + group, r : r + rows].float() * scale, keys)
            weights -= weights.amax(-1, keepdim=True)
            weights.exp_()
            # (1 / Z)^T E: the division and the sum over queries in one product.
            column += torch.bmm(weights.sum(-1).reciprocal_()[:, None], weights)[:, 0]
        out.index_add_(0, frame[b : b + group], column)
    return out / (heads * n)
