"""Checking a sparse map by Triton, in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vidcompress.ops.launch import INTERPRETED, launch

ENTRIES = 1 << 16 if INTERPRETED else 1024
"""Entries of a program: the interpreter takes as long for few as for many."""


def breaches(keep: Tensor, slot: Tensor, source: Tensor, weight: Tensor, num_source: int) -> Tensor:
    out = torch.zeros((), dtype=torch.long, device=keep.device)
    keep, slot, source, weight = (x.contiguous() for x in (keep, slot, source, weight))
    longest = max(len(keep), len(slot))
    launch(
        _breaches, (triton.cdiv(longest, ENTRIES),), keep, slot, source, weight, out, len(keep), len(slot), num_source,
        B=ENTRIES, num_warps=4,
    )  # fmt: skip
    return out


@triton.jit
def _breaches(keep, slot, source, weight, out, kept, triplets, num_source, B: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    own = tl.load(keep + i, mask=i < kept, other=0)
    before = tl.load(keep + i - 1, mask=(i > 0) & (i < kept), other=-1)
    wrong = (i < kept) & ((own <= before) | (own < 0) | (own >= num_source))
    to = tl.load(slot + i, mask=i < triplets, other=0)
    token = tl.load(source + i, mask=i < triplets, other=0)
    share = tl.load(weight + i, mask=i < triplets, other=0.0)
    mixed = (to < 0) | (to >= kept) | (token < 0) | (token >= num_source) | ((tl.abs(share) < float("inf")) == 0)
    number = tl.sum(wrong.to(tl.int64), 0) + tl.sum((mixed & (i < triplets)).to(tl.int64), 0)
    tl.atomic_add(out, number, mask=number > 0)
