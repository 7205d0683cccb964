"""The nearest anchor by Triton: all products by one matrix product, then a program a few tokens, which decides.

As in torch.py a bound on the rounding says which anchors can be the nearest; where several can, the program measures
them in fp64, by the words of the definition. The host waits for nothing.
"""

from __future__ import annotations

from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from vidcompress.ops.launch import INTERPRETED, launch, rows_contiguous
from vidcompress.ops.nearest.torch import NOISE

CHUNK_ELEMENTS = 64 << 20
"""Products, and fp32 copies of tokens, that exist at once."""

ROWS = 64 if INTERPRETED else 4
"""Tokens of a program: the interpreter takes as long for few as for many."""

ROUNDING = 4
"""Products may be rounded by so much more than those that torch.py's bound was measured on."""


def nearest(tokens: Tensor, anchors: Tensor, measure: Literal["euclidean", "cosine"]) -> Tensor:
    tokens, anchors, channels = rows_contiguous(tokens), anchors.contiguous(), tokens.shape[1]
    out = torch.empty(len(tokens), dtype=torch.long, device=tokens.device)
    # Distances do not change when a common vector is taken off all, and the expanded square then cancels far less.
    centre = anchors.mean(0, dtype=torch.float64) if measure == "euclidean" else None
    y, size = placed(anchors, centre)
    step = max(1, CHUNK_ELEMENTS // max(channels, len(anchors)))
    for start in range(0, len(tokens), step):
        part = tokens[start : start + step]
        x, length = placed(part, centre)
        launch(
            _choose, (triton.cdiv(len(part), ROWS),), part, anchors, x @ y.T, length, size, out[start:],
            len(part), len(anchors), channels, part.stride(0), ROUNDING * NOISE[torch.float32] * channels**0.5,
            COSINE=centre is None, R=ROWS, BN=32, BK=16, num_warps=4,
        )  # fmt: skip
    return out


def placed(vectors: Tensor, centre: Tensor | None) -> tuple[Tensor, Tensor]:
    """[n, C] fp32 as seen from the centre, or of length 1; and [n] how long they are."""
    x = torch.empty(vectors.shape, dtype=torch.float32, device=vectors.device)
    length = torch.empty(len(vectors), dtype=torch.float32, device=vectors.device)
    launch(
        _place, (triton.cdiv(len(vectors), ROWS),), vectors, vectors if centre is None else centre, x, length,
        len(vectors), vectors.shape[1], vectors.stride(0), CENTRED=centre is not None, R=ROWS, BK=256, num_warps=4,
    )  # fmt: skip
    return x, length


@triton.jit
def _place(vectors, centre, out, length, n, channels, stride, CENTRED: tl.constexpr, R: tl.constexpr, BK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    square = tl.full((R,), 0.0, tl.float32)
    for start in range(0, channels, BK):
        k = start + tl.arange(0, BK)
        inside = (i < n)[:, None] & (k < channels)[None, :]
        x = tl.load(vectors + i[:, None] * stride + k[None, :], mask=inside, other=0.0)
        if CENTRED:
            x = (x.to(tl.float64) - tl.load(centre + k, mask=k < channels, other=0.0)[None, :]).to(tl.float32)
            x = tl.where(inside, x, 0.0)
            tl.store(out + i[:, None] * channels + k[None, :], x, mask=inside)
        x = x.to(tl.float32)
        square += tl.sum(x * x, 1)
    size = tl.sqrt_rn(square)
    if not CENTRED:
        for start in range(0, channels, BK):
            k = start + tl.arange(0, BK)
            inside = (i < n)[:, None] & (k < channels)[None, :]
            x = tl.load(vectors + i[:, None] * stride + k[None, :], mask=inside, other=0.0).to(tl.float32)
            tl.store(out + i[:, None] * channels + k[None, :], x / tl.maximum(size, 1e-30)[:, None], mask=inside)
        size = tl.where(size > 0, 1.0, 0.0)
    tl.store(length + i, size, mask=i < n)


@triton.jit
def _scores(product, length, size, i, j, n, k, unit, COSINE: tl.constexpr):
    """[R, BN] minus the cosine, or the squared distance less the token's own square; and how wrong it may be."""
    seen = (i < n)[:, None] & (j < k)[None, :]
    dot = tl.load(product + i.to(tl.int64)[:, None] * k + j[None, :], mask=seen, other=0.0)
    own = tl.load(size + j, mask=j < k, other=0.0)[None, :]
    if COSINE:
        score, noise = -dot, unit * length[:, None] * own
    else:
        score, noise = own * own - 2 * dot, unit * own * (2 * length[:, None] + own)
    return tl.where(seen, score, float("inf")), tl.where(seen, noise, 0.0)


@triton.jit
def _tile(base, place, valid, k, channels, stride):
    inside = valid[:, None] & (k < channels)[None, :]
    return tl.load(base + place.to(tl.int64)[:, None] * stride + k[None, :], mask=inside, other=0.0).to(tl.float64)


@triton.jit
def _exact(
    tokens, anchors, i, j, n, count, channels, stride,
    COSINE: tl.constexpr, R: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """[R, BN] fp64 minus the cosine, or the squared distance, by the words of the definition."""
    total = tl.full((R, BN), 0.0, tl.float64)
    mine, theirs = tl.full((R,), 0.0, tl.float64), tl.full((BN,), 0.0, tl.float64)
    for start in range(0, channels, BK):
        k = start + tl.arange(0, BK)
        a = _tile(tokens, i, i < n, k, channels, stride)
        b = _tile(anchors, j, j < count, k, channels, channels)
        if COSINE:
            total -= tl.sum(a[:, None, :] * b[None, :, :], 2)
            mine += tl.sum(a * a, 1)
            theirs += tl.sum(b * b, 1)
        else:
            step = a[:, None, :] - b[None, :, :]
            total += tl.sum(step * step, 2)
    if COSINE:
        mine, theirs = tl.maximum(tl.sqrt(mine), 1e-30), tl.maximum(tl.sqrt(theirs), 1e-30)
        total = total / mine[:, None] / theirs[None, :]
    return total


@triton.jit
def _choose(
    tokens, anchors, product, lengths, size, out, n, count, channels, stride, unit,
    COSINE: tl.constexpr, R: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0) * R + tl.arange(0, R)
    length = tl.load(lengths + i, mask=i < n, other=0.0)
    limit = tl.full((R,), float("inf"), tl.float32)
    for first in range(0, count, BN):
        j = first + tl.arange(0, BN)
        score, noise = _scores(product, length, size, i, j, n, count, unit, COSINE)
        limit = tl.minimum(limit, tl.min(score + noise, 1))
    close = tl.full((R,), 0, tl.int32)
    choice = tl.full((R,), 2147483647, tl.int32)
    for first in range(0, count, BN):
        j = first + tl.arange(0, BN)
        score, noise = _scores(product, length, size, i, j, n, count, unit, COSINE)
        can = (score - noise <= limit[:, None]) & (j < count)[None, :]
        close += tl.sum(can.to(tl.int32), 1)
        choice = tl.minimum(choice, tl.min(tl.where(can, j[None, :], 2147483647), 1))
    doubt = (close > 1) & (i < n)
    if tl.max(doubt.to(tl.int32), 0) > 0:
        best = tl.full((R,), float("inf"), tl.float64)
        for first in range(0, count, BN):
            j = first + tl.arange(0, BN)
            score, noise = _scores(product, length, size, i, j, n, count, unit, COSINE)
            can = (score - noise <= limit[:, None]) & (j < count)[None, :] & doubt[:, None]
            if tl.max(tl.max(can.to(tl.int32), 1), 0) > 0:
                total = _exact(tokens, anchors, i, j, n, count, channels, stride, COSINE, R, BN, BK)
                total = tl.where(can, total, float("inf"))
                least = tl.min(total, 1)
                name = tl.min(tl.where(total == least[:, None], j[None, :], 2147483647), 1)
                choice = tl.where(doubt & (least < best), name, choice)
                best = tl.minimum(best, least)
    # Nothing is near to what is no number: the first anchor is as good as any.
    tl.store(out + i, tl.where(choice < count, choice, 0).to(tl.int64), mask=i < n)
