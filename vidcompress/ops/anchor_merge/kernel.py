"""Merging into anchors by Triton: one launch compares the tokens of every frame with all anchors that reach it.

A program takes some tokens of a frame and the anchors of one row, which it goes through a few at a time; it writes down
which is the most similar, and that one more token joins it. Products are fp32 (three TF32 ones).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from vidcompress.ops.anchor_merge import torch as fast
from vidcompress.ops.launch import launch, rows_contiguous


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
    widest, joined, source = max(counts), [], []
    _, centre, unit = fast.peaks(frames, anchors, rows, widest)
    count = torch.zeros(centre.numel(), dtype=torch.int32, device=device)
    # What is compared: the tokens of a frame with a row of so many anchors, of that frame's own or not.
    pairs = [(f, r, counts[g], f == g and not anchors_join) for r, g in enumerate(rows) for f in range(*reach[g])]
    for some in torch.tensor(pairs).split(max(1, fast.CHUNK_ELEMENTS // p)):
        table = some.to(device)
        slot = choose(frames, unit, members, anchors, table, count)
        pair, place = (slot >= 0).nonzero(as_tuple=True)
        joined.append(slot[pair, place])
        source.append(table[pair, 0] * p + place)
    slot, token = (parts[0] if len(parts) == 1 else torch.cat(parts) for parts in (joined, source))
    return fast.triplets(rows, counts, centre, slot, token, count, anchor_weight)


def choose(frames: Tensor, unit: Tensor, members: Tensor, anchors: Tensor, table: Tensor, count: Tensor) -> Tensor:
    """Which anchor every token joins, by one kernel.

    Args:
        frames: [T, P, C].
        unit: [R, A, C] fp32 anchors, normalised.
        members, anchors: [T, P] bool.
        table: [n, 4] frame, row, anchors of that row, and whether anchors of the frame stay away.
        count: [R * A] int32, to which the tokens that join are added.

    Returns:
        [n, P] row * A + anchor, or -1 for a token that joins none.
    """
    (p, channels), widest = frames.shape[1:], unit.shape[1]
    members, anchors = (x.contiguous().view(torch.uint8) for x in (members, anchors))
    slot = torch.empty(len(table), p, dtype=torch.long, device=frames.device)
    launch(
        _join, (len(table), triton.cdiv(p, 64)), frames, unit, members, anchors, table, slot, count,
        p, channels, widest, frames.stride(0), frames.stride(1),
        BM=64, BA=max(16, min(64, triton.next_power_of_2(widest))), BK=32, num_warps=4,
    )  # fmt: skip
    return slot


@triton.jit
def _join(
    frames, unit, members, anchors, table, slot, count, p, channels, widest, frame_stride, stride,
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
        product = tl.full((BM, BA), 0.0, tl.float32)
        for start in range(0, channels, BK):
            k = start + tl.arange(0, BK)
            seen = (i < p)[:, None] & (k < channels)[None, :]
            x = tl.load(frames + frame * frame_stride + i[:, None] * stride + k[None, :], mask=seen, other=0.0)
            seen = (a < many)[:, None] & (k < channels)[None, :]
            y = tl.load(unit + (row * widest + a)[:, None] * channels + k[None, :], mask=seen, other=0.0)
            product = tl.dot(x.to(tl.float32), tl.trans(y), product, input_precision="tf32x3")
        product = tl.where((a < many)[None, :], product, -float("inf"))
        top = tl.max(product, 1)
        name = tl.min(tl.where(product == top[:, None], a[None, :], widest), 1)
        choice = tl.where(top > best, name, choice)
        best = tl.maximum(best, top)
    joins = tl.load(members + frame * p + i, mask=i < p, other=0) != 0
    anchor = tl.load(anchors + frame * p + i, mask=i < p, other=0) != 0
    joins = joins & ((anchor & (own != 0)) == 0)
    tl.store(slot + pair * p + i, tl.where(joins, row * widest + choice, -1), mask=i < p)
    tl.atomic_add(count + row * widest + choice, 1, mask=joins & (i < p))
