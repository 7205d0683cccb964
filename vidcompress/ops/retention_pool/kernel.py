"""The pool by two Triton kernels a block of tokens, and one wait at the end.

The first holds the block's tokens against the pool, whose size only the device knows, and against each other: products
on tensor cores, and where they cannot tell on which side of the threshold a cosine is, fp64. The second, one program,
goes through the block and lets in who is like nobody before, a few tokens at once, all before them being decided.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vidcompress.ops.launch import INTERPRETED, launch, rows_contiguous
from vidcompress.ops.retention_pool import torch as fast
from vidcompress.ops.retention_pool.naive import ROUNDING

BLOCK_TOKENS = 4096
"""Tokens that are held against the pool together, and then against each other."""

BLOCKS = 8
"""After so many the host asks whether the pool is full; until then kernels find that out themselves."""

TENSOR_CORES = 4
"""They round their sums towards zero: so many times the margin of torch.py is measured again."""


def retention_pool(tokens: Tensor, order: Tensor, threshold: float, size: int) -> Tensor:
    tokens, order, device = rows_contiguous(tokens), order.contiguous(), tokens.device
    (count, channels), visits, size = tokens.shape, len(order), min(size, len(order))
    pool = torch.empty(size, dtype=torch.long, device=device)
    if not size:
        return pool
    block, per = min(BLOCK_TOKENS, visits), 256 if INTERPRETED else 4
    length = torch.empty(count, dtype=torch.float32, device=device)
    launch(
        _lengths, (triton.cdiv(count, per),), tokens, length, count, channels, tokens.stride(0),
        R=per, BK=256, num_warps=4,
    )  # fmt: skip
    have = torch.zeros((), dtype=torch.long, device=device)  # tokens in the pool
    reached, accepted = torch.zeros(2, visits, dtype=torch.uint8, device=device)
    alike = torch.empty(block, block, dtype=torch.uint8, device=device)
    # Two fp32 numbers say an fp64 one to 1e-15; what a kernel is given is fp32.
    high = float(torch.tensor(threshold, dtype=torch.float32))
    half = tokens.dtype in (torch.bfloat16, torch.float16)
    tile = {"BM": 128, "BN": 128, "BK": 64, "num_warps": 8} if half else {"BM": 64, "BN": 64, "BK": 32, "num_warps": 4}
    for number, first in enumerate(range(0, visits, block)):
        if number and number % BLOCKS == 0 and int(have) == size:
            break
        some = min(block, visits - first)
        pooled = triton.cdiv(min(size, first), tile["BN"])  # tiles of the pool, at most
        launch(
            _compare, (triton.cdiv(some, tile["BM"]), pooled + triton.cdiv(some, tile["BN"])), tokens, order, length,
            pool, have, reached, alike, first, some, size, pooled, block, channels, tokens.stride(0),
            high, threshold - ROUNDING - high, TENSOR_CORES * fast.margin(channels),
            UPCAST=INTERPRETED or not half, num_stages=3, **tile,
        )  # fmt: skip
        launch(
            _first_come, (1,), order, reached, alike, accepted, pool, have, first, some, size, block,
            R=32, B=512, num_warps=8, num_stages=1,
        )  # fmt: skip
    return pool[: int(have)]


@triton.jit
def _lengths(tokens, length, count, channels, stride, R: tl.constexpr, BK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    total = tl.full((R,), 0.0, tl.float32)
    for start in range(0, channels, BK):
        k = start + tl.arange(0, BK)
        inside = (i < count)[:, None] & (k < channels)[None, :]
        x = tl.load(tokens + i[:, None] * stride + k[None, :], mask=inside, other=0.0).to(tl.float32)
        total += tl.sum(x * x, 1)
    tl.store(length + i, tl.maximum(tl.sqrt_rn(total), 1e-30), mask=i < count)


@triton.jit
def _tile(tokens, place, valid, k, channels, stride):
    inside = valid[:, None] & (k < channels)[None, :]
    return tl.load(tokens + place[:, None] * stride + k[None, :], mask=inside, other=0.0)


@triton.jit
def _exact(tokens, one, other, valid, channels, stride, BM: tl.constexpr, BK: tl.constexpr):
    """[BM] fp64 cosines of pairs."""
    total = tl.full((BM,), 0.0, tl.float64)
    mine, theirs = total, total
    for start in range(0, channels, BK):
        k = start + tl.arange(0, BK)
        a = _tile(tokens, one, valid, k, channels, stride).to(tl.float64)
        b = _tile(tokens, other, valid, k, channels, stride).to(tl.float64)
        total += tl.sum(a * b, 1)
        mine += tl.sum(a * a, 1)
        theirs += tl.sum(b * b, 1)
    return total / tl.maximum(tl.sqrt(mine), 1e-30) / tl.maximum(tl.sqrt(theirs), 1e-30)


@triton.jit
def _compare(
    tokens, order, length, pool, have, reached, alike, first, some, size, pooled, block, channels, stride,
    threshold, rest, margin, UPCAST: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Who of a block is like a token of the pool; and which earlier tokens of the block (columns of `alike`) keep a
    token (row) out, once they are accepted themselves.
    """
    full, number = tl.load(have), tl.program_id(1)
    of_pool = number < pooled
    i = tl.program_id(0) * BM + tl.arange(0, BM)
    j = tl.where(of_pool, number, number - pooled) * BN + tl.arange(0, BN)
    columns = tl.where(of_pool, full, tl.minimum(some, (tl.program_id(0) + 1) * BM).to(tl.int64))
    # Nothing to do for a pool that is full, for what lies behind its end, or above the diagonal.
    if (full < size) & (tl.min(j, 0) < columns):
        inside = j < columns
        row = tl.load(order + first + i, mask=i < some, other=0)
        column = tl.load(pool + j, mask=inside & of_pool, other=0)
        column += tl.load(order + first + j, mask=inside & (of_pool == 0), other=0)
        product = tl.full((BM, BN), 0.0, tl.float32)
        for start in range(0, channels, BK):
            k = start + tl.arange(0, BK)
            x, y = (
                _tile(tokens, row, i < some, k, channels, stride),
                _tile(tokens, column, inside, k, channels, stride),
            )
            if UPCAST:
                x, y = x.to(tl.float32), y.to(tl.float32)
            product = tl.dot(x, tl.trans(y), product, input_precision="tf32x3")
        cosine = product / tl.load(length + row, mask=i < some, other=1.0)[:, None]
        cosine = cosine / tl.load(length + column, mask=inside, other=1.0)[None, :]
        pair = (i < some)[:, None] & inside[None, :] & (of_pool | (j[None, :] < i[:, None]))
        near = pair & (tl.abs(cosine - threshold) < margin)
        like = pair & (cosine >= threshold) & (near == 0)
        # Of every row one pair that is near after the other; none of a row that the pool keeps out anyway.
        out = of_pool & (tl.max(like.to(tl.int32), 1) > 0)
        near = near & (out == 0)[:, None]
        while tl.max(tl.max(near.to(tl.int32), 1), 0) > 0:
            which = tl.min(tl.where(near, j[None, :], 2147483647), 1)
            open = which < 2147483647
            this = near & (j[None, :] == which[:, None])
            other = tl.sum(tl.where(this, column[None, :], 0), 1)
            exact = _exact(tokens, row, other, open, channels, stride, BM, 32)
            like = like | (this & (exact - threshold >= rest)[:, None])
            out = of_pool & (tl.max(like.to(tl.int32), 1) > 0)
            near = near & (this == 0) & (out == 0)[:, None]
        if of_pool:
            tl.store(reached + first + i, tl.full((BM,), 1, tl.uint8), mask=out & (i < some))
        else:
            at = i.to(tl.int64)[:, None] * block + j[None, :]
            tl.store(alike + at, like.to(tl.uint8), mask=(i < some)[:, None] & (j < some)[None, :])


