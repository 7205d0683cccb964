"""The pool by torch.py, but for who comes first within a block, which one Triton program decides: a few rows at once,
all before them being decided.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vidcompress.ops.launch import launch
from vidcompress.ops.retention_pool import torch as fast


def retention_pool(tokens: Tensor, order: Tensor, threshold: float, size: int) -> Tensor:
    return fast.pooled(tokens, order, threshold, size, first_come)


def first_come(alike: Tensor) -> Tensor:
    """`first_come` of torch.py by one launch."""
    count = len(alike)
    accepted = torch.zeros(count, dtype=torch.bool, device=alike.device)
    launch(
        _first_come, (min(1, count),), alike.contiguous().view(torch.uint8), accepted.view(torch.uint8), count,
        R=32, B=max(32, triton.next_power_of_2(count)), num_warps=8,
    )  # fmt: skip
    return accepted


@triton.jit
def _first_come(alike, accepted, count, R: tl.constexpr, B: tl.constexpr):
    j, s = tl.arange(0, B), tl.arange(0, R)
    for first in range(0, count, R):
        i = first + s
        row = alike + i.to(tl.int64)[:, None] * count
        taken = tl.load(accepted + j, mask=j < first, other=0)
        before = tl.load(row + j[None, :], mask=(i < count)[:, None] & (j < first)[None, :], other=0)
        open = (i < count) & (tl.max((before & taken[None, :]).to(tl.int32), 1) == 0)
        # Of these some keep others out: in is who is like nobody that is still open, out who is like one that is in.
        among = tl.load(row + i[None, :], mask=(i < count)[:, None] & (i < count)[None, :], other=0) != 0
        inside = i < 0
        while tl.max(open.to(tl.int32), 0) > 0:
            sure = open & (tl.max((among & open[None, :]).to(tl.int32), 1) == 0)
            inside = inside | sure
            open = open & (sure == 0) & (tl.max((among & inside[None, :]).to(tl.int32), 1) == 0)
        tl.store(accepted + i, inside.to(tl.uint8), mask=i < count)
        tl.debug_barrier()  # the next rows read what others wrote
