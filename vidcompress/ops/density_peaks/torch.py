from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

CHUNK_FRAMES = 32
"""Frames whose distance matrices exist at once."""


def density_peaks(
    tokens: Tensor,
    candidates: Tensor,
    neighbours: int,
    ties: Literal["index", "strict"] = "index",
    noise: Tensor | None = None,
) -> Tensor:
    chunks = [
        _scores(
            tokens[b : b + CHUNK_FRAMES].float(),
            candidates[b : b + CHUNK_FRAMES],
            neighbours,
            ties,
            None if noise is None else noise[b : b + CHUNK_FRAMES],
        )
        for b in range(0, tokens.shape[0], CHUNK_FRAMES)
    ]
    return torch.cat(chunks) if chunks else tokens.new_empty(candidates.shape, dtype=torch.float32)


def _scores(x: Tensor, candidates: Tensor, neighbours: int, ties: str, noise: Tensor | None) -> Tensor:
    _, n, channels = x.shape
    # Distances do not change when the frame's mean is taken off, and |x|^2 + |y|^2 - 2xy then cancels far less.
    x = x - x.mean(1, keepdim=True)
    square = torch.linalg.vecdot(x, x)  # [B, n]
    distance = torch.baddbmm(square[:, None, :].expand(-1, n, -1), x, x.transpose(1, 2), alpha=-2)
    distance += square[:, :, None]
    # Bitwise equal tokens are at distance 0, which the formula above misses by a rounding error.
    noise_floor = 4e-7 * torch.maximum(square[:, :, None], square[:, None, :])
    distance.masked_fill_(distance < noise_floor, 0).mul_(1 / channels)  # [B, n, n] squared
    distance.diagonal(dim1=1, dim2=2).zero_()
    pair = candidates[:, :, None] & candidates[:, None, :]
    largest = distance.masked_fill(~pair, 0).flatten(1).amax(1)[:, None]  # [B, 1]
    distance.masked_fill_(~pair, torch.inf)

    k = min(neighbours, n)
    near = distance.topk(k, dim=-1, largest=False).values
    found = near.isfinite()
    log_density = -near.masked_fill(~found, 0).sum(-1) / found.sum(-1).clamp_min(1)  # [B, n]
    if noise is not None:
        log_density = (log_density.exp() + noise).log()
    not_denser = log_density[:, None, :] <= log_density[:, :, None]  # [B, i, j]
    if ties == "index":
        earlier = torch.ones(n, n, dtype=torch.bool, device=x.device).tril(-1)
        not_denser &= ~((log_density[:, None, :] == log_density[:, :, None]) & earlier)
    delta = distance.masked_fill_(not_denser, torch.inf).amin(-1)
    delta = torch.where(delta.isinf(), largest, delta)
    return (log_density + 0.5 * delta.log()).masked_fill(~candidates, -torch.inf)
