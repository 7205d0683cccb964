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
from torch.nn.functional import normalize

from vidcompress.ops.launch import UPCAST, launch, rows_contiguous
from vidcompress.ops.nearest.torch import NOISE

CHUNK_ELEMENTS = 64 << 20
"""Products, and fp32 copies of tokens, that exist at once."""

ROUNDING = 4
"""Products may be rounded by so much more than those that torch.py's bound was measured on."""


def nearest(tokens: Tensor, anchors: Tensor, measure: Literal["euclidean", "cosine"]) -> Tensor:
    tokens, anchors, channels = rows_contiguous(tokens), anchors.contiguous(), tokens.shape[1]
    out = torch.empty(len(tokens), dtype=torch.long, device=tokens.device)
    # Distances do not change when a common vector is taken off all, and the expanded square then cancels far less.
    centre = anchors.mean(0, dtype=torch.float64) if measure == "euclidean" else None
    y = _placed(anchors, centre)
    size = y.norm(dim=1)
    step = max(1, CHUNK_ELEMENTS // max(channels, len(anchors)))
    for start in range(0, len(tokens), step):
        part = tokens[start : start + step]
        x = _placed(part, centre)
        rows = 64 if UPCAST else 4
        launch(
            _choose, (triton.cdiv(len(part), rows),), part, anchors, x, x @ y.T, size, out[start:],
            len(part), len(anchors), channels, part.stride(0), ROUNDING * NOISE[torch.float32] * channels**0.5,
            COSINE=centre is None, R=rows, BN=16, BK=32, num_warps=4,
        )  # fmt: skip
    return out


def _placed(vectors: Tensor, centre: Tensor | None) -> Tensor:
    """fp32: as seen from the centre, or of length 1."""
    exact = vectors if vectors.dtype == torch.float64 else vectors.float()
    return (normalize(exact, dim=1, eps=1e-30) if centre is None else exact - centre.to(exact.dtype)).float()


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
def _choose(
    tokens, anchors, x, product, size, out, n, count, channels, stride, unit,
    COSINE: tl.constexpr, R: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0) * R + tl.arange(0, R)
    square = tl.full((R,), 0.0, tl.float32)
    for start in range(0, channels, BK):
        k = start + tl.arange(0, BK)
        inside = (i < n)[:, None] & (k < channels)[None, :]
        own = tl.load(x + i.to(tl.int64)[:, None] * channels + k[None, :], mask=inside, other=0.0)
        square += tl.sum(own * own, 1)
    length = tl.sqrt_rn(square)
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
                total = tl.full((R, BN), 0.0, tl.float64)
                mine, theirs = tl.full((R,), 0.0, tl.float64), tl.full((BN,), 0.0, tl.float64)
                for start in range(0, channels, BK):
                    k = start + tl.arange(0, BK)
                    a, b = (
                        _tile(tokens, i, i < n, k, channels, stride),
                        _tile(anchors, j, j < count, k, channels, channels),
                    )
                    if COSINE:
                        total += tl.sum(a[:, None, :] * b[None, :, :], 2)
                        mine += tl.sum(a * a, 1)
                        theirs += tl.sum(b * b, 1)
                    else:
                        step = a[:, None, :] - b[None, :, :]
                        total += tl.sum(step * step, 2)
                if COSINE:
                    total = (
                        -total / tl.maximum(tl.sqrt(mine), 1e-30)[:, None] / tl.maximum(tl.sqrt(theirs), 1e-30)[None, :]
                    )
                total = tl.where(can, total, float("inf"))
                least = tl.min(total, 1)
                name = tl.min(tl.where(total == least[:, None], j[None, :], 2147483647), 1)
                choice = tl.where(doubt & (least < best), name, choice)
                best = tl.minimum(best, least)
    tl.store(out + i, choice.to(tl.int64), mask=i < n)
