"""Greedy MAP by Triton: one program a segment makes 32 picks a launch, all in fp64.

The program keeps what is left of every token in registers. A pick takes a row of the kernel, the rows of the picks made
in the same launch, and two reductions: no launch and no wait for the host. After 32 picks all of the kernel loses what
they span by one product of matrices, so that a pick never reads more than 32 earlier rows; one multiprocessor could not
read the hundreds that 30 % of a segment are. The arithmetic is naive.py's in another order, rounded to fp64, and gains
within its TIED are equal: picks are the same. Segments too long for full kernels are solved as in torch.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from vidcompress.ops.dpp_map import torch as fast
from vidcompress.ops.dpp_map.naive import TIED
from vidcompress.ops.launch import launch

PANEL = 32
"""Picks a launch."""

KERNEL_ELEMENTS = 1 << 27
"""Elements of full kernels that exist at once: 1 GiB, because segments solved together take the time of one."""


def dpp_map(
    tokens: Tensor,
    log_relevance: Tensor,
    sizes: Sequence[int],
    counts: Sequence[int],
    rank_eps: float = 1e-6,
    kernel: Literal["dot", "cosine"] = "dot",
) -> Tensor:
    return fast.solve(tokens, log_relevance, sizes, counts, rank_eps, kernel, together, KERNEL_ELEMENTS)


def together(segments: list[fast.Segment], rank_eps: float, kind: str) -> list[Tensor]:
    """Greedy on the full kernels of several segments at once, shorter ones padded with tokens that are exhausted."""
    kernel, relevance = fast.kernels(segments, kind)
    n, steps = relevance.shape[1], max(count for _, _, count in segments)
    left = kernel.diagonal(dim1=1, dim2=2).clone()  # [B, n] what the picks leave of a token, relevance aside
    limit = rank_eps * left
    panel = torch.empty(len(segments), PANEL, n, dtype=torch.float64, device=kernel.device)
    # When a token's turn comes: by relevance after all steps, unless a step picks it.
    turn = steps + relevance.argsort(dim=1, descending=True, stable=True).argsort(1)
    block = max(16, triton.next_power_of_2(n))
    for step in range(0, steps, PANEL):
        if step:
            kernel.baddbmm_(panel.transpose(1, 2), panel, alpha=-1)
        launch(
            _picks, (len(segments),), kernel, relevance, limit, left, panel, turn, step, min(PANEL, steps - step), n,
            TIED=TIED, PANEL=PANEL, ROWS=8, B=block, num_warps=16 if block > 1024 else 4,
        )  # fmt: skip
    order = turn.argsort(1)
    return [order[b, :count] for b, (_, _, count) in enumerate(segments)]


@triton.jit
def _picks(
    kernel, relevance, limit, left, panel, turn, step, count, n,
    TIED: tl.constexpr, PANEL: tl.constexpr, ROWS: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    segment = tl.program_id(0).to(tl.int64)
    j = tl.arange(0, B)
    inside = j < n
    kernel += segment * n * n
    panel += segment * PANEL * n
    own = tl.load(relevance + segment * n + j, mask=inside, other=-float("inf"))
    least = tl.load(limit + segment * n + j, mask=inside, other=0.0)
    rest = tl.load(left + segment * n + j, mask=inside, other=0.0)
    for t in range(count):
        rest = tl.where(rest <= least, 0.0, rest)
        gain = tl.where(rest > 0, 2 * own + tl.log(tl.where(rest > 0, rest, 1.0)), -float("inf"))
        best = tl.max(gain, 0)
        alive = best > -float("inf")
        pick = tl.min(tl.where(gain >= best - TIED, j, B - 1), 0)
        value = tl.where(alive, tl.sum(tl.where(j == pick, rest, 0.0), 0), 1.0)
        row = tl.load(kernel + pick.to(tl.int64) * n + j, mask=inside, other=0.0)
        for first in range(0, t, ROWS):
            r = first + tl.arange(0, ROWS)
            earlier = tl.load(panel + r[:, None] * n + j[None, :], mask=(r < t)[:, None] & inside[None, :], other=0.0)
            share = tl.load(panel + r * n + pick, mask=r < t, other=0.0)
            row -= tl.sum(earlier * share[:, None], 0)
        row = tl.where(alive, row / tl.sqrt(value), 0.0)
        tl.store(panel + t * n + j, row, mask=inside)
        tl.debug_barrier()  # the next picks read this row, each thread all of it
        rest = tl.where(j == pick, 0.0, rest - row * row)  # once none is alive none ever is again
        tl.store(turn + segment * n + pick, (step + t).to(tl.int64), mask=alive)
    tl.store(left + segment * n + j, rest, mask=inside)
