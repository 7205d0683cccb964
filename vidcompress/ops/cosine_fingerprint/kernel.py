"""Temporal fingerprints by Triton: one program a position and segment, all of its frames in registers, for up to 32.

The first pass over the channels takes the norms and how far each frame is from the one before, the second forms the
products of the steps between unit tokens with all unit tokens, for the reason that torch.py has: cosines near 1
cancel. Steps are fp32, also of half-precision tokens, so their products are full fp32 ("ieee"): a position that hardly
changes is told from one that changes less by 1e-7. Longer segments would not fit into registers; torch.py has those.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from vidcompress.ops.cosine_fingerprint import torch as fast
from vidcompress.ops.launch import launch, rows_contiguous
from vidcompress.ops.table import table

LENGTHS = (16, 32)
"""Frames that fit into a program; a segment has the least that it needs."""


def cosine_fingerprint(tokens: Tensor) -> Tensor:
    return cosine_fingerprints(tokens, [(0, len(tokens))])[0]


def cosine_fingerprints(tokens: Tensor, segments: Sequence[tuple[int, int]]) -> Tensor:
    """[K, P] of every segment: one launch for all segments of a size."""
    _, positions, channels = tokens.shape
    tokens = rows_contiguous(tokens if tokens.dtype != torch.float64 else tokens.float())
    out = torch.empty(len(segments), positions, dtype=torch.float32, device=tokens.device)
    fewest = -1
    for most in LENGTHS:
        spans = [(k, start, end) for k, (start, end) in enumerate(segments) if fewest < end - start <= most]
        if spans:
            launch(
                _fingerprints, (positions, len(spans)), tokens, table(spans, tokens.device), out,
                positions, channels, tokens.stride(0), tokens.stride(1), L=most, BK=64, num_warps=4, num_stages=2,
            )  # fmt: skip
        fewest = most
    for k, (start, end) in enumerate(segments):
        if end - start > fewest:
            out[k] = fast.cosine_fingerprint(tokens[start:end])
    return out


@triton.jit
def _frames(base, i, length, stride, k, channels):
    """[L, BK] fp32 frames i of a position; 0 outside."""
    valid = (i < length)[:, None] & (k < channels)[None, :]
    return tl.load(base + i.to(tl.int64)[:, None] * stride + k[None, :], mask=valid, other=0.0).to(tl.float32)


@triton.jit
def _fingerprints(tokens, spans, out, positions, channels, frame_stride, stride, L: tl.constexpr, BK: tl.constexpr):
    position, span = tl.program_id(0).to(tl.int64), spans + 3 * tl.program_id(1)
    segment, first = tl.load(span), tl.load(span + 1)
    length = (tl.load(span + 2) - first).to(tl.int32)
    base = tokens + first * frame_stride + position * stride
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
    tl.store(out + segment * positions + position, total / tl.maximum((length - 1) * length, 1))
