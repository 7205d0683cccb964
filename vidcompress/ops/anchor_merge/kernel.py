"""Merging into anchors by Triton: three kernels for a video, and one wait, for how many tokens join.

The first lists where the anchors are. In the second a program takes some tokens of a frame and the anchors of one row,
which it goes through a few at a time; it writes down which is the most similar, and that one more token joins it.
Products are fp32 (three TF32 ones). The third writes the triplets.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from vidcompress.ops.anchor_merge import torch as fast
from vidcompress.ops.launch import UPCAST, launch, rows_contiguous

TRIPLETS = 1 << 16 if UPCAST else 1024
"""Triplets a program writes: the interpreter takes as long for few as for many."""


def anchor_merge(
    frames: Tensor,
    members: Tensor,
    anchors: Tensor,
    counts: Sequence[int],
    reach: Sequence[tuple[int, int]],
    anchor_weight: float,
    anchors_join: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    frames, p, device = rows_contiguous(frames), frames.shape[1], frames.device
    rows = fast.rows_of(counts, reach)
    if not rows:
        return fast.nothing(device)
    widest = max(counts)
    members, anchors = (x.contiguous().view(torch.uint8) for x in (members, anchors))
    centre = torch.empty(len(rows), widest, dtype=torch.long, device=device)
    launch(_list, (len(rows),), anchors, torch.tensor(rows, device=device), centre, p, widest, B=1024, num_warps=4)
    # What is compared: the tokens of a frame with a row of so many anchors, of that frame's own or not.
    pairs = [(f, r, counts[g], f == g and not anchors_join) for r, g in enumerate(rows) for f in range(*reach[g])]
    count = torch.zeros(len(rows) * widest, dtype=torch.int32, device=device)
    parts = []
    for some in torch.tensor(pairs).split(max(1, fast.CHUNK_ELEMENTS // p)):
        table = some.to(device)
        slot, joins = choose(frames, centre, members, anchors, table, count)
        parts.append((table, slot, joins.nonzero().squeeze(1)))
    # An anchor's own triplet comes first; which places of `centre` are no padding the host knows.
    own = torch.tensor([r * widest + a for r, f in enumerate(rows) for a in range(counts[f])], device=device)
    ends = [len(own)]
    ends += [ends[-1] + len(found) for _, _, found in parts]
    survivor, source = (torch.empty(ends[-1], dtype=torch.long, device=device) for _ in range(2))
    weight = torch.empty(ends[-1], dtype=torch.float32, device=device)
    for part, (table, slot, found) in enumerate(parts):
        first, alone = (ends[part], 0) if part else (0, len(own))
        out = (x[first : ends[part + 1]] for x in (survivor, source, weight))
        total = alone + len(found)
        launch(
            _triplets, (triton.cdiv(total, TRIPLETS),), own, found, table, slot, centre, count, *out,
            alone, total, p, float(anchor_weight), B=TRIPLETS, num_warps=4,
        )  # fmt: skip
    return survivor, source, weight


def choose(
    frames: Tensor, centre: Tensor, members: Tensor, anchors: Tensor, table: Tensor, count: Tensor
) -> tuple[Tensor, Tensor]:
    """Which anchor every token joins, by one kernel.

    Args:
        frames: [T, P, C].
        centre: [R, A] flat indices of the anchors of every row.
        members, anchors: [T, P] uint8, 1 or 0.
        table: [n, 4] frame, row, anchors of that row, and whether anchors of the frame stay away.
        count: [R * A] int32, to which the tokens that join are added.

    Returns:
        Two [n * P]: row * A + anchor in int32, and whether the token joins it.
    """
    (p, channels), widest = frames.shape[1:], centre.shape[1]
    slot = torch.empty(len(table) * p, dtype=torch.int32, device=frames.device)
    joins = torch.empty(len(table) * p, dtype=torch.bool, device=frames.device)
    launch(
        _join, (len(table), triton.cdiv(p, 64)), frames, centre, members, anchors, table, slot, joins.view(torch.uint8),
        count, p, channels, widest, frames.stride(0), frames.stride(1),
        BM=64, BA=max(16, min(64, triton.next_power_of_2(widest))), BK=32, num_warps=4,
    )  # fmt: skip
    return slot, joins


@triton.jit
def _list(anchors, rows, centre, p, widest, B: tl.constexpr):
    """The flat indices of the anchors of a row's frame, ascending."""
    row = tl.program_id(0)
    base = tl.load(rows + row).to(tl.int64) * p
    before = tl.full((), 0, tl.int32)
    for start in range(0, p, B):
        i = start + tl.arange(0, B)
        mark = tl.load(anchors + base + i, mask=i < p, other=0).to(tl.int32)
        place = before + tl.cumsum(mark, 0) - 1
        tl.store(centre + row * widest + place, base + i, mask=(mark != 0) & (place < widest))
        before += tl.sum(mark, 0)


