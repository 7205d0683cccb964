"""Density peaks of many tokens by Triton: the search of tiled.py, its two passes over all distances each one kernel.

A program holds the tile of distances between 64 or 128 tokens and 128 others in registers, fresh from the tensor cores,
and keeps each row's few nearest. Distances are never written down. Pass 1 compares all with all; pass 2 only those that
no neighbour is denser than, with the points of a lower number, which are numbered by density.

Decisions are those of naive.py. As in tiled.py a bound on the rounding says which tokens can be among the nearest;
these are measured in fp64, and what the bound leaves open is searched around a leader. Half-precision tokens are
multiplied as they are, which is exact but for the sum. Where they lie far from the origin, and around leaders, they are
shifted in fp32 and multiplied in three TF32 products: one keeps 10 bits, and the sum of squares cancels.
"""

from __future__ import annotations

from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from vidcompress.ops.density_peaks import kernel_lists as lists
from vidcompress.ops.density_peaks import tiled
from vidcompress.ops.density_peaks import torch as fast
from vidcompress.ops.density_peaks.kernel_frames import frame_scores
from vidcompress.ops.density_peaks.kernel_lists import PAIRS
from vidcompress.ops.launch import INTERPRETED, launch, rows_contiguous

MOST_KEPT = 32
"""Longest list of neighbours that fits into registers; longer ones are left to tiled.py."""

SPLITS = 8
"""Programs that share a block of rows: few rows must fill a GPU, and those that run together read the same tokens."""

ROUNDING = 4
"""Tensor cores round their sums towards zero: so many times the rounding of tiled.py's products is allowed for."""


def density_peaks(
    tokens: Tensor,
    candidates: Tensor,
    neighbours: int,
    ties: Literal["index", "strict"] = "index",
    noise: Tensor | None = None,
) -> Tensor:
    if tokens.shape[1] <= fast.TILED_ABOVE or not len(tokens):
        return frame_scores(tokens, candidates, neighbours, ties, noise)
    extra = [None] * len(tokens) if noise is None else noise
    rows = zip(rows_contiguous(tokens), candidates, extra, strict=True)
    return torch.stack([tiled.tiled_scores(x, own, neighbours, ties, e, Points) for x, own, e in rows])


