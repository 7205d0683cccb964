"""Temporal fingerprints by Triton: one program a position, all frames of a segment in registers, for up to 32 frames.

The first pass over the channels takes the norms and how far each frame is from the one before, the second forms the
products of the steps between unit tokens with all unit tokens, for the reason that torch.py has: cosines near 1
cancel. Steps are fp32, also of half-precision tokens, so their products are full fp32 ("ieee"): a position that hardly
changes is told from one that changes less by 1e-7. Longer segments would not fit into registers; torch.py has those.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vidcompress.ops.cosine_fingerprint import torch as fast
from vidcompress.ops.launch import launch, rows_contiguous

LONGEST = 32
"""Frames that fit into a program."""


def cosine_fingerprint(tokens: Tensor) -> Tensor:
    length, positions, channels = tokens.shape
    if not 1 < length <= LONGEST:
        return fast.cosine_fingerprint(tokens)
    tokens = rows_contiguous(tokens if tokens.dtype != torch.float64 else tokens.float())
    out = torch.empty(positions, dtype=torch.float32, device=tokens.device)
    launch(
        _fingerprints, (positions,), tokens, out, length, channels, tokens.stride(0), tokens.stride(1),
        L=16 if length <= 16 else 32, BK=64, num_warps=4, num_stages=2,
    )  # fmt: skip
    return out


@triton.jit
def _frames(base, i, length, stride, k, channels):
    """[L, BK] fp32 frames i of a position; 0 outside."""
    valid = (i < length)[:, None] & (k < channels)[None, :]
    return tl.load(base + i.to(tl.int64)[:, None] * stride + k[None, :], mask=valid, other=0.0).to(tl.float32)


@triton.jit
def _fingerprints(tokens, out, length, channels, frame_stride, stride, L: tl.constexpr, BK: tl.constexpr):
    position = tl.program_id(0)
    base = tokens + position.to(tl.int64) * stride
    i = tl.arange(0, L)
    square = tl.full((L,), 0.0, tl.float32)
    square_next = tl.full((L,), 0.0, tl.float32)
    square_step = tl.full((L,), 0.0, tl.float32)
    growth = tl.full((L,), 0.0, tl.float32)
    for start in range(0, channels, BK):
        k = start + tl.arange(0, BK)
        x = _frames(base, i, length, frame_stride, k, channels)
        y = _frames(base, i + 1, length, frame_stride, k, channels)
        step = y - x
        square += tl.sum(x * x, 1)
        square_next += tl.sum(y * y, 1)
        square_step += tl.sum(step * step, 1)
        growth += tl.sum(step * (y + x), 1)
    before, after = tl.sqrt_rn(square), tl.sqrt_rn(square_next)
    small = tl.sqrt_rn(square_step) < 0.1 * tl.minimum(before, after)
    growth = growth / tl.maximum(before + after, 1e-30)
    before, after = 1 / tl.maximum(before, 1e-30), 1 / tl.maximum(after, 1e-30)
    change = tl.full((L, L), 0.0, tl.float32)
    for start in range(0, channels, BK):
        k = start + tl.arange(0, BK)
        x = _frames(base, i, length, frame_stride, k, channels)
        y = _frames(base, i + 1, length, frame_stride, k, channels)
        unit = x * before[:, None]
        careful = (y - x - unit * growth[:, None]) * after[:, None]
        step = tl.where(small[:, None], careful, y * after[:, None] - unit)
        change = tl.dot(step, tl.trans(unit), change, input_precision="ieee")
    pair = (i + 1 < length)[:, None] & (i < length)[None, :]
    total = tl.sum(tl.sum(tl.where(pair, tl.abs(change), 0.0), 1), 0)
    tl.store(out + position, total / ((length - 1) * length))