@triton.jit
def _join(
    frames, centre, members, anchors, table, slot, joined, count, p, channels, widest, frame_stride, stride,
    BM: tl.constexpr, BA: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    pair = tl.program_id(0).to(tl.int64)
    frame, row = tl.load(table + 4 * pair), tl.load(table + 4 * pair + 1)
    many, own = tl.load(table + 4 * pair + 2), tl.load(table + 4 * pair + 3)
    i = tl.program_id(1) * BM + tl.arange(0, BM)
    best = tl.full((BM,), -float("inf"), tl.float32)
    choice = tl.full((BM,), 0, tl.int64)
    for first in range(0, many, BA):
        a = first + tl.arange(0, BA)
        at = tl.load(centre + row * widest + a, mask=a < many, other=0)
        place = at // p * frame_stride + at % p * stride
        product = tl.full((BM, BA), 0.0, tl.float32)
        square = tl.full((BA,), 0.0, tl.float32)
        for start in range(0, channels, BK):
            k = start + tl.arange(0, BK)
            seen = (i < p)[:, None] & (k < channels)[None, :]
            x = tl.load(frames + frame * frame_stride + i[:, None] * stride + k[None, :], mask=seen, other=0.0)
            seen = (a < many)[:, None] & (k < channels)[None, :]
            y = tl.load(frames + place[:, None] + k[None, :], mask=seen, other=0.0).to(tl.float32)
            square += tl.sum(y * y, 1)
            product = tl.dot(x.to(tl.float32), tl.trans(y), product, input_precision="tf32x3")
        # The token's own norm cannot change which anchor is the most similar.
        product = product / tl.maximum(tl.sqrt_rn(square), 1e-30)[None, :]
        product = tl.where((a < many)[None, :], product, -float("inf"))
        top = tl.max(product, 1)
        name = tl.min(tl.where(product == top[:, None], a[None, :], widest), 1)
        choice = tl.where(top > best, name, choice)
        best = tl.maximum(best, top)
    joins = tl.load(members + frame * p + i, mask=i < p, other=0) != 0
    anchor = tl.load(anchors + frame * p + i, mask=i < p, other=0) != 0
    joins = joins & ((anchor & (own != 0)) == 0)
    to = row * widest + choice
    tl.store(slot + pair * p + i, to.to(tl.int32), mask=i < p)
    tl.store(joined + pair * p + i, joins.to(tl.uint8), mask=i < p)
    tl.atomic_add(count + to, 1, mask=joins & (i < p))


@triton.jit
def _triplets(
    own, found, table, slot, centre, count, survivor, source, weight, alone, total, p, least, B: tl.constexpr
):
    """First the `alone` triplets of the anchors themselves, of the slots `own`; then those of the tokens that join, at
    the places `found` of `slot`."""
    e = tl.program_id(0) * B + tl.arange(0, B)
    inside, itself = e < total, e < alone
    at = tl.load(found + e - alone, mask=inside & (itself == 0), other=0)
    to = tl.load(slot + at, mask=inside & (itself == 0), other=0).to(tl.int64)
    to = tl.where(itself, tl.load(own + e, mask=itself, other=0), to)
    anchor = tl.load(centre + to, mask=inside, other=0)
    token = tl.load(table + 4 * (at // p), mask=inside & (itself == 0), other=0) * p + at % p
    many = tl.load(count + to, mask=inside, other=0).to(tl.float32)
    share = tl.maximum(tl.div_rn(1.0, many + 1.0), least)  # 1 where nobody joins
    share = tl.where(itself, share, tl.div_rn(1.0 - share, tl.maximum(many, 1.0)))
    tl.store(survivor + e, anchor, mask=inside)
    tl.store(source + e, tl.where(itself, anchor, token), mask=inside)
    tl.store(weight + e, share, mask=inside)