class Points(tiled.Points):
    """Tokens whose distances are a kernel's."""

    def middle(self) -> Tensor | None:
        """Half-precision tokens stay where they are, unless most of their length is their common mean."""
        if self.tokens.dtype in (torch.float32, torch.float64):
            return super().middle()
        some = self.tokens[self.index[:: max(1, len(self.index) // tiled.TILE)]].double()
        middle = some.mean(0)
        is_short = middle.norm() <= some.norm() * (0.8 / len(some)) ** 0.5
        return None if is_short else middle

    def noise(self, square: Tensor, distance: Tensor) -> Tensor:
        return ROUNDING * super().noise(square, distance)

    @property
    def unit(self) -> float:
        """What `noise` multiplies with."""
        return ROUNDING * tiled.NOISE * float(self.tokens.shape[1]) ** 0.5

    def scan(self, rows: Tensor, columns: Tensor | None, origin: Tensor | None, kept: int) -> tiled.Near:
        rows = rows.contiguous()
        across = rows if columns is None else columns.contiguous()
        if kept > MOST_KEPT:  # never fewer where there are fewer columns: every number is a kernel of its own
            return super().scan(rows, columns, origin, kept)
        square = self.squares(across, origin)
        own = square if columns is None else self.squares(rows, origin)
        near = nearest(self, rows, own, across, square, origin, kept)
        if columns is not None:
            near.farthest.zero_()
        return near

    def squares(self, points: Tensor, origin: Tensor | None) -> Tensor:
        """[p] fp32 squared lengths, as seen from `origin`."""
        out = torch.empty(len(points), dtype=torch.float32, device=points.device)
        raw, shift = origin is None, self.tokens if origin is None else _shift(self.tokens, origin)
        channels, stride = self.tokens.shape[1], self.tokens.stride(0)
        launch(
            _squares, (triton.cdiv(len(points), PAIRS),), self.tokens, shift, self.index, points, out,
            len(points), channels, stride, RAW=raw, P=PAIRS, BK=256, num_warps=4,
        )  # fmt: skip
        return out

    def bounds(self, near: tiled.Near, wanted: int) -> tuple[Tensor, Tensor]:
        return lists.bounds(near, wanted, self.unit)

    def measured(self, rows: Tensor, near: tiled.Near, last: Tensor, known: Tensor | None) -> Tensor:
        return lists.measured(self.tokens, self.index, rows, near, last.contiguous(), known, self.unit)

    def apart(self, one: Tensor, other: Tensor) -> Tensor:
        out = torch.empty(len(one), dtype=torch.float64, device=one.device)
        channels, stride = self.tokens.shape[1], self.tokens.stride(0)
        launch(
            _apart, (triton.cdiv(len(one), PAIRS),), self.tokens, self.index, one, other, out,
            len(one), channels, stride, P=PAIRS, BK=256, num_warps=4,
        )  # fmt: skip
        return out

    def above(self, near: tiled.Near, rank: Tensor, below: Tensor) -> tuple[tiled.Near, Tensor]:
        return lists.above(near, rank, below)

    def settled(self, above: tiled.Near, exact: Tensor, rank: Tensor, below: Tensor) -> tuple[Tensor, Tensor]:
        return lists.settled(above, exact, rank, below, self.tokens.shape[1])

    def largest(self, near: tiled.Near, origin: Tensor | None) -> Tensor:
        every = torch.arange(len(self.index), device=self.index.device)
        return self.apart(near.farthest.argmax().expand(len(every)).contiguous(), every).amax()[None]

    def log_density(self, exact: Tensor, point: Tensor, copies: Tensor, neighbours: int) -> Tensor:
        return lists.log_density(exact, point, copies, neighbours)

    @staticmethod
    def hashes(tokens: Tensor, chosen: Tensor) -> Tensor:
        return (tiled.Points.hashes if tokens.dtype == torch.float64 else lists.hashes)(tokens, chosen)


def nearest(
    points: Points,
    rows: Tensor,
    row_square: Tensor,
    columns: Tensor,
    column_square: Tensor,
    origin: Tensor | None,
    kept: int,
) -> tiled.Near:
    """The `kept` nearest columns of every row, by one kernel, and one that joins its lists.

    Args:
        rows, columns: [r] and [c] points, ascending; a point's `below` bounds the columns that count for it.
        row_square, column_square: [r] and [c] squared lengths, as seen from the origin.
        origin: [C] fp64 from where to look; None: 0, and tokens are multiplied as they are stored.
    """
    tokens, device = points.tokens, points.tokens.device
    slots, count, limited = max(2, triton.next_power_of_2(kept)), len(rows), points.below is not None
    tile = {"BM": 128, "BN": 128, "BK": 64} if origin is None and slots <= 16 else {"BM": 64, "BN": 128, "BK": 32}
    blocks, splits = triton.cdiv(count, tile["BM"]), min(SPLITS, triton.cdiv(len(columns), tile["BN"]))
    distance = torch.empty(count, splits, slots, dtype=torch.float32, device=device)
    point = torch.empty(count, splits, slots, dtype=torch.int32, device=device)
    farthest = torch.empty(count, splits, dtype=torch.float32, device=device)
    below = ends = rows
    if points.below is not None:
        below = points.below[rows]
        highest = torch.nn.functional.pad(below, (0, blocks * tile["BM"] - count)).view(blocks, -1).amax(1)
        ends = torch.searchsorted(columns, highest)  # [blocks] columns that a block of rows has to see
    launch(
        _nearest, (splits, blocks), tokens, tokens if origin is None else _shift(tokens, origin), points.index,
        rows, row_square, below, ends, columns, column_square, distance, point, farthest,
        count, len(columns), tokens.shape[1], tokens.stride(0),
        KEPT=kept, SLOTS=slots, LIMITED=limited, RAW=origin is None, UPCAST=INTERPRETED, **tile,
        num_warps=8, num_stages=3,
    )  # fmt: skip
    return lists.joined(distance, point, farthest, row_square, kept, len(columns), points.unit)


def _shift(tokens: Tensor, origin: Tensor) -> Tensor:
    return origin.to(torch.float64 if tokens.dtype == torch.float64 else torch.float32)


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
def _squares(
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
def _apart(tokens, index, one, other, out, count, channels, stride, P: tl.constexpr, BK: tl.constexpr):
    """Squared distances of pairs over C, in fp64, by the words of the definition."""
    i = tl.program_id(0) * P + tl.arange(0, P)
    a = tl.load(index + tl.load(one + i, mask=i < count, other=0), mask=i < count, other=0)
    b = tl.load(index + tl.load(other + i, mask=i < count, other=0), mask=i < count, other=0)
    total = tl.full((P,), 0.0, tl.float64)
    for start in range(0, channels, BK):
        k = start + tl.arange(0, BK)
        x = _load(tokens, a, i < count, k, channels, stride, tokens, True).to(tl.float64)
        x -= _load(tokens, b, i < count, k, channels, stride, tokens, True).to(tl.float64)
        total += tl.sum(x * x, 1)
    distance = tl.sqrt(total) / tl.sqrt(total * 0 + channels)
    tl.store(out + i, distance * distance, mask=i < count)


@triton.jit
def _nearest(
    tokens, shift, index, rows, row_square, below, ends, columns, column_square, distance, point, farthest,
    count, end, channels, stride,
    KEPT: tl.constexpr, SLOTS: tl.constexpr, LIMITED: tl.constexpr, RAW: tl.constexpr, UPCAST: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    split, splits = tl.program_id(0), tl.num_programs(0)
    block = tl.num_programs(1) - 1 - tl.program_id(1)  # the last rows have most columns below them: they start first
    i = block * BM + tl.arange(0, BM)
    slot = tl.arange(0, SLOTS)
    place = tl.load(index + tl.load(rows + i, mask=i < count, other=0), mask=i < count, other=0)
    own = tl.load(row_square + i, mask=i < count, other=0.0)
    limit = tl.where(i < count, 2147483647, 0)
    if LIMITED:
        limit = tl.load(below + i, mask=i < count, other=0).to(tl.int32)
        end = tl.load(ends + block).to(tl.int32)
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
        most = tl.maximum(most, tl.max(tl.where(seen, tile, 0.0), 1))
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
