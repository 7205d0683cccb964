"""What density peaks of many tokens do with the lists that the search leaves, by Triton: a program takes some rows.

The search's programs share a row's list; one kernel makes it one, another measures what may be among the nearest, in
fp64 and by the words of the definition, a third estimates densities. A row's list is short: its least entry is looked
for again and again.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from vidcompress.ops.density_peaks import tiled
from vidcompress.ops.hashing import factors
from vidcompress.ops.launch import INTERPRETED, launch

PAIRS = 512 if INTERPRETED else 8
"""Pairs a program measures: the interpreter takes as long for a small tile as for a large one."""

ROWS = 256 if INTERPRETED else 8
"""Lists of a program, likewise."""


def joined(
    distance: Tensor, point: Tensor, farthest: Tensor, square: Tensor, kept: int, columns: int, unit: float
) -> tiled.Near:
    """One list a row from several, and what lies beyond it.

    Args:
        distance, point: [r, splits, slots].
        farthest: [r, splits].
        square: [r] squared lengths of the rows.
        columns: how many there are; all are listed if they are no more than `kept`.
        unit: of the rounding, see `tiled.Points.noise`.
    """
    count, width = len(distance), distance.shape[1] * distance.shape[2]
    near = tiled.Near(
        distance.new_empty(count, kept), torch.empty(count, kept, dtype=torch.long, device=point.device), square,
        torch.empty_like(square), torch.empty_like(square),
    )  # fmt: skip
    launch(
        _join, (triton.cdiv(count, ROWS),), distance, point, farthest, square,
        near.distance, near.point, near.reach, near.farthest, count, width, distance.shape[1], unit,
        KEPT=kept, ALL=kept >= columns, R=ROWS, W=triton.next_power_of_2(width),
        S=triton.next_power_of_2(distance.shape[1]), num_warps=4,
    )  # fmt: skip
    return near


def bounds(near: tiled.Near, wanted: int, unit: float) -> tuple[Tensor, Tensor]:
    """[r] fp32 what the `wanted` nearest are no farther than, and [r] bool whether they may not be listed."""
    (count, kept), device = near.distance.shape, near.square.device
    most, unsure = torch.empty_like(near.square), torch.empty(count, dtype=torch.bool, device=device)
    launch(
        _bounds, (triton.cdiv(count, 256),), near.distance, near.square, near.reach, most, unsure.view(torch.uint8),
        count, kept, min(wanted, kept) - 1, unit, B=256, num_warps=4,
    )  # fmt: skip
    return most, unsure


def measured(
    tokens: Tensor, index: Tensor, rows: Tensor, near: tiled.Near, last: Tensor, known: Tensor | None, unit: float
) -> Tensor:
    """`tiled.Points.measured`, every pair by itself."""
    count, kept = near.distance.shape
    out = torch.empty(count, kept, dtype=torch.float64, device=tokens.device)
    launch(
        _measure, (triton.cdiv(count * kept, PAIRS),), tokens, index, rows, near.point, near.distance.contiguous(),
        last, near.square, out if known is None else known, out, count, kept, tokens.shape[1], tokens.stride(0), unit,
        KNOWN=known is not None, P=PAIRS, BK=256, num_warps=4,
    )  # fmt: skip
    return out


def log_density(exact: Tensor, point: Tensor, copies: Tensor, neighbours: int) -> Tensor:
    """`tiled.Points.log_density`."""
    count, kept = exact.shape
    out = torch.empty(count, dtype=torch.float64, device=exact.device)
    launch(
        _estimate, (triton.cdiv(count, ROWS),), exact, point, copies, out, count, kept, neighbours,
        R=ROWS, W=triton.next_power_of_2(kept), num_warps=4,
    )  # fmt: skip
    return out


def above(near: tiled.Near, rank: Tensor, below: Tensor) -> tuple[tiled.Near, Tensor]:
    """`tiled.Points.above`."""
    count, kept = near.distance.shape
    distance = torch.empty(count, kept, dtype=torch.float32, device=rank.device)
    closest = torch.empty(count, dtype=torch.float32, device=rank.device)
    launch(
        _above, (triton.cdiv(count, ROWS),), near.distance.contiguous(), near.point, rank, below, distance, closest,
        count, kept, R=ROWS, W=triton.next_power_of_2(kept), num_warps=4,
    )  # fmt: skip
    return replace(near, distance=distance), closest


def settled(near: tiled.Near, exact: Tensor, rank: Tensor, below: Tensor, channels: int) -> tuple[Tensor, Tensor]:
    """`tiled.Points.settled`."""
    count, kept = near.distance.shape
    delta = torch.empty(count, dtype=torch.float64, device=rank.device)
    may = torch.empty(count, dtype=torch.bool, device=rank.device)
    launch(
        _settle, (triton.cdiv(count, ROWS),), near.distance, exact, near.reach, rank, below,
        delta, may.view(torch.uint8), count, kept, channels, R=ROWS, W=triton.next_power_of_2(kept), num_warps=4,
    )  # fmt: skip
    return delta, may


def hashes(tokens: Tensor, chosen: Tensor) -> Tensor:
    """As `hashing.hashes`, of tokens that are not fp64."""
    out = torch.empty(len(chosen), dtype=torch.long, device=tokens.device)
    launch(
        _hash, (triton.cdiv(len(chosen), PAIRS),), tokens, chosen, factors(tokens.shape[1], tokens.device), out,
        len(chosen), tokens.shape[1], tokens.stride(0), P=PAIRS, BK=256, num_warps=4,
    )  # fmt: skip
    return out


@triton.jit
def _join(
    distance, point, farthest, square, to_distance, to_point, reach, to_farthest, count, width, splits, unit,
    KEPT: tl.constexpr, ALL: tl.constexpr, R: tl.constexpr, W: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    i, j, s = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R), tl.arange(0, W), tl.arange(0, S)
    inside = (i < count)[:, None] & (j < width)[None, :]
    row = tl.load(distance + i[:, None] * width + j[None, :], mask=inside, other=float("inf"))
    least = tl.min(row, 1)
    for k in range(KEPT):
        least = tl.min(row, 1)
        place = tl.min(tl.where(row == least[:, None], j[None, :], W), 1)
        who = tl.load(point + i * width + place, mask=(i < count) & (least < float("inf")), other=0)
        tl.store(to_distance + i * KEPT + k, least, mask=i < count)
        tl.store(to_point + i * KEPT + k, who.to(tl.int64), mask=i < count)
        row = tl.where(j[None, :] == place[:, None], float("inf"), row)
    beyond = tl.full((R,), float("inf"), tl.float32)
    if not ALL:
        own = tl.load(square + i, mask=i < count, other=0.0)
        beyond = tl.where(least < float("inf"), least - unit * (3 * own + 2 * least), beyond)
    tl.store(reach + i, beyond, mask=i < count)
    inside = (i < count)[:, None] & (s < splits)[None, :]
    most = tl.max(tl.load(farthest + i[:, None] * splits + s[None, :], mask=inside, other=0.0), 1)
    tl.store(to_farthest + i, most, mask=i < count)


@triton.jit
def _bounds(distance, square, reach, most, unsure, count, kept, wanted, unit, B: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    last = tl.maximum(tl.load(distance + i * kept + wanted, mask=i < count, other=0.0), 0.0)
    own = tl.load(square + i, mask=i < count, other=0.0)
    limit = last + unit * (3 * own + 2 * last)
    # Where distances are about as long as the points, another origin would tell no more.
    doubt = (limit > tl.load(reach + i, mask=i < count, other=0.0)) & (own > 5 * last)
    tl.store(most + i, limit, mask=i < count)
    tl.store(unsure + i, doubt.to(tl.uint8), mask=i < count)


@triton.jit
def _measure(
    tokens, index, rows, point, distance, last, square, known, out, count, kept, channels, stride, unit,
    KNOWN: tl.constexpr, P: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    e = tl.program_id(0).to(tl.int64) * P + tl.arange(0, P)
    row, inside = e // kept, e < count * kept
    limit = tl.load(last + row, mask=inside, other=0.0)
    limit += 2 * unit * (3 * tl.load(square + row, mask=inside, other=0.0) + 2 * limit)
    apart = tl.load(distance + e, mask=inside, other=float("inf"))
    wanted = inside & (apart <= limit) & (apart < float("inf"))
    before = tl.full((P,), float("inf"), tl.float64)
    if KNOWN:
        before = tl.load(known + e, mask=inside, other=float("inf"))
        wanted = wanted & (before == float("inf"))
    one, other = tl.load(rows + row, mask=wanted, other=0), tl.load(point + e, mask=wanted, other=0)
    a, b = tl.load(index + one, mask=wanted, other=0), tl.load(index + other, mask=wanted, other=0)
    total = tl.full((P,), 0.0, tl.float64)
    if tl.max(wanted.to(tl.int32), 0) > 0:
        for start in range(0, channels, BK):
            k = start + tl.arange(0, BK)
            seen = wanted[:, None] & (k < channels)[None, :]
            x = tl.load(tokens + a[:, None] * stride + k[None, :], mask=seen, other=0.0).to(tl.float64)
            x -= tl.load(tokens + b[:, None] * stride + k[None, :], mask=seen, other=0.0).to(tl.float64)
            total += tl.sum(x * x, 1)
    # As naive.py has it: the square of a distance over the root of the channels.
    length = tl.sqrt(total) / tl.sqrt(total * 0 + channels)
    tl.store(out + e, tl.where(wanted, length * length, before), mask=inside)


@triton.jit
def _estimate(exact, point, copies, out, count, kept, neighbours, R: tl.constexpr, W: tl.constexpr):
    i, j = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R), tl.arange(0, W)
    inside = (i < count)[:, None] & (j < kept)[None, :]
    row = tl.load(exact + i[:, None] * kept + j[None, :], mask=inside, other=float("inf"))
    place = tl.load(point + i[:, None] * kept + j[None, :], mask=inside, other=0)
    left = tl.load(copies + place, mask=inside, other=0)
    total = tl.full((R,), 0.0, tl.float64)
    for _ in range(0, neighbours):
        least = tl.min(row, 1)
        first = tl.min(tl.where(row == least[:, None], j[None, :], W), 1)
        total += least
        left = tl.where(j[None, :] == first[:, None], left - 1, left)
        row = tl.where(left > 0, row, float("inf"))
    tl.store(out + i, -total / neighbours, mask=i < count)


@triton.jit
def _above(distance, point, rank, below, to_distance, closest, count, kept, R: tl.constexpr, W: tl.constexpr):
    i, j = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R), tl.arange(0, W)
    at, inside = i[:, None] * kept + j[None, :], (i < count)[:, None] & (j < kept)[None, :]
    row = tl.load(distance + at, mask=inside, other=float("inf"))
    limit = tl.load(below + tl.load(rank + i, mask=i < count, other=0), mask=i < count, other=0)
    there = inside & (row < float("inf"))
    theirs = tl.load(rank + tl.load(point + at, mask=there, other=0), mask=there, other=0)
    row = tl.where(there & (theirs < limit[:, None]), row, float("inf"))
    tl.store(to_distance + at, row, mask=inside)
    tl.store(closest + i, tl.min(row, 1), mask=i < count)


@triton.jit
def _settle(distance, exact, reach, rank, below, delta, may, count, kept, channels, R: tl.constexpr, W: tl.constexpr):
    i, j = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R), tl.arange(0, W)
    at, inside = i[:, None] * kept + j[None, :], (i < count)[:, None] & (j < kept)[None, :]
    denser = inside & (tl.load(distance + at, mask=inside, other=float("inf")) < float("inf"))
    least = tl.min(tl.load(exact + at, mask=denser, other=float("inf")), 1)
    mine = tl.load(rank + i, mask=i < count, other=0)
    beyond = least * channels > tl.load(reach + i, mask=i < count, other=0.0).to(tl.float64)
    beyond = beyond & (tl.load(below + mine, mask=i < count, other=0) > 0)
    tl.store(delta + i, least, mask=i < count)
    tl.store(may + mine, beyond.to(tl.uint8), mask=i < count)


@triton.jit
def _hash(tokens, chosen, factor, out, count, channels, stride, P: tl.constexpr, BK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * P + tl.arange(0, P)
    place = tl.load(chosen + i, mask=i < count, other=0)
    total = tl.full((P,), 0, tl.int64)
    for start in range(0, channels, BK):
        k = start + tl.arange(0, BK)
        seen = (i < count)[:, None] & (k < channels)[None, :]
        x = tl.load(tokens + place[:, None] * stride + k[None, :], mask=seen, other=0.0).to(tl.float32)
        bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True).to(tl.int64)  # -0 becomes 0
        total += tl.sum(bits * tl.load(factor + k, mask=k < channels, other=0)[None, :], 1)
    tl.store(out + i, total, mask=i < count)
