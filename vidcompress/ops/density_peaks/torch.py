from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from vidcompress.ops.density_peaks.tiled import tiled_scores

TILED_ABOVE = 2048
"""Tokens a row beyond which its distance matrix does not exist, only tiles of it."""

CHUNK_FRAMES = {"cpu": 4, "cuda": 32}
"""Frames whose distance matrices exist at once: on a CPU what stays in its caches, and is not mapped anew each time."""

CLOSE = 1e-3
"""Where two tokens are nearer than this, relative to their squared norms, the fast formula keeps too few digits for the
order of densities, and the frame is measured again in fp64."""


def density_peaks(
    tokens: Tensor,
    candidates: Tensor,
    neighbours: int,
    ties: Literal["index", "strict"] = "index",
    noise: Tensor | None = None,
) -> Tensor:
    if tokens.shape[1] > TILED_ABOVE:
        extra = [None] * len(tokens) if noise is None else noise
        rows = [tiled_scores(x, own, neighbours, ties, e) for x, own, e in zip(tokens, candidates, extra)]
        return torch.stack(rows) if rows else tokens.new_empty(candidates.shape, dtype=torch.float32)
    step = CHUNK_FRAMES.get(tokens.device.type, 32)
    chunks = [
        _scores(
            tokens[b : b + step].float(),
            candidates[b : b + step],
            neighbours,
            ties,
            None if noise is None else noise[b : b + step],
        )
        for b in range(0, tokens.shape[0], step)
    ]
    return torch.cat(chunks) if chunks else tokens.new_empty(candidates.shape, dtype=torch.float32)


def _scores(x: Tensor, candidates: Tensor, neighbours: int, ties: str, noise: Tensor | None) -> Tensor:
    n = x.shape[1]
    distance = _squared_distances(x).mul_(1 / x.shape[2])  # [B, n, n]
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
    score = (log_density + 0.5 * delta.log()).clamp_min(torch.finfo(x.dtype).min)
    return score.masked_fill(~candidates, -torch.inf)


def _squared_distances(x: Tensor) -> Tensor:
    """[B, n, n] squared Euclidean distances; bitwise equal tokens are exactly 0 apart."""
    distance, square = _expanded(x)
    close = distance < CLOSE * square
    close.diagonal(dim1=1, dim2=2).fill_(False)
    for frame in close.flatten(1).any(1).nonzero().squeeze(1).tolist():
        exact, square = _expanded(x[frame, None].double())
        distance[frame] = exact.masked_fill_(exact < 1e-13 * square, 0)[0]  # 1e-13: the rounding of a zero in fp64
    distance.diagonal(dim1=1, dim2=2).zero_()
    return distance.clamp_min_(0)


def _expanded(x: Tensor) -> tuple[Tensor, Tensor]:
    """[B, n, n] |x|^2 + |y|^2 - 2xy, and the larger of |x|^2 and |y|^2."""
    # Distances do not change when the frame's mean is taken off, and the sum then cancels far less.
    x = x - x.mean(1, keepdim=True)
    distance = torch.bmm(x, x.transpose(1, 2))
    square = distance.diagonal(dim1=1, dim2=2).clone()  # [B, n]
    distance.mul_(-2).add_(square[:, None, :]).add_(square[:, :, None])
    return distance, torch.maximum(square[:, :, None], square[:, None, :])