@triton.jit
def _first_come(
    order, reached, alike, accepted, pool, have, first, some, size, block, R: tl.constexpr, B: tl.constexpr
):
    count, s, start = tl.load(have), tl.arange(0, R), tl.program_id(0) * 0
    while (start < some) & (count < size):
        i = start + s
        row = alike + i.to(tl.int64)[:, None] * block
        open = (i < some) & (tl.load(reached + first + i, mask=i < some, other=1) == 0)
        for begin in range(0, start, B):
            j = begin + tl.arange(0, B)
            taken = tl.load(accepted + first + j, mask=j < start, other=0)
            before = tl.load(row + j[None, :], mask=open[:, None] & (j < start)[None, :], other=0)
            open = open & (tl.max((before & taken[None, :]).to(tl.int32), 1) == 0)
        # Of these some keep others out: in is who is like nobody that is still open, out who is like one that is in.
        within = tl.load(row + i[None, :], mask=(i < some)[:, None] & (i[None, :] < i[:, None]), other=0) != 0
        inside = i < 0
        while tl.max(open.to(tl.int32), 0) > 0:
            sure = open & (tl.max((within & open[None, :]).to(tl.int32), 1) == 0)
            inside = inside | sure
            open = open & (sure == 0) & (tl.max((within & inside[None, :]).to(tl.int32), 1) == 0)
        place = count + tl.cumsum(inside.to(tl.int64), 0) - 1
        token = tl.load(order + first + i, mask=i < some, other=0)
        tl.store(pool + place, token, mask=inside & (place < size))
        tl.store(accepted + first + i, inside.to(tl.uint8), mask=i < some)
        count += tl.sum(inside.to(tl.int64), 0)
        start += R
        tl.debug_barrier()  # the next rows read what others wrote
    tl.store(have, tl.minimum(count, size))
