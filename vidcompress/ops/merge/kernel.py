"""Merging by Triton: a program sums the triplets of one slot, in their order, a few tokens at a time.

The triplets of a slot lie side by side once all are sorted, and it looks for where they begin: the host waits
for nothing. Sums are fp32 and in one order, however often it runs. Where gradients are wanted torch.py has them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vidcompress.ops.kernel_bisect import _first_not_before
from vidcompress.ops.launch import launch, rows_contiguous
from vidcompress.ops.merge import torch as fast


def merge(features: Tensor, keep: Tensor, slot: Tensor, source: Tensor, weight: Tensor) -> Tensor:
    if torch.is_grad_enabled() and (features.requires_grad or weight.requires_grad):
        return fast.merge(features, keep, slot, source, weight)
    features, channels = rows_contiguous(features), features.shape[1]
    slot, order = slot.sort(stable=True)
    out = torch.empty(len(keep), channels, dtype=features.dtype, device=features.device)
    launch(
        _merge, (len(keep), triton.cdiv(channels, 256)), features, keep.contiguous(), slot, order,
        source.contiguous(), weight.contiguous(), out, len(slot), len(slot).bit_length(), channels, features.stride(0),
        ROWS=16, BK=256, num_warps=4,
    )  # fmt: skip
    return out


@triton.jit
def _merge(
    features, keep, slots, order, source, weight, out, count, steps, channels, stride,
    ROWS: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    slot, k = tl.program_id(0).to(tl.int64), tl.program_id(1) * BK + tl.arange(0, BK)
    none, every = slot * 0, slot * 0 + count
    start = _first_not_before(slots, slot, none, every, steps, False)
    end = _first_not_before(slots, slot + 1, start, every, steps, False)
    inside = k < channels
    to = out + slot * channels + k
    if start == end:
        own = tl.load(keep + slot)
        tl.store(to, tl.load(features + own * stride + k, mask=inside, other=0.0), mask=inside)
    else:
        total = tl.full((BK,), 0.0, tl.float32)
        for step in range(start, end, ROWS):
            e = step + tl.arange(0, ROWS)
            place = tl.load(order + e, mask=e < end, other=0)
            row = tl.load(source + place, mask=e < end, other=0)
            share = tl.load(weight + place, mask=e < end, other=0.0).to(tl.float32)
            at = row[:, None] * stride + k[None, :]
            x = tl.load(features + at, mask=(e < end)[:, None] & inside[None, :], other=0.0).to(tl.float32)
            total += tl.sum(share[:, None] * x, 0)
        tl.store(to, total.to(out.dtype.element_ty), mask=inside)
