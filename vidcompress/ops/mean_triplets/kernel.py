"""Segment means as triplets by Triton: once the host knows how many tokens of each frame are replaced, it knows where
everything goes, and waits no more.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from vidcompress.ops.launch import INTERPRETED, launch
from vidcompress.ops.places.kernel import places
from vidcompress.ops.table import table

TOKENS = 1 << 12 if INTERPRETED else 128
"""Replaced tokens of a program: the interpreter takes as long for few as for many."""


def mean_triplets(replaced: Tensor, segments: Sequence[tuple[int, int]]) -> tuple[Tensor, Tensor, Tensor]:
    p, device = replaced.shape[1], replaced.device
    counts = replaced.sum(1).tolist()
    token = places(replaced, counts)
    rows, before, total = [], 0, 0
    for start, end in segments:
        for frame in range(start, end):
            rows.append((start, end - start, before, total))
            before, total = before + counts[frame], total + counts[frame] * (end - start)
    to, source = (torch.empty(total, dtype=torch.long, device=device) for _ in range(2))
    weight = torch.empty(total, dtype=torch.float32, device=device)
    frames = table(rows, device)
    launch(
        _spread, (triton.cdiv(len(token), TOKENS),), token, frames, to, source, weight, len(token), p,
        B=TOKENS, num_warps=4,
    )  # fmt: skip
    return to, source, weight


@triton.jit
def _spread(token, frames, to, source, weight, count, p, B: tl.constexpr):
    e = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    at = tl.load(token + e, mask=e < count, other=0)
    row = frames + 4 * (at // p)
    start, length = tl.load(row, mask=e < count, other=0), tl.load(row + 1, mask=e < count, other=0)
    first, base = tl.load(row + 2, mask=e < count, other=0), tl.load(row + 3, mask=e < count, other=0)
    out = base + (e - first) * length
    share = tl.div_rn(1.0, tl.maximum(length, 1).to(tl.float32))
    for step in range(0, tl.max(length, 0)):
        tl.store(to + out + step, at, mask=step < length)
        tl.store(source + out + step, (start + step) * p + at % p, mask=step < length)
        tl.store(weight + out + step, share, mask=step < length)
