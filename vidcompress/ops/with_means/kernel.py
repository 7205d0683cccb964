"""Segment means by Triton: a program reads some channels of a position in all frames of a segment, and writes them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from vidcompress.ops.launch import INTERPRETED, launch, rows_contiguous
from vidcompress.ops.table import table

POSITIONS = 64 if INTERPRETED else 1
"""Positions of a program: the interpreter takes as long for one as for many."""


def with_means(tokens: Tensor, replaced: Tensor, segments: Sequence[tuple[int, int]]) -> Tensor:
    tokens, (_, positions, channels) = rows_contiguous(tokens), tokens.shape
    out = torch.empty(tokens.shape, dtype=torch.float32, device=tokens.device)
    spans = table(segments, tokens.device)
    launch(
        _means, (triton.cdiv(positions, POSITIONS), len(segments), triton.cdiv(channels, 512)), tokens, spans,
        replaced.contiguous().view(torch.uint8), out, positions, channels, tokens.stride(0), tokens.stride(1),
        R=POSITIONS, BK=512, num_warps=4,
    )  # fmt: skip
    return out


@triton.jit
def _means(tokens, spans, replaced, out, positions, channels, frame_stride, stride, R: tl.constexpr, BK: tl.constexpr):
    i, k = tl.program_id(0) * R + tl.arange(0, R), tl.program_id(2) * BK + tl.arange(0, BK)
    start, end = tl.load(spans + 2 * tl.program_id(1)), tl.load(spans + 2 * tl.program_id(1) + 1)
    inside = (i < positions)[:, None] & (k < channels)[None, :]
    base = tokens + i.to(tl.int64)[:, None] * stride + k[None, :]
    total = tl.full((R, BK), 0.0, tl.float32)
    for frame in range(start, end):
        total += tl.load(base + frame * frame_stride, mask=inside, other=0.0).to(tl.float32)
    mean = tl.div_rn(total, (end - start).to(tl.float32))
    for frame in range(start, end):
        mark = tl.load(replaced + frame * positions + i, mask=i < positions, other=0) != 0
        own = tl.load(base + frame * frame_stride, mask=inside, other=0.0).to(tl.float32)
        to = out + (frame * positions + i)[:, None] * channels + k[None, :]
        tl.store(to, tl.where(mark[:, None], mean, own), mask=inside)
