"""Density peaks of a video's frames by Triton: one product of matrices, then two kernels, and no wait for the host.

A program takes a few tokens of a frame, with their rows of the matrix of distances. The first kernel measures anew, in
fp64 and from the tokens themselves, what is too near for the expanded square, and estimates densities; the second looks
for the nearest denser token. Decisions are those of naive.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vidcompress.ops.launch import INTERPRETED, launch, rows_contiguous

CLOSE = 5e-2
"""Squared distances below so much of the tokens' squared lengths are measured anew: the others keep four digits."""

CHUNK_FRAMES = 32
"""Frames whose distance matrices exist at once."""


def frame_scores(tokens: Tensor, candidates: Tensor, neighbours: int, ties: str, noise: Tensor | None) -> Tensor:
    """`density_peaks` of frames [B, n, C] that are short enough for their distance matrices."""
    out = torch.empty(candidates.shape, dtype=torch.float32, device=tokens.device)
    tokens, candidates = rows_contiguous(tokens), candidates.contiguous().view(torch.uint8)
    for b in range(0, len(tokens), CHUNK_FRAMES):
        part = slice(b, b + CHUNK_FRAMES)
        extra = None if noise is None else noise[part].float().contiguous()
        _score(tokens[part], candidates[part], min(neighbours, tokens.shape[1]), ties, extra, out[part])
    return out


def _score(tokens: Tensor, candidates: Tensor, neighbours: int, ties: str, noise: Tensor | None, out: Tensor) -> None:
    frames, n, channels = tokens.shape
    x = tokens.float()
    # Distances do not change when the frame's mean is taken off, and the sum then cancels far less.
    x = x - x.mean(1, keepdim=True)
    distance = torch.bmm(x, x.transpose(1, 2))  # products as yet
    square = distance.diagonal(dim1=1, dim2=2).contiguous()  # [B, n]
    density, largest = torch.empty_like(square), torch.empty_like(square)
    block = max(16, triton.next_power_of_2(n))
    tile = {"R": min(block, 64) if INTERPRETED else max(1, min(4, 1024 // block)), "N": block, "num_warps": 4}
    grid = (frames, triton.cdiv(n, tile["R"]))
    launch(
        _densities, grid, tokens, distance, square, candidates, square if noise is None else noise, density, largest,
        n, channels, neighbours, tokens.stride(0), tokens.stride(1),
        CLOSE=CLOSE, NOISY=noise is not None, BN=32, BK=16, **tile,
    )  # fmt: skip
    launch(
        _peaks, grid, distance, candidates, density, largest, out, n,
        STRICT=ties == "strict", LOWEST=torch.finfo(torch.float32).min, **tile,
    )  # fmt: skip


@triton.jit
def _tile(base, i, n, k, channels, stride):
    """fp64 channels k of the tokens i; 0 outside."""
    inside = (i < n)[:, None] & (k < channels)[None, :]
    return tl.load(base + i.to(tl.int64)[:, None] * stride + k[None, :], mask=inside, other=0.0).to(tl.float64)


@triton.jit
def _densities(
    tokens, distance, square, candidates, noise, density, largest, n, channels, neighbours, frame_stride, stride,
    CLOSE: tl.constexpr, NOISY: tl.constexpr,
    R: tl.constexpr, N: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Rows of `distance` [B, n, n], products at first, become squared distances over C; and their tokens' log densities
    and largest distances."""
    frame = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * R + tl.arange(0, R)
    own = tl.load(square + frame * n + i, mask=i < n, other=0.0)
    base = tokens + frame * frame_stride
    to = distance + (frame * n + i)[:, None] * n
    for first in range(0, n, BN):
        j = first + tl.arange(0, BN)
        seen = (i < n)[:, None] & (j < n)[None, :]
        other = tl.load(square + frame * n + j, mask=j < n, other=0.0)
        product = tl.load(to + j[None, :], mask=seen, other=0.0)
        tl.debug_barrier()  # every thread has its products before any writes distances over them
        part = tl.maximum(own[:, None] + other[None, :] - 2 * product, 0.0)
        same = i[:, None] == j[None, :]
        close = seen & (part < CLOSE * tl.maximum(own[:, None], other[None, :])) & (same == 0)
        if tl.max(tl.max(close.to(tl.int32), 1), 0) > 0:
            exact = tl.full((R, BN), 0.0, tl.float64)
            for start in range(0, channels, BK):
                k = start + tl.arange(0, BK)
                a, b = _tile(base, i, n, k, channels, stride), _tile(base, j, n, k, channels, stride)
                step = a[:, None, :] - b[None, :, :]
                exact += tl.sum(step * step, 2)
            part = tl.where(close, exact.to(tl.float32), part)
        part = tl.where(same, 0.0, part) / channels
        tl.store(to + j[None, :], part, mask=seen)
    tl.debug_barrier()  # every thread reads what others wrote
    j = tl.arange(0, N)
    mine = tl.load(candidates + frame * n + i, mask=i < n, other=0) != 0
    theirs = tl.load(candidates + frame * n + j, mask=j < n, other=0) != 0
    pair = mine[:, None] & theirs[None, :]
    row = tl.load(to + j[None, :], mask=pair, other=0.0)
    tl.store(largest + frame * n + i, tl.max(row, 1), mask=i < n)
    row = tl.where(pair, row, float("inf"))
    total = tl.full((R,), 0.0, tl.float32)
    found = tl.full((R,), 0.0, tl.float32)
    for _ in range(0, neighbours):
        least = tl.min(row, 1)
        there = least < float("inf")
        total += tl.where(there, least, 0.0)
        found += tl.where(there, 1.0, 0.0)
        place = tl.min(tl.where(row == least[:, None], j[None, :], N), 1)
        row = tl.where(j[None, :] == place[:, None], float("inf"), row)
    value = -total / tl.maximum(found, 1.0)
    if NOISY:
        value = tl.log(tl.exp(value) + tl.load(noise + frame * n + i, mask=i < n, other=1.0))
    tl.store(density + frame * n + i, value, mask=i < n)


@triton.jit
def _peaks(
    distance, candidates, density, largest, out, n,
    STRICT: tl.constexpr, LOWEST: tl.constexpr, R: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Log scores: density, times the distance to the nearest denser token."""
    frame = tl.program_id(0).to(tl.int64)
    i, j = tl.program_id(1) * R + tl.arange(0, R), tl.arange(0, N)
    own = tl.load(density + frame * n + i, mask=i < n, other=0.0)
    other = tl.load(density + frame * n + j, mask=j < n, other=0.0)
    theirs = tl.load(candidates + frame * n + j, mask=j < n, other=0) != 0
    denser = other[None, :] > own[:, None]
    if not STRICT:
        denser = denser | ((other[None, :] == own[:, None]) & (j[None, :] < i[:, None]))
    seen = denser & theirs[None, :] & (i < n)[:, None]
    delta = tl.min(tl.load(distance + (frame * n + i)[:, None] * n + j[None, :], mask=seen, other=float("inf")), 1)
    most = tl.max(tl.load(largest + frame * n + j, mask=j < n, other=0.0), 0)
    delta = tl.where(delta == float("inf"), most, delta)
    score = tl.where(delta > 0, own + 0.5 * tl.log(tl.where(delta > 0, delta, 1.0)), LOWEST)
    score = tl.maximum(score, LOWEST)
    mine = tl.load(candidates + frame * n + i, mask=i < n, other=0) != 0
    tl.store(out + frame * n + i, tl.where(mine, score, -float("inf")), mask=i < n)
