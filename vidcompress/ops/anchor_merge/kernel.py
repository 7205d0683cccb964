"""Merging into anchors by Triton: two kernels for a video, and one that lists who joins (one more of each for every 16
million pairs of a token and a row of anchors). The host waits only if it does not know the members of every frame.

A program of the first takes some tokens of a frame and the anchors of one, which it goes through a few at a time; it
writes down which is the most similar, and that one more token joins it. Products are fp32 (three TF32 ones). The second
writes the triplets.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
import triton
import triton.language as tl
from torch import Tensor

from vidcompress.ops.anchor_merge import torch as fast
from vidcompress.ops.launch import INTERPRETED, launch, rows_contiguous
from vidcompress.ops.places.kernel import places
from vidcompress.ops.table import table

TRIPLETS = 1 << 16 if INTERPRETED else 1024
"""Triplets a program writes: the interpreter takes as long for few as for many."""


def anchor_merge(
    frames: Tensor,
    members: Tensor,
    anchors: Tensor,
    counts: Sequence[int],
    reach: Sequence[tuple[int, int]],
    anchor_weight: float,
    anchors_join: bool = True,
    member_counts: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    frames, p, device = rows_contiguous(frames), frames.shape[1], frames.device
    if not any(counts):
        return fast.nothing(device)
    centre, first = places(anchors, counts), [0, *accumulate(counts)]  # [A] all anchors, where each frame's begin
    members, anchors = (x.contiguous().view(torch.uint8) for x in (members, anchors))
    # What is compared: the tokens of a frame with the anchors of one, of the same or not.
    pairs = [
        (f, first[g], many, f == g and not anchors_join)
        for g, many in enumerate(counts)
        for f in range(*reach[g])
        if many
    ]
    count = torch.zeros(len(centre), dtype=torch.int32, device=device)
    parts = []
    step = max(1, fast.CHUNK_ELEMENTS // p)
    for start, some in zip(range(0, len(pairs), step), table(pairs, device).view(-1, 4).split(step), strict=True):
        slot, joins = choose(frames, centre, members, anchors, some, max(counts), count)
        if member_counts is None:
            found = joins.nonzero().squeeze(1)
        else:
            each = [member_counts[f] - many * alone for f, _, many, alone in pairs[start : start + step]]
            found = places(joins.view(-1, p), each)
        parts.append((some, slot, found))
    # An anchor's own triplet comes first.
    ends = [*accumulate((len(found) for _, _, found in parts), initial=len(centre))]
    survivor, source = (torch.empty(ends[-1], dtype=torch.long, device=device) for _ in range(2))
    weight = torch.empty(ends[-1], dtype=torch.float32, device=device)
    for part, (some, slot, found) in enumerate(parts):
        start, alone = (ends[part], 0) if part else (0, len(centre))
        out = (x[start : ends[part + 1]] for x in (survivor, source, weight))
        total = alone + len(found)
        launch(
            _triplets, (triton.cdiv(total, TRIPLETS),), found, some, slot, centre, count, *out,
            alone, total, p, float(anchor_weight), B=TRIPLETS, num_warps=4,
        )  # fmt: skip
    return survivor, source, weight


def choose(
    frames: Tensor, centre: Tensor, members: Tensor, anchors: Tensor, pairs: Tensor, most: int, count: Tensor
) -> tuple[Tensor, Tensor]:
    """Which anchor every token joins, by one kernel.

    Args:
        frames: [T, P, C].
        centre: [A] flat indices of all anchors.
        members, anchors: [T, P] uint8, 1 or 0.
        pairs: [n, 4] frame, first anchor and how many, at most `most`, and whether anchors of the frame stay away.
        count: [A] int32, to which the tokens that join are added.

    Returns:
        Two [n * P]: the number of the anchor in int32, and whether the token joins it.
    """
    p, channels = frames.shape[1:]
    slot = torch.empty(len(pairs) * p, dtype=torch.int32, device=frames.device)
    joins = torch.empty(len(pairs) * p, dtype=torch.bool, device=frames.device)
    launch(
        _join, (len(pairs), triton.cdiv(p, 64)), frames, centre, members, anchors, pairs, slot, joins.view(torch.uint8),
        count, p, channels, frames.stride(0), frames.stride(1),
        BM=64, BA=max(16, min(64, triton.next_power_of_2(most))), BK=32, num_warps=4,
    )  # fmt: skip
    return slot, joins


@triton.jit
def _join(
    frames, centre, members, anchors, pairs, slot, joined, count, p, channels, frame_stride, stride,
    BM: tl.constexpr, BA: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    pair = tl.program_id(0).to(tl.int64)
    frame, anchor = tl.load(pairs + 4 * pair), tl.load(pairs + 4 * pair + 1)
    many, own = tl.load(pairs + 4 * pair + 2), tl.load(pairs + 4 * pair + 3)
    i = tl.program_id(1).to(tl.int64) * BM + tl.arange(0, BM)
    best = tl.full((BM,), -float("inf"), tl.float32)
    choice = tl.full((BM,), 0, tl.int64)
    for first in range(0, many, BA):
        a = first + tl.arange(0, BA)
        at = tl.load(centre + anchor + a, mask=a < many, other=0)
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
        name = tl.min(tl.where(product == top[:, None], a[None, :], many), 1)
        choice = tl.where(top > best, name, choice)
        best = tl.maximum(best, top)
    joins = tl.load(members + frame * p + i, mask=i < p, other=0) != 0
    is_anchor = tl.load(anchors + frame * p + i, mask=i < p, other=0) != 0
    joins = joins & ((is_anchor & (own != 0)) == 0)
    to = anchor + choice
    tl.store(slot + pair * p + i, to.to(tl.int32), mask=i < p)
    tl.store(joined + pair * p + i, joins.to(tl.uint8), mask=i < p)
    tl.atomic_add(count + to, 1, mask=joins & (i < p))


@triton.jit
def _triplets(found, pairs, slot, centre, count, survivor, source, weight, alone, total, p, least, B: tl.constexpr):
    """First the `alone` triplets of the anchors themselves, then those of the tokens that join, at places `found` of
    `slot`."""
    e = tl.program_id(0) * B + tl.arange(0, B)
    joins = (e >= alone) & (e < total)
    at = tl.load(found + e - alone, mask=joins, other=0)
    to = tl.where(joins, tl.load(slot + at, mask=joins, other=0), e)
    anchor = tl.load(centre + to, mask=e < total, other=0)
    token = tl.load(pairs + 4 * (at // p), mask=joins, other=0) * p + at % p
    many = tl.load(count + to, mask=e < total, other=0).to(tl.float32)
    own = tl.maximum(tl.div_rn(1.0, many + 1.0), least)  # 1 where nobody joins
    share = tl.div_rn(1.0 - own, tl.maximum(many, 1.0))
    tl.store(survivor + e, anchor, mask=e < total)
    tl.store(source + e, tl.where(joins, token, anchor), mask=e < total)
    tl.store(weight + e, tl.where(joins, share, own), mask=e < total)
