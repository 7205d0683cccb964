"""Received attention by Triton, in two kernels: every query's log-sum-exp, then every key's sum over the queries.

A program of the second holds 128 keys of a head and runs over its queries: it forms a tile of logits on tensor cores,
subtracts the log-sum-exp, and adds up the columns of the exponentials in registers. Weights are never written
down, and each is divided by its row's sum before it is added, which no later row can change. A head dimension such as
SigLIP's 72 is multiplied as 64 + 16, not padded to 128. Half-precision products are exact but for the sum; fp32 is
multiplied in three TF32 products, whose error is that of fp32.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from vidcompress.ops.launch import INTERPRETED, launch, rows_contiguous


def column_mean_attention(query: Tensor, key: Tensor, scale: float) -> Tensor:
    batch, heads, n, channels = query.shape
    if query.dtype != key.dtype or query.dtype == torch.float64:
        query, key = query.float(), key.float()
    query, key = rows_contiguous(query), rows_contiguous(key)
    log_sum = torch.empty(batch * heads, n, dtype=torch.float32, device=query.device)
    column = torch.empty(batch, heads, n, dtype=torch.float32, device=query.device)
    first, second = parts(channels)
    strides = (*query.stride()[:3], *key.stride()[:3])
    # In steps of 8 elements, where they are: then copies are known to be aligned. The launcher looks for 16 only.
    unit = 1 if any(stride % 8 for stride in strides) else 8
    # Powers of two are cheaper than those of e.
    scalars = (heads, n, *(stride // unit for stride in strides), scale * math.log2(math.e))
    arguments = (query, key, log_sum, column, *scalars)
    constants = {"C": channels, "D": first, "E": second, "UNIT": unit, "UPCAST": INTERPRETED}
    grid = (batch * heads, triton.cdiv(n, 128))
    launch(_log_sums, grid, *arguments, **constants, BM=128, BN=64, num_warps=8, num_stages=3)
    launch(_column_sums, grid, *arguments, **constants, BM=64, BN=128, num_warps=8, num_stages=3)
    return column.sum(1) / (heads * n)


def parts(channels: int) -> tuple[int, int]:
    """A head dimension as two powers of two, at least 16 each, the second 0 if one will do."""
    first = max(16, 1 << (channels.bit_length() - 1))
    return first, 0 if channels <= first else max(16, triton.next_power_of_2(channels - first))


@triton.jit
def _load(base, i, n, stride, c, C: tl.constexpr):
    """A tile [m, D] of rows; 0 outside."""
    valid = (i < n)[:, None] & (c < C)[None, :]
    return tl.load(base + i.to(tl.int64)[:, None] * stride + c[None, :], mask=valid, other=0.0)


@triton.jit
def _logits(x, rest, others, j, n, stride, C: tl.constexpr, D: tl.constexpr, E: tl.constexpr, UPCAST: tl.constexpr):
    """Products of a tile of rows, x [m, D] and `rest` [m, E], with the rows j of `others`."""
    y = _load(others, j, n, stride, tl.arange(0, D), C)
    if UPCAST:
        x, y = x.to(tl.float32), y.to(tl.float32)
    product = tl.dot(x, tl.trans(y), input_precision="tf32x3")
    if E:
        y = _load(others, j, n, stride, D + tl.arange(0, E), C)
        if UPCAST:
            rest, y = rest.to(tl.float32), y.to(tl.float32)
        product = tl.dot(rest, tl.trans(y), product, input_precision="tf32x3")
    return product


@triton.jit
def _log_sums(
    query, key, log_sum, column, heads, n, qb, qh, qn, kb, kh, kn, scale,
    C: tl.constexpr, D: tl.constexpr, E: tl.constexpr, UNIT: tl.constexpr, UPCAST: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """log2 of the sum of 2^(scale * logit) of every query."""
    pair = tl.program_id(0).to(tl.int64)
    query += (pair // heads * qb + pair % heads * qh) * UNIT
    key += (pair // heads * kb + pair % heads * kh) * UNIT
    i = tl.program_id(1) * BM + tl.arange(0, BM)
    q = _load(query, i, n, qn * UNIT, tl.arange(0, D), C)
    rest = _load(query, i, n, qn * UNIT, D + tl.arange(0, E), C) if E else q
    highest = tl.full((BM,), -float("inf"), tl.float32)
    total = tl.full((BM,), 0.0, tl.float32)
    for start in range(0, n, BN):
        j = start + tl.arange(0, BN)
        logits = scale * _logits(q, rest, key, j, n, kn * UNIT, C, D, E, UPCAST)
        logits = tl.where((j < n)[None, :], logits, -float("inf"))
        now = tl.maximum(highest, tl.max(logits, 1))
        total = total * tl.exp2(highest - now) + tl.sum(tl.exp2(logits - now[:, None]), 1)
        highest = now
    tl.store(log_sum + pair * n + i, highest + tl.log2(total), mask=i < n)


@triton.jit
def _column_sums(
    query, key, log_sum, column, heads, n, qb, qh, qn, kb, kh, kn, scale,
    C: tl.constexpr, D: tl.constexpr, E: tl.constexpr, UNIT: tl.constexpr, UPCAST: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """What every key receives from all queries: logits are transposed, the program's keys stay and queries pass."""
    pair = tl.program_id(0).to(tl.int64)
    query += (pair // heads * qb + pair % heads * qh) * UNIT
    key += (pair // heads * kb + pair % heads * kh) * UNIT
    j = tl.program_id(1) * BN + tl.arange(0, BN)
    k = _load(key, j, n, kn * UNIT, tl.arange(0, D), C)
    rest = _load(key, j, n, kn * UNIT, D + tl.arange(0, E), C) if E else k
    received = tl.full((BN,), 0.0, tl.float32)
    for start in range(0, n, BM):
        i = start + tl.arange(0, BM)
        logits = _logits(k, rest, query, i, n, qn * UNIT, C, D, E, UPCAST)  # [BN, BM]
        own = tl.load(log_sum + pair * n + i, mask=i < n, other=float("inf"))
        received += tl.sum(tl.exp2(scale * logits - own[None, :]), 1)
    tl.store(column + pair * n + j, received, mask=j < n)
