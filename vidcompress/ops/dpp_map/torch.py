from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from vidcompress.ops.dpp_map.naive import TIED

LONGEST = {"cpu": 256, "cuda": 4096}
"""Segments up to this many tokens are solved together on their full kernels: one set of launches a pick. A longer one
is solved by itself, without its kernel."""

KERNEL_ELEMENTS = 16 << 20
"""Elements of full kernels that exist at once."""

CANDIDATES = (96, 192)
"""Least and most tokens of a long segment among which picks are made before the others learn of it. In between: three
times as many as were picked the last time, because more would be measured in vain."""

MARGIN = 1e-5
"""How far off what is left of a token may be if computed in fp32, relative to the token's own kernel value."""


def dpp_map(
    tokens: Tensor,
    log_relevance: Tensor,
    sizes: Sequence[int],
    counts: Sequence[int],
    rank_eps: float = 1e-6,
    kernel: Literal["dot", "cosine"] = "dot",
) -> Tensor:
    segments = [*zip(tokens.split(list(sizes)), log_relevance.double().split(list(sizes)), counts, strict=True)]
    picked: list[Tensor] = [torch.empty(0, dtype=torch.long, device=tokens.device)] * len(segments)
    longest = LONGEST.get(tokens.device.type, 1024)
    short = [m for m, count in enumerate(counts) if count and sizes[m] <= longest]
    while short:
        fitting = max(1, KERNEL_ELEMENTS // max(sizes[m] for m in short) ** 2)
        group, short = short[:fitting], short[fitting:]
        for m, picks in zip(group, _together([segments[m] for m in group], rank_eps, kernel), strict=True):
            picked[m] = picks
    for m, (h, own, count) in enumerate(segments):
        if count and sizes[m] > longest:
            picked[m] = _Segment(h, own, count, rank_eps, kernel).solve()
    starts = [sum(sizes[:m]) for m in range(len(sizes))]
    return torch.cat(
        [picks + start for picks, start in zip(picked, starts, strict=True)] or [tokens.new_empty(0).long()]
    )


def _together(segments: list[tuple[Tensor, Tensor, int]], rank_eps: float, kind: str) -> list[Tensor]:
    """Greedy on the full kernels of several segments at once, shorter ones padded with tokens that are exhausted."""
    device = segments[0][0].device
    n, steps = max(len(h) for h, _, _ in segments), max(count for _, _, count in segments)
    kernel = torch.zeros(len(segments), n, n, dtype=torch.float64, device=device)
    relevance = torch.full((len(segments), n), -torch.inf, dtype=torch.float64, device=device)
    for b, (h, own, _) in enumerate(segments):
        rows = h.double()
        rows = rows * _scale(rows, kind)
        torch.mm(rows, rows.T, out=kernel[b, : len(h), : len(h)])
        relevance[b, : len(h)] = own
    left = kernel.diagonal(dim1=1, dim2=2).clone()  # [B, n] what the picks leave of a token, relevance aside
    limit = rank_eps * left
    factor = torch.zeros(len(segments), steps, n, dtype=torch.float64, device=device)
    # When a token's turn comes: by relevance after all steps, unless a step picks it.
    turn = steps + relevance.argsort(dim=1, descending=True, stable=True).argsort(1)
    for step in range(steps):
        left.masked_fill_(left <= limit, 0)
        gain = 2 * relevance + left.log()
        best = gain.amax(1, keepdim=True)  # [B, 1]
        pick = gain.clamp(max=best - TIED).argmax(1, keepdim=True)  # argmax takes the first of equals
        value = left.gather(1, pick)
        alive = best > -torch.inf
        every = pick[:, None].expand(-1, -1, n)  # [B, 1, n]
        row = kernel.gather(1, every)
        if step:
            before = factor[:, :step]
            row = row - before.gather(2, every[:, :, :1].expand(-1, step, -1)).transpose(1, 2) @ before
        row = (row[:, 0] * value.rsqrt()).where(alive, 0)
        factor[:, step] = row
        left -= row.square()
        left.scatter_(1, pick, 0)
        turn.scatter_(1, pick, turn.gather(1, pick).where(~alive, step))
    order = turn.argsort(1)
    return [order[b, :count] for b, (_, _, count) in enumerate(segments)]


def _scale(rows: Tensor, kind: str) -> Tensor:
    """[n, 1] what makes the rows' products the kernel, relevance aside."""
    if kind == "dot":
        return torch.full((len(rows), 1), rows.shape[1] ** -0.5, dtype=torch.float64, device=rows.device)
    return 1 / rows.norm(dim=-1, keepdim=True).double().clamp_min(1e-30)


class _Segment:
    """Lazy greedy in a long segment. What is left of tokens only shrinks, and their gains with it, so one that was
    computed before is an upper bound: picks are made among a few candidates, in fp64, while the best of them beats the
    bounds of all others, which then learn of these picks together. The bounds are kept in fp32, with a margin. Where it
    is too wide to tell who is best, or the candidates show that it is too narrow, they are computed again, in fp64.
    """

    def __init__(self, h: Tensor, relevance: Tensor, count: int, rank_eps: float, kind: str) -> None:
        self.h, self.relevance, self.rank_eps, self.kind = h, relevance, rank_eps, kind  # relevance as a logarithm
        self.picks, self.width = 0, CANDIDATES[0]
        self.room = torch.empty(min(len(h), CANDIDATES[1]), h.shape[1], dtype=torch.float64, device=h.device)
        self.order = torch.empty(count, dtype=torch.long, device=h.device)
        self.basis = torch.empty(count, h.shape[1], dtype=torch.float64, device=h.device)  # the picked
        self.corner = torch.zeros(count, count, dtype=torch.float64, device=h.device)  # Cholesky factor of their kernel
        self.measure(torch.float64 if h.dtype == torch.float64 else torch.float32)

    def solve(self) -> Tensor:
        """[count] indices in the order of their picks."""
        while self.picks < len(self.order):
            before = self.picks
            if self.pick():
                if before < self.picks < len(self.order):
                    self.learn(before)
            elif self.margin:
                self.measure(torch.float64)
            else:
                break
        picked = self.order[: self.picks]
        rest = self.relevance.argsort(descending=True, stable=True)
        rest = rest[~torch.isin(rest, picked)]
        return torch.cat([picked, rest[: len(self.order) - self.picks]])

    def measure(self, dtype: torch.dtype) -> None:
        """Computes what is left of all tokens, which from now on is kept up to date by products in `dtype`."""
        self.margin = MARGIN if dtype == torch.float32 else 0.0
        self.rows = self.h.to(dtype)
        self.scale = _scale(self.rows, self.kind)[:, 0].square()
        self.own = self.rows.norm(dim=-1).double().square() * self.scale
        self.left = self.own.masked_fill(self.relevance == -torch.inf, -torch.inf)
        self.factor = torch.empty(len(self.h), len(self.order), dtype=dtype, device=self.h.device)  # not scaled
        self.learn(0)

    def learn(self, before: int) -> None:
        """Takes from all tokens what the picks since `before` span."""
        fresh = self.project(self.rows, self.factor[:, :before])
        self.factor[:, before : self.picks] = fresh
        self.left -= fresh.square().sum(1) * self.scale
        self.left[self.order[: self.picks]] = -torch.inf
        if not self.margin:
            self.left.masked_fill_(self.left <= self.rank_eps * self.own, -torch.inf)

    def project(self, rows: Tensor, factor: Tensor) -> Tensor:
        """[b, picks - m] further columns of the Cholesky factor of `rows` [b, C], of which `factor` holds m."""
        before, new = factor.shape[1], slice(factor.shape[1], self.picks)
        corner = self.corner[new, : self.picks].to(rows.dtype)
        fresh = (rows @ self.basis[new].to(rows.dtype).T).addmm_(factor, corner[:, :before].T, alpha=-1)
        return torch.linalg.solve_triangular(corner[:, before:].T, fresh, upper=True, left=False)

    def pick(self) -> bool:
        """Picks some tokens, or finds some exhausted; False if the gains known can do neither."""
        most = 2 * self.relevance + (self.left + self.margin * self.own).clamp_min(0).log()
        if not self.margin:
            best = most.max()
            if best == -torch.inf:
                return False
            # Of the tied best the lowest index is next: it must be a candidate.
            most[(most >= best - TIED).int().argmax()] = torch.inf
        width = min(self.width, len(most))
        top = most.topk(min(width + 1, len(most)))
        others = float(top.values[width]) if len(most) > width else -torch.inf

        places = top.indices[:width].sort().values
        rows = self.room[:width].copy_(self.h[places])  # [b, C]
        rows *= _scale(rows, self.kind)
        factor = self.project(rows, rows[:, :0])
        kernel = rows @ rows.T  # [b, b]
        own = kernel.diagonal().clone()
        kernel.addmm_(factor, factor.T, alpha=-1)  # what the picks leave of it
        left, estimate = kernel.diagonal(), self.left[places]
        known = estimate > -torch.inf
        if self.margin and not ((left - estimate).abs() <= self.margin / 4 * own)[known].all():
            return False
        limit = (self.rank_eps * own).masked_fill_(~known, torch.inf)
        spent = ~(left > limit)
        self.left[places[spent]] = -torch.inf
        relevance, wanted = self.relevance[places].tolist(), len(self.order) - self.picks
        took = _best(kernel.cpu().clone(), relevance, limit.tolist(), others, wanted, not self.margin)
        self.width = min(max(CANDIDATES[0], 3 * len(took)), CANDIDATES[1])
        if took:
            new, self.picks = slice(self.picks, self.picks + len(took)), self.picks + len(took)
            self.order[new], self.basis[new], self.corner[new, : new.start] = places[took], rows[took], factor[took]
            self.corner[new, new] = torch.linalg.cholesky_ex(kernel[took][:, took]).L
        return bool(took) or bool((spent & known).any())


def _best(
    kernel: Tensor, relevance: list[float], limit: list[float], others: float, most: int, sure: bool
) -> list[int]:
    """Greedy on the small kernel (spent in doing so) while no other token, gaining at most `others`, could win or tie.

    Args:
        relevance: logarithms.
        limit: so little left of a token is nothing.
        most: picks to make.
        sure: no other token can win or tie against the first pick.
    """
    took: list[int] = []
    diagonal = kernel.diagonal()
    while len(took) < most:
        left = diagonal.tolist()
        gain = [
            2 * own + math.log(x) if x > least else -torch.inf
            for own, x, least in zip(relevance, left, limit, strict=True)
        ]
        level = max(gain) - TIED
        if level == -torch.inf or (level <= others and (took or not sure)):
            break
        pick = next(i for i, g in enumerate(gain) if g >= level)
        row = kernel[pick] * left[pick] ** -0.5
        kernel.addr_(row, row, alpha=-1)
        diagonal[pick] = -torch.inf
        took.append(pick)
    return took
