"""Maps through means by Triton: one kernel says where every triplet belongs, sorting brings equals together, a second
counts what becomes of them, a third writes it. The host waits once, for how many there are.

What a slot takes of one position of a segment lies side by side in that order: first its part of the mean, then frame
by frame what it takes of the tokens themselves.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from vidcompress.ops.kernel_bisect import _first_not_before
from vidcompress.ops.launch import INTERPRETED, launch
from vidcompress.ops.table import table

TRIPLETS = 1 << 14 if INTERPRETED else 256
"""Triplets of a program: the interpreter takes as long for few as for many."""


def through_means(
    slot: Tensor,
    source: Tensor,
    weight: Tensor,
    alone: int,
    replaced: Tensor,
    segments: Sequence[tuple[int, int]],
    ask: Tensor,
) -> tuple[Tensor, Tensor, Tensor, int]:
    (frames, p), count, device = replaced.shape, len(slot), slot.device
    slot, source, weight, replaced = (x.contiguous() for x in (slot, source, weight, replaced))
    spans = table([(start, end - start) for start, end in segments for _ in range(start, end)], device)
    grid, run = (triton.cdiv(count, TRIPLETS),), {"B": TRIPLETS, "num_warps": 4}
    key, many = (torch.empty(count, dtype=torch.long, device=device) for _ in range(2))
    launch(_keys, grid, slot, source, replaced.view(torch.uint8), spans, key, alone, count, p, frames, **run)
    key, order = key.sort(stable=True)
    launch(_count, grid, key, spans, many, count, p, frames, count.bit_length(), **run)
    ends = many.cumsum(0)
    total, answer = torch.stack([ends[-1] if count else ask.new_zeros(()), ask]).tolist()
    to, token = (torch.empty(total, dtype=torch.long, device=device) for _ in range(2))
    share = torch.empty(total, dtype=torch.float32, device=device)
    launch(_write, grid, key, order, weight, spans, many, ends, to, token, share, count, p, frames, **run)
    return to, token, share, answer


@triton.jit
def _keys(slot, source, replaced, spans, key, alone, count, p, frames, B: tl.constexpr):
    """(slot, position of a segment, 0 for its mean or 1 + frame of the segment), as one number; the largest of all for
    what is left out, and for what is unlawful, which the caller refuses only once it has waited.
    """
    e = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    token, to = tl.load(source + e, mask=e < count, other=0), tl.load(slot + e, mask=e < count, other=0)
    lawful = (e < count) & (token >= 0) & (token < frames * p) & (to >= 0)
    start = tl.load(spans + 2 * (token // p), mask=lawful, other=0)
    mixed = tl.load(replaced + token, mask=lawful, other=0) != 0
    group = to * frames * p + start * p + token % p
    value = group * (frames + 1) + tl.where(mixed, 0, 1 + token // p - start)
    taken = lawful & (value >= 0) & ((e >= alone) | mixed)
    tl.store(key + e, tl.where(taken, value, 9223372036854775807), mask=e < count)


@triton.jit
def _span(spans, group, inside, p, frames):
    """A group's segment: where it begins, how long it is."""
    frame = group % (frames * p) // p
    return tl.load(spans + 2 * frame, mask=inside, other=0), tl.load(spans + 2 * frame + 1, mask=inside, other=1)


@triton.jit
def _count(key, spans, many, count, p, frames, steps, B: tl.constexpr):
    e = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    own = tl.load(key + e, mask=e < count, other=9223372036854775807)
    head = (own != tl.load(key + e - 1, mask=(e > 0) & (e < count), other=-1)) & (own < 9223372036854775807)
    group = tl.where(head, own // (frames + 1), 0)
    _, length = _span(spans, group, head, p, frames)
    # The first of the group: whether it has a mean, which then writes for all of them.
    wanted, last = group * (frames + 1), tl.where(head, e, 0)
    low = _first_not_before(key, wanted, tl.zeros_like(e), last, steps, False)
    mean = head & (tl.load(key + low, mask=head, other=0) == wanted)
    is_mean = own == wanted
    tl.store(many + e, tl.where(head, tl.where(is_mean, length, tl.where(mean, 0, 1)), 0), mask=e < count)


@triton.jit
def _run(key, order, weight, at, wanted, here, count):
    """Sums the triplets of one key from `at` on: their weights in fp64, and where the next key begins."""
    total = at.to(tl.float64) * 0
    same = here & (tl.load(key + at, mask=here & (at < count), other=-1) == wanted)
    while tl.max(same.to(tl.int32), 0) > 0:
        place = tl.load(order + at, mask=same, other=0)
        total += tl.load(weight + place, mask=same, other=0.0).to(tl.float64)
        at = tl.where(same, at + 1, at)
        same = same & (tl.load(key + at, mask=same & (at < count), other=-1) == wanted)
    return total, at


@triton.jit
def _write(key, order, weight, spans, many, ends, to, token, share, count, p, frames, B: tl.constexpr):
    e = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    each = tl.load(many + e, mask=e < count, other=0)
    out = tl.load(ends + e, mask=e < count, other=0) - each
    own, writes = tl.load(key + e, mask=e < count, other=0), each > 0
    group, part = own // (frames + 1), own % (frames + 1)
    start, length = _span(spans, group, writes, p, frames)
    total, at = _run(key, order, weight, e, own, writes, count)
    mean = writes & (part == 0)
    total = tl.where(mean, total / length.to(tl.float64), total)
    for step in range(0, tl.max(each, 0)):
        there = step < each
        frame = tl.where(mean, step, part - 1)
        more, at = _run(key, order, weight, at, own + 1 + step, there & mean, count)
        tl.store(to + out + step, group // (frames * p), mask=there)
        tl.store(token + out + step, (start + frame) * p + group % p, mask=there)
        tl.store(share + out + step, (total + more).to(tl.float32), mask=there)
