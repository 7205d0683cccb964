"""The search for the nearest tokens by Triton: one pass over all distances, which are never written down.

A program holds the tile of distances between 64 or 128 tokens and 128 others in registers, fresh from the tensor cores,
and keeps each row's few nearest; several programs share a block of rows, each with lists of its own. Half-precision
tokens are multiplied as they are, which is exact but for the sum. Where they lie far from the origin, and around
leaders, they are shifted in fp32 and multiplied in three TF32 products: one keeps 10 bits, and the sum of squares
cancels.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vidcompress.ops.kernel_bisect import _first_not_before
from vidcompress.ops.launch import INTERPRETED, launch

SPLITS = 8
"""Programs that share a block of rows: few rows must fill a GPU, and those that run together read the same tokens."""

ROUNDING = 4
"""Tensor cores round their sums towards zero: so many times the rounding of tiled.py's products is allowed for."""

ROWS = 512 if INTERPRETED else 8
"""Tokens whose lengths a program measures: the interpreter takes as long for a small tile as for a large one."""


def search(
    tokens: Tensor,
    index: Tensor,
    rows: Tensor,
    row_square: Tensor,
    below: Tensor | None,
    columns: Tensor,
    column_square: Tensor,
    origin: tuple[Tensor | None, Tensor | None],
    counts: Tensor,
    kept: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Lists of the nearest columns of every row.

    Args:
        tokens: [n, C], of which points are those at `index` [m].
        rows, columns: [r] and [c] points, the columns ascending.
        row_square, column_square: [r] and [c] fp32 squared lengths, as seen from the origin; a column of infinite
            length is no one's neighbour.
        below: [m] of a point, only the points of a lower number than this can be its neighbours; None: all can.
        origin: [C] from where to look, or None for 0, where tokens are multiplied as they are stored; and [1] long that
            tells the device to look from 0 after all, unless it is 0.
        counts: [2] how many rows and columns there really are.
        kept: how long a row's list is.

    Returns:
        Squared distances [r, splits, slots] fp32 and whose they are in int32, `kept` of all that a split has seen, and
        [r, splits] the largest.
    """
    (count, device), (middle, stays) = (len(rows), tokens.device), origin
    slots = max(2, triton.next_power_of_2(kept))
    splits = min(SPLITS, triton.cdiv(len(columns), tile_of(slots, False)["BN"]))
    distance = torch.empty(count, splits, slots, dtype=torch.float32, device=device)
    point = torch.empty(count, splits, slots, dtype=torch.int32, device=device)
    farthest = torch.empty(count, splits, dtype=torch.float32, device=device)
    for raw in (True, False) if stays is not None else (middle is None,):
        tile = tile_of(slots, raw)
        launch(
            _nearest, (splits, triton.cdiv(count, tile["BM"])), tokens, tokens if middle is None else middle, index,
            rows, row_square, rows if below is None else below, columns, column_square,
            counts if stays is None else stays, counts, distance, point, farthest,
            len(columns).bit_length(), tokens.shape[1], tokens.stride(0),
            KEPT=kept, SLOTS=slots, LIMITED=below is not None, RAW=raw, EITHER=stays is not None, UPCAST=INTERPRETED,
            **tile, num_warps=8, num_stages=3,
        )  # fmt: skip
    return distance, point, farthest


def tile_of(slots: int, raw: bool) -> dict[str, int]:
    """How large a program's tile is: what is shifted needs more registers, and so do long lists."""
    return {"BM": 128, "BN": 128, "BK": 64} if raw and slots <= 16 else {"BM": 64, "BN": 128, "BK": 32}


def lengths(tokens: Tensor, index: Tensor, points: Tensor, origin: Tensor | None) -> Tensor:
    """[p] fp32 squared lengths of points, as seen from `origin` [C] or from 0."""
    out = torch.empty(len(points), dtype=torch.float32, device=points.device)
    launch(
        _lengths, (triton.cdiv(len(points), ROWS),), tokens, tokens if origin is None else origin, index, points, out,
        len(points), tokens.shape[1], tokens.stride(0), RAW=origin is None, P=ROWS, BK=256, num_warps=4,
    )  # fmt: skip
    return out


@triton.jit
def _load(tokens, place, valid, k, channels, stride, shift, RAW: tl.constexpr):
    """A tile [m, BK] of tokens, shifted unless it is RAW; whatever outside."""
    inside = k < channels
    x = tl.load(tokens + place[:, None] * stride + k[None, :], mask=valid[:, None] & inside[None, :], other=0.0)
    if not RAW:
        origin = tl.load(shift + k, mask=inside, other=0.0)
        x = (x.to(origin.dtype) - origin[None, :]).to(tl.float32)
    return x


@triton.jit
def _lengths(
    tokens, shift, index, points, out, count, channels, stride, RAW: tl.constexpr, P: tl.constexpr, BK: tl.constexpr
):
    i = tl.program_id(0) * P + tl.arange(0, P)
    place = tl.load(index + tl.load(points + i, mask=i < count, other=0), mask=i < count, other=0)
    total = tl.full((P,), 0.0, tl.float32)
    for start in range(0, channels, BK):
        x = _load(tokens, place, i < count, start + tl.arange(0, BK), channels, stride, shift, RAW).to(tl.float32)
        total += tl.sum(x * x, 1)
    tl.store(out + i, total, mask=i < count)


@triton.jit
def _nearest(
    tokens, shift, index, rows, row_square, below, columns, column_square, stays, counts, distance, point, farthest,
    steps, channels, stride,
    KEPT: tl.constexpr, SLOTS: tl.constexpr, LIMITED: tl.constexpr, RAW: tl.constexpr, EITHER: tl.constexpr,
    UPCAST: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    split, splits = tl.program_id(0), tl.num_programs(0)
    count, end = tl.load(counts), tl.load(counts + 1)
    if EITHER:
        runs = (tl.load(stays) != 0) == RAW
        count, end = tl.where(runs, count, 0), tl.where(runs, end, 0)
    block = tl.num_programs(1) - 1 - tl.program_id(1)  # the last rows have most columns below them: they start first
    end = tl.where(block * BM < count, end, 0)
    i = block * BM + tl.arange(0, BM)
    slot = tl.arange(0, SLOTS)
    point_of = tl.load(rows + i, mask=i < count, other=0)
    place = tl.load(index + point_of, mask=i < count, other=0)
    own = tl.load(row_square + i, mask=i < count, other=0.0)
    limit = tl.where(i < count, 2147483647, 0)
    if LIMITED:  # columns ascend: those beyond the highest limit count for no row
        limit = tl.load(below + point_of, mask=i < count, other=0).to(tl.int32)
        end = _first_not_before(columns, tl.max(limit, 0), end * 0, end, steps, False)
    # Slots beyond those to keep are never the worst, so nothing takes them.
    best = tl.where(slot[None, :] < KEPT, tl.full((BM, SLOTS), float("inf"), tl.float32), -float("inf"))
    who = tl.full((BM, SLOTS), 0, tl.int32)
    most = tl.full((BM,), 0.0, tl.float32)
    for start in range(split * BN, end, splits * BN):
        j = start + tl.arange(0, BN)
        named = tl.load(columns + j, mask=j < end, other=2147483647).to(tl.int32)
        across = tl.load(index + named, mask=j < end, other=0)
        product = tl.full((BM, BN), 0.0, tl.float32)
        for first in range(0, channels, BK):
            k = first + tl.arange(0, BK)
            x = _load(tokens, place, i < count, k, channels, stride, shift, RAW)
            y = _load(tokens, across, j < end, k, channels, stride, shift, RAW)
            if UPCAST:
                x, y = x.to(tl.float32), y.to(tl.float32)
            product = tl.dot(x, tl.trans(y), product, input_precision="tf32x3")
        square = tl.load(column_square + j, mask=j < end, other=0.0)
        tile = own[:, None] + square[None, :] - 2 * product
        seen = named[None, :] < limit[:, None]
        most = tl.maximum(most, tl.max(tl.where(seen & (tile < float("inf")), tile, 0.0), 1))
        tile = tl.where(seen, tile, float("inf"))
        # The nearest of the tile takes the place of the farthest of the list, until it is nearer in no row.
        worst, value = tl.max(best, 1), tl.min(tile, 1)
        while tl.max((value < worst).to(tl.int32), 0) > 0:
            name = tl.min(tl.where(tile == value[:, None], named[None, :], 2147483647), 1)
            tile = tl.where(named[None, :] == name[:, None], float("inf"), tile)
            last = tl.min(tl.where(best == worst[:, None], slot[None, :], SLOTS), 1)
            taken = (slot[None, :] == last[:, None]) & (value < worst)[:, None]
            best = tl.where(taken, value[:, None], best)
            who = tl.where(taken, name[:, None], who)
            worst, value = tl.max(best, 1), tl.min(tile, 1)
    best = tl.where(slot[None, :] < KEPT, best, float("inf"))
    to = (i.to(tl.int64) * splits + split)[:, None] * SLOTS + slot[None, :]
    tl.store(distance + to, best, mask=(i < count)[:, None])
    tl.store(point + to, who, mask=(i < count)[:, None])
    tl.store(farthest + i.to(tl.int64) * splits + split, most, mask=i < count)
