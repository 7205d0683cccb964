"""Entropies by torch.py's determinants, what lies between the products and factors of matrices by Triton: fp64 rows of
segments of different lengths, traces and squared norms of their products, copies of these shifted to every place, the
volumes of their factors, and what follows from all that.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from vidcompress.ops.launch import INTERPRETED, launch
from vidcompress.ops.spectral_entropies import torch as fast
from vidcompress.ops.spectral_entropy.determinants import LINEAR, SQUARE, factored, places, places_at_once
from vidcompress.ops.spectral_entropy.torch import gram_of
from vidcompress.ops.table import table

BLOCK = 1 << 20 if INTERPRETED else 4096
"""Most elements of a program: the interpreter takes as long for few as for many."""


def spectral_entropies(tokens: Tensor, segments: Sequence[tuple[int, int]]) -> Tensor:
    (_, p, channels), flat, device = tokens.shape, tokens.flatten(0, 1), tokens.device
    sizes = [(end - start) * p for start, end in segments]
    groups = [*fast.groups(sizes, channels)]
    some = sum(map(len, groups)) < len(segments)  # with nothing to spread
    out = (torch.zeros if some else torch.empty)(len(segments), dtype=torch.float64, device=device)
    for group in groups:
        spans = [(segments[k][0] * p, sizes[k]) for k in group]
        if sizes[group[0]] > channels:
            gram = torch.stack([gram_of(flat[start : start + size]) for start, size in spans])
        else:
            rows = rows_of(flat, spans)
            gram = rows @ rows.mT
            del rows
        finish(gram, [(k, min(sizes[k], channels)) for k in group], out)
    return out


def rows_of(flat: Tensor, spans: list[tuple[int, int]]) -> Tensor:
    """[B, n, C] fp64: the tokens from `start` on, `size` of them, and zeros up to the most of any."""
    most, channels = max(size for _, size in spans), flat.shape[1]
    out = torch.empty(len(spans), most, channels, dtype=torch.float64, device=flat.device)
    size, where = block_of(most * channels), table(spans, flat.device)
    grid = (len(spans), triton.cdiv(most * channels, size))
    launch(_rows, grid, flat, where, out, most * channels, channels, *flat.stride(), B=size, num_warps=4)
    return out


def block_of(elements: int) -> int:
    """Elements of a program, of so many."""
    return min(BLOCK, max(128, triton.next_power_of_2(elements)))


def finish(gram: Tensor, group: list[tuple[int, int]], out: Tensor) -> None:
    """Entropies of Gram matrices [B, n, n] to places of `out`; `group` has these places and the matrices' ranks."""
    count, n, _ = gram.shape
    size, at = block_of(n * n), places(gram.device)
    many, step, blocks = at.shape[1], places_at_once(gram), triton.cdiv(n * n, size)
    width = triton.next_power_of_2(blocks)
    sums = torch.empty(count, blocks, 2, dtype=torch.float64, device=gram.device)
    launch(_sums, (count, blocks), gram, sums, n, blocks, B=size, num_warps=4)
    volume = torch.empty(count, many, dtype=torch.float64, device=gram.device)
    for first in range(0, many, step):
        here = min(step, many - first)
        shifted = torch.empty(count, here, n, n, dtype=gram.dtype, device=gram.device)
        launch(_shift, (count, here, blocks), gram, sums, at, shifted, first, n, blocks, W=width, B=size, num_warps=4)
        factor = factored(shifted)
        launch(
            _volume, (count, here), factor, volume, first, n, many, *factor.stride()[1:],
            B=min(1024, triton.next_power_of_2(n)), num_warps=4,
        )  # fmt: skip
    launch(
        _entropy, (count,), sums, at, volume, table(group, gram.device), out, n, blocks, many,
        LINEAR=LINEAR, SQUARE=SQUARE, W=width, M=triton.next_power_of_2(many), num_warps=4,
    )  # fmt: skip


@triton.jit
def _rows(flat, where, out, count, channels, stride, step, B: tl.constexpr):
    one = tl.program_id(0).to(tl.int64)
    e = tl.program_id(1).to(tl.int64) * B + tl.arange(0, B)
    start, size = tl.load(where + 2 * one), tl.load(where + 2 * one + 1)
    row = e // channels
    x = tl.load(flat + (start + row) * stride + e % channels * step, mask=row < size, other=0.0)
    tl.store(out + one * count + e, x.to(tl.float64), mask=e < count)


@triton.jit
def _sums(gram, sums, n, blocks, B: tl.constexpr):
    """A block's part of the trace and of the squared norm."""
    one, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    e = block.to(tl.int64) * B + tl.arange(0, B)
    x = tl.load(gram + one * n * n + e, mask=e < n * n, other=0.0)
    to = sums + (one * blocks + block) * 2
    tl.store(to, tl.sum(tl.where(e // n == e % n, x, 0.0), 0))
    tl.store(to + 1, tl.sum(x * x, 0))


@triton.jit
def _sum(sums, one, which, blocks, W: tl.constexpr):
    i = tl.arange(0, W)
    return tl.sum(tl.load(sums + (one * blocks + i) * 2 + which, mask=i < blocks, other=0.0), 0)


@triton.jit
def _shift(gram, sums, at, shifted, first, n, blocks, W: tl.constexpr, B: tl.constexpr):
    one, place, here = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    e = tl.program_id(2).to(tl.int64) * B + tl.arange(0, B)
    norm = tl.maximum(tl.sqrt(_sum(sums, one, 1, blocks, W)), 1e-300)
    x = tl.load(gram + one * n * n + e, mask=e < n * n, other=0.0)
    x += tl.where(e // n == e % n, norm * tl.load(at + first + place), 0.0)
    tl.store(shifted + (one * here + place) * n * n + e, x, mask=e < n * n)


@triton.jit
def _volume(factor, volume, first, n, count, stride, row, column, B: tl.constexpr):
    one, place, here = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    base = factor + (one * here + place) * stride
    total = tl.full((B,), 0.0, tl.float64)
    for start in range(0, n, B):
        i = start + tl.arange(0, B)
        total += tl.log(tl.load(base + i.to(tl.int64) * (row + column), mask=i < n, other=1.0))
    tl.store(volume + one * count + first + place, 2 * tl.sum(total, 0))


@triton.jit
def _entropy(
    sums, at, volume, group, out, n, blocks, count,
    LINEAR: tl.constexpr, SQUARE: tl.constexpr, W: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    one = tl.program_id(0).to(tl.int64)
    square = _sum(sums, one, 1, blocks, W)
    norm = tl.maximum(tl.sqrt(square), 1e-300)
    total = _sum(sums, one, 0, blocks, W) / norm
    i = tl.arange(0, M)
    shift = norm * tl.load(at + i, mask=i < count, other=1.0)
    weight = tl.load(at + count + i, mask=i < count, other=0.0)
    grown = tl.load(volume + one * count + i, mask=i < count, other=0.0) - n * tl.log(shift)
    spread = tl.full((), LINEAR, tl.float64) * total + tl.full((), SQUARE, tl.float64) * (square / norm / norm)
    spread += tl.sum(grown * weight, 0)  # of x log x, x being an eigenvalue relative to the norm
    positive = tl.maximum(total, 1e-300)
    share = (tl.log(positive) - spread / positive) / tl.log(tl.load(group + 2 * one + 1).to(tl.float64))
    share = tl.minimum(tl.maximum(tl.where(total > 0, share, 0.0), 0.0), 1.0)
    tl.store(out + tl.load(group + 2 * one), share)
