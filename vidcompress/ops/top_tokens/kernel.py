"""Picking the highest scores by Triton: one program a row counts how many come before each score, and sorts nothing."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vidcompress.ops.launch import launch, rows_contiguous
from vidcompress.ops.top_tokens import torch as fast

LONGEST = 4096
"""Scores a row beyond which sorting is faster than comparing all with all."""


def top_tokens(scores: Tensor, counts: Tensor | int, lowest: bool = False) -> Tensor:
    rows, n = scores.shape
    if n > LONGEST or not rows:
        return fast.top_tokens(scores, counts, lowest)
    scores, block = rows_contiguous(scores), max(32, triton.next_power_of_2(n))
    out = torch.empty(rows, n, dtype=torch.bool, device=scores.device)
    limits, limit = (counts.to(scores.device, non_blocking=True), 0) if isinstance(counts, Tensor) else (scores, counts)
    launch(
        _top, (rows,), scores, limits, out.view(torch.uint8), limit, n, scores.stride(0),
        EACH=isinstance(counts, Tensor), LOWEST=lowest, B=block, CHUNK=max(1, min(32, 8192 // block)), num_warps=8,
    )  # fmt: skip
    return out


@triton.jit
def _comparable(scores, LOWEST: tl.constexpr):
    """Scores of which the highest are wanted; infinity for what is not a number."""
    scores = -scores if LOWEST else scores
    return tl.where(scores == scores, scores, float("inf")) if scores.dtype.is_floating() else scores


@triton.jit
def _rank(scores, own, i, n, LOWEST: tl.constexpr, B: tl.constexpr, CHUNK: tl.constexpr):
    """[B] how many of a row's n scores come before `own`, the scores at i: higher, or equal and at a lower index."""
    before = tl.full((B,), 0, tl.int32)
    for first in range(0, n, CHUNK):
        j = first + tl.arange(0, CHUNK)
        other = _comparable(tl.load(scores + j, mask=j < n, other=0.0), LOWEST)
        earlier = other[None, :] > own[:, None]
        earlier = earlier | ((other[None, :] == own[:, None]) & (j[None, :] < i[:, None]))
        before += tl.sum((earlier & (j < n)[None, :]).to(tl.int32), 1)
    return before


@triton.jit
def _top(
    scores, limits, out, limit, n, stride,
    EACH: tl.constexpr, LOWEST: tl.constexpr, B: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, B)
    own = _comparable(tl.load(scores + row * stride + i, mask=i < n, other=0.0), LOWEST)
    if EACH:
        limit = tl.load(limits + row)
    chosen = _rank(scores + row * stride, own, i, n, LOWEST, B, CHUNK) < limit
    tl.store(out + row * n + i, chosen.to(tl.uint8), mask=i < n)
