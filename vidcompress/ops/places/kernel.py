"""Listing marks by Triton: one program a row, which knows where in the list its own begin."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
import triton
import triton.language as tl
from torch import Tensor

from vidcompress.ops.launch import launch
from vidcompress.ops.table import table


def places(marks: Tensor, counts: Sequence[int]) -> Tensor:
    ends = table([0, *accumulate(counts)], marks.device)
    out = torch.empty(sum(counts), dtype=torch.long, device=marks.device)
    launch(_list, (len(marks),), marks.contiguous().view(torch.uint8), ends, out, marks.shape[1], B=1024, num_warps=4)
    return out


@triton.jit
def _list(marks, ends, out, n, B: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    to, end = tl.load(ends + row), tl.load(ends + row + 1)
    for start in range(0, n, B):
        i = start + tl.arange(0, B)
        mark = tl.load(marks + row * n + i, mask=i < n, other=0).to(tl.int64)
        place = to + tl.cumsum(mark, 0) - 1
        tl.store(out + place, row * n + i, mask=(mark != 0) & (place < end))
        to += tl.sum(mark, 0)
