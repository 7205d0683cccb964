"""The pool by torch.py, but for what happens within a block, which is two Triton kernels: who is like whom, measured in
fp64 where fp32 cannot tell; and who comes first, by one program, a few rows at once, all before them being decided.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vidcompress.ops.launch import INTERPRETED, launch, rows_contiguous
from vidcompress.ops.retention_pool import torch as fast
from vidcompress.ops.retention_pool.naive import ROUNDING


def retention_pool(tokens: Tensor, order: Tensor, threshold: float, size: int) -> Tensor:
    return fast.pooled(rows_contiguous(tokens), order, threshold, size, among)


def among(tokens: Tensor, block: Tensor, z: Tensor, threshold: float) -> Tensor:
    """`among` of torch.py."""
    count, channels = z.shape
    alike = torch.empty(count, count, dtype=torch.uint8, device=z.device)
    accepted = torch.empty(count, dtype=torch.bool, device=z.device)
    # Two fp32 numbers say an fp64 one to 1e-15; what a kernel is given is fp32.
    high = float(torch.tensor(threshold, dtype=torch.float32))
    rows = 64 if INTERPRETED else 4
    launch(
        _compare, (triton.cdiv(count, rows), triton.cdiv(count, 16)), tokens, block.contiguous(), z @ z.T, alike,
        count, channels, tokens.stride(0), high, threshold - ROUNDING - high, fast.margin(channels),
        R=rows, BN=16, BK=32, num_warps=4,
    )  # fmt: skip
    launch(
        _first_come, (min(1, count),), alike, accepted.view(torch.uint8), count,
        R=32, B=max(32, triton.next_power_of_2(count)), num_warps=8, num_stages=1,
    )  # fmt: skip
    return accepted


@triton.jit
def _tile(tokens, place, valid, k, channels, stride):
    inside = valid[:, None] & (k < channels)[None, :]
    return tl.load(tokens + place[:, None] * stride + k[None, :], mask=inside, other=0.0).to(tl.float64)


@triton.jit
def _compare(
    tokens, block, cosine, alike, count, channels, stride, threshold, rest, margin,
    R: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Which earlier tokens (columns) keep a token (row) out, once they are accepted themselves."""
    i, j = tl.program_id(0) * R + tl.arange(0, R), tl.program_id(1) * BN + tl.arange(0, BN)
    at = i.to(tl.int64)[:, None] * count + j[None, :]
    pair = (i < count)[:, None] & (j[None, :] < i[:, None])
    value = tl.load(cosine + at, mask=pair, other=-2.0)
    like = value >= threshold
    near = pair & (tl.abs(value - threshold) < margin)
    if tl.max(tl.max(near.to(tl.int32), 1), 0) > 0:
        one, other = tl.load(block + i, mask=i < count, other=0), tl.load(block + j, mask=j < count, other=0)
        total = tl.full((R, BN), 0.0, tl.float64)
        mine, theirs = tl.full((R,), 0.0, tl.float64), tl.full((BN,), 0.0, tl.float64)
        for start in range(0, channels, BK):
            k = start + tl.arange(0, BK)
            a, b = (
                _tile(tokens, one, i < count, k, channels, stride),
                _tile(tokens, other, j < count, k, channels, stride),
            )
            total += tl.sum(a[:, None, :] * b[None, :, :], 2)
            mine += tl.sum(a * a, 1)
            theirs += tl.sum(b * b, 1)
        mine, theirs = tl.maximum(tl.sqrt(mine), 1e-30), tl.maximum(tl.sqrt(theirs), 1e-30)
        exact = total / mine[:, None] / theirs[None, :]
        like = tl.where(near, exact - threshold >= rest, like)
    tl.store(alike + at, (like & pair).to(tl.uint8), mask=(i < count)[:, None] & (j < count)[None, :])


@triton.jit
def _first_come(alike, accepted, count, R: tl.constexpr, B: tl.constexpr):
    j, s = tl.arange(0, B), tl.arange(0, R)
    for first in range(0, count, R):
        i = first + s
        row = alike + i.to(tl.int64)[:, None] * count
        taken = tl.load(accepted + j, mask=j < first, other=0)
        before = tl.load(row + j[None, :], mask=(i < count)[:, None] & (j < first)[None, :], other=0)
        open = (i < count) & (tl.max((before & taken[None, :]).to(tl.int32), 1) == 0)
        # Of these some keep others out: in is who is like nobody that is still open, out who is like one that is in.
        within = tl.load(row + i[None, :], mask=(i < count)[:, None] & (i < count)[None, :], other=0) != 0
        inside = i < 0
        while tl.max(open.to(tl.int32), 0) > 0:
            sure = open & (tl.max((within & open[None, :]).to(tl.int32), 1) == 0)
            inside = inside | sure
            open = open & (sure == 0) & (tl.max((within & inside[None, :]).to(tl.int32), 1) == 0)
        tl.store(accepted + i, inside.to(tl.uint8), mask=i < count)
        tl.debug_barrier()  # the next rows read what others wrote
