"""Frame by frame selection by Triton: one program a segment, all segments in one launch.

What was picked before stays in registers. A position's rank is the number of positions with a higher score, or an equal
one and a lower index; those of rank below the frame's count are picked, which is what sorting does, to the last bit.
Without scores for what comes again a score's bits are compared, as a whole number that is less for what comes later.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from vidcompress.ops.launch import launch
from vidcompress.ops.select_in_turn import torch as fast
from vidcompress.ops.table import table
from vidcompress.ops.top_tokens.kernel import _comparable, _rank


def select_in_turn(
    scores: Tensor,
    again: tuple[float, float] | None,
    segments: Sequence[tuple[int, int]],
    static: Tensor,
    counts: Tensor,
) -> tuple[Tensor, Tensor]:
    if again is None and scores.dtype == torch.float64:  # of which no whole number has room for the bits and more
        return fast.select_in_turn(scores, again, segments, static, counts)
    scores, static = scores.contiguous(), static.contiguous()
    positions, device = scores.shape[1], scores.device
    picked, repeated = (torch.empty(scores.shape, dtype=torch.bool, device=device) for _ in range(2))
    spans = table(segments, device, torch.int32).view(-1, 2)
    block = max(32, triton.next_power_of_2(positions))
    value = torch.empty(scores.shape, dtype=torch.int64 if again is None else torch.float64, device=device)
    launch(
        _select, (len(segments),), scores, spans,
        static.view(torch.uint8), counts.to(device, torch.int32, non_blocking=True), value,
        picked.view(torch.uint8), repeated.view(torch.uint8), positions,
        AGAIN=again, B=block, CHUNK=max(1, min(32, 8192 // block)), num_warps=8, num_stages=1,
    )  # fmt: skip
    return picked, repeated


@triton.jit
def _select(
    scores, spans, static, counts, value, picked, repeated, positions,
    AGAIN: tl.constexpr, B: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    segment = tl.program_id(0)
    start, end = tl.load(spans + 2 * segment), tl.load(spans + 2 * segment + 1)
    i = tl.arange(0, B)
    inside = i < positions
    fixed = tl.load(static + segment.to(tl.int64) * positions + i, mask=inside, other=0) != 0
    before = i < 0
    for step in range(0, end - start):
        frame = start.to(tl.int64) + step
        row = frame * positions
        own = _comparable(tl.load(scores + row + i, mask=inside, other=0.0), False)
        if AGAIN is None:
            own = own.to(tl.float32)
            bits = tl.where(own == 0, 0.0, own).to(tl.int32, bitcast=True)  # -0 becomes 0
            bits = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64)  # in the order of the scores
            later = tl.where(own == -float("inf"), 2, before.to(tl.int32)).to(tl.int64)
            own = bits - later * 8589934592
        else:
            own = own.to(tl.float64)
            second = own * tl.full((), AGAIN[0], tl.float64) - tl.full((), AGAIN[1], tl.float64)
            own = _comparable(tl.where(before, second, own), False)
        tl.store(value + row + i, own, mask=inside)
        tl.debug_barrier()  # every thread reads what others wrote
        now = inside & (_rank(value + row, own, i, positions, False, B, CHUNK) < tl.load(counts + frame))
        before = before | (now & fixed)
        tl.store(picked + row + i, now.to(tl.uint8), mask=inside)
        tl.store(repeated + row + i, before.to(tl.uint8), mask=inside)
