"""Sparse products by Triton: one kernel counts what every triplet becomes, one writes it; sorting adds up equals."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vidcompress.ops.compose import torch as fast
from vidcompress.ops.compose.naive import Map
from vidcompress.ops.launch import INTERPRETED, launch

TRIPLETS = 1 << 14 if INTERPRETED else 256
"""Triplets of a program: the interpreter takes as long for few as for many."""


def compose(first: Map, second: Map, num_source: int) -> tuple[Tensor, Tensor, Tensor]:
    (keep, *early), (own, *late) = ([x.contiguous() for x in one] for one in (first, second))
    slot, order = early[0].sort(stable=True)
    begin = _begins(slot, len(keep))
    used = _begins(late[0].sort().values, len(own))
    total = len(late[0]) + len(own)  # triplets of the second map, then its slots, which may have none
    counts = torch.empty(total, dtype=torch.long, device=keep.device)
    grid = (triton.cdiv(total, TRIPLETS),)
    launch(_count, grid, own, late[1], begin, used, counts, len(late[0]), total, B=TRIPLETS, num_warps=4)
    ends = counts.cumsum(0)
    pairs = int(ends[-1])
    key = torch.empty(pairs, dtype=torch.long, device=keep.device)
    weight = torch.empty(pairs, dtype=torch.float64, device=keep.device)
    launch(
        _multiply, grid, keep, order, early[1], early[2], own, *late, begin, counts, ends, key, weight,
        len(late[0]), total, num_source, B=TRIPLETS, num_warps=4,
    )  # fmt: skip
    return fast.summed(key, weight, num_source)


def _begins(slot: Tensor, count: int) -> Tensor:
    """[count + 1] where every slot's begin, of ascending ones."""
    return torch.searchsorted(slot, torch.arange(count + 1, device=slot.device))


@triton.jit
def _middle(own, middle, e, late, total):
    """[B] which token of the middle each of the triplets is of: their own, or the slot's."""
    mine = tl.load(middle + e, mask=e < late, other=0)
    return tl.where(e < late, mine, tl.load(own + e - late, mask=(e >= late) & (e < total), other=0))


@triton.jit
def _count(own, middle, begin, used, counts, late, total, B: tl.constexpr):
    e = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    m, slot = _middle(own, middle, e, late, total), (e >= late) & (e < total)
    many = tl.load(begin + m + 1, mask=e < total, other=0) - tl.load(begin + m, mask=e < total, other=0)
    taken = tl.load(used + e - late + 1, mask=slot, other=0) > tl.load(used + e - late, mask=slot, other=0)
    tl.store(counts + e, tl.where(slot, tl.where(taken, 0, many), tl.maximum(many, 1)), mask=e < total)


@triton.jit
def _multiply(
    keep, order, source, share, own, slot, middle, weight, begin, counts, ends, key, product,
    late, total, num_source, B: tl.constexpr,
):  # fmt: skip
    e = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    m, given = _middle(own, middle, e, late, total), e < late
    to = tl.where(given, tl.load(slot + e, mask=given, other=0), e - late) * num_source
    b = tl.load(weight + e, mask=given, other=1.0).to(tl.float64)
    many = tl.load(counts + e, mask=e < total, other=0)
    out = tl.load(ends + e, mask=e < total, other=0) - many
    first = tl.load(begin + m, mask=e < total, other=0)
    mixed = tl.load(begin + m + 1, mask=e < total, other=0) > first
    for step in range(0, tl.max(many, 0)):
        there = step < many
        place = tl.load(order + first + step, mask=there & mixed, other=0)
        token = tl.load(source + place, mask=there & mixed, other=0)
        token = tl.where(mixed, token, tl.load(keep + m, mask=there, other=0))
        a = tl.load(share + place, mask=there & mixed, other=1.0).to(tl.float64)
        tl.store(key + out + step, to + token, mask=there)
        tl.store(product + out + step, a * b, mask=there)
