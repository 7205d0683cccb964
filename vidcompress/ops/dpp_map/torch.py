from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from vidcompress.ops.dpp_map.naive import TIED

Segment: TypeAlias = tuple[Tensor, Tensor, int]
"""Tokens [n, C], logarithms of relevance [n] in fp64, how many to keep."""

LONGEST = {"cpu": 256, "cuda": 4096}
"""Segments up to this many tokens are solved together on their full kernels: one set of launches a pick. A longer one
is solved by itself, without its kernel."""

KERNEL_ELEMENTS = 16 << 20
"""Elements of full kernels that exist at once."""

CANDIDATES = (128, 160)
"""Least and most tokens of a long segment among which picks are made before the others learn of it. In between: three
times as many as were picked the last time, because more would be measured in vain."""

CAUTION = 1.5
"""Tokens stay awake that could be picked if gains fell this many times as fast as they did lately."""

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
    return solve(tokens, log_relevance, sizes, counts, rank_eps, kernel, together, KERNEL_ELEMENTS)


def solve(
    tokens: Tensor,
    log_relevance: Tensor,
    sizes: Sequence[int],
    counts: Sequence[int],
    rank_eps: float,
    kind: str,
    together: Callable[[list[Segment], float, str], list[Tensor]],
    elements: int,
) -> Tensor:
    """`dpp_map`, short segments by `together`, as many at once as have `elements` elements of full kernels."""
    segments = [*zip(tokens.split(list(sizes)), log_relevance.double().split(list(sizes)), counts, strict=True)]
    picked: list[Tensor] = [torch.empty(0, dtype=torch.long, device=tokens.device)] * len(segments)
    longest = LONGEST.get(tokens.device.type, 1024)
    short = [m for m, count in enumerate(counts) if count and sizes[m] <= longest]
    while short:
        fitting = max(1, elements // max(sizes[m] for m in short) ** 2)
        group, short = short[:fitting], short[fitting:]
        for m, picks in zip(group, together([segments[m] for m in group], rank_eps, kind), strict=True):
            picked[m] = picks
    for m, (h, own, count) in enumerate(segments):
        if count and sizes[m] > longest:
            picked[m] = _Segment(h, own, count, rank_eps, kind).solve()
    starts = [sum(sizes[:m]) for m in range(len(sizes))]
    return torch.cat(
        [picks + start for picks, start in zip(picked, starts, strict=True)] or [tokens.new_empty(0).long()]
    )


def together(segments: list[Segment], rank_eps: float, kind: str) -> list[Tensor]:
    """Greedy on the full kernels of several segments at once, shorter ones padded with tokens that are exhausted."""
    kernel, relevance = kernels(segments, kind)
    n, steps = relevance.shape[1], max(count for _, _, count in segments)
    left = kernel.diagonal(dim1=1, dim2=2).clone()  # [B, n] what the picks leave of a token, relevance aside
    limit = rank_eps * left
    factor = kernel.new_zeros(len(segments), steps, n)
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


def kernels(segments: list[Segment], kind: str) -> tuple[Tensor, Tensor]:
    """Kernels [B, n, n] and logarithms of relevance [B, n] in fp64, shorter segments padded with nothing."""
    n, device = max(len(h) for h, _, _ in segments), segments[0][0].device
    kernel = torch.zeros(len(segments), n, n, dtype=torch.float64, device=device)
    relevance = torch.full((len(segments), n), -torch.inf, dtype=torch.float64, device=device)
    for b, (h, own, _) in enumerate(segments):
        rows = h.double()
        rows = rows * _scale(rows, kind)
        torch.mm(rows, rows.T, out=kernel[b, : len(h), : len(h)])
        relevance[b, : len(h)] = own
    return kernel, relevance


def _scale(rows: Tensor, kind: str) -> Tensor:
    """[n, 1] what makes the rows' products the kernel, relevance aside."""
    if kind == "dot":
        return torch.full((len(rows), 1), rows.shape[1] ** -0.5, dtype=torch.float64, device=rows.device)
    return 1 / rows.norm(dim=-1, keepdim=True).double().clamp_min(1e-30)


class _Segment:
    """Lazy greedy in a long segment. What is left of tokens only shrinks, and their gains with it, so one that was
    computed before is an upper bound: picks are made among a few candidates while the best of them beats the bounds of
    all others, which then learn of these picks together. This is done in fp32, with a margin, and tells the picks and
    their rivals, the tokens that come too close to one; fp64 decides between these. Where the margin is too wide to
    tell who is best, or the rivals show that it is too narrow, all is computed again, in fp64. Tokens that gain too
    little to be picked, if gains fall on as they do, sleep: they learn nothing, and all is computed again if it was so.
    """

    def __init__(self, h: Tensor, relevance: Tensor, count: int, rank_eps: float, kind: str) -> None:
        self.h, self.relevance, self.rank_eps, self.kind = h, relevance, rank_eps, kind  # relevance as a logarithm
        self.picks, self.width, self.level, self.caution = 0, CANDIDATES[0], math.inf, CAUTION
        self.order = torch.empty(count, dtype=torch.long, device=h.device)
        self.basis = torch.empty(count, h.shape[1], dtype=torch.float64, device=h.device)  # the picked, of any length
        self.corner = torch.zeros(count, count, dtype=torch.float64, device=h.device)  # Cholesky factor of their kernel
        self.measure(torch.float64 if h.dtype == torch.float64 else torch.float32)

    def solve(self) -> Tensor:
        """[count] indices in the order of their picks."""
        while self.picks < len(self.order):
            before, level = self.picks, self.level
            if self.pick():
                if before < self.picks < len(self.order):
                    self.learn(before)
                    self.rest((level - self.level) / (self.picks - before))
            elif self.asleep > -math.inf:
                self.caution *= 4
                self.measure(self.rows.dtype)
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
        self.awake, self.asleep = torch.arange(len(self.h), device=self.h.device), -math.inf  # who; the others' bound
        self.rows = self.h.to(dtype)
        self.scale = _scale(self.rows, self.kind)[:, 0]
        self.own = (self.rows.norm(dim=-1).double() * self.scale).square()
        self.left = self.own.masked_fill(self.relevance == -torch.inf, -torch.inf)
        self.left[self.order[: self.picks]] = -torch.inf
        self.factor = torch.empty(len(self.h), len(self.order), dtype=dtype, device=self.h.device)  # not scaled
        self.learn(0)

    def learn(self, before: int) -> None:
        """Takes from the tokens awake what the picks since `before` span."""
        fresh = self.project(self.rows, self.factor[:, :before])
        self.factor[:, before : self.picks] = fresh
        self.left -= fresh.square_().sum(1) * self.scale.square()
        self.left.masked_fill_(self.left <= (self.rank_eps - self.margin) * self.own, -torch.inf)

    def rest(self, slope: float) -> None:
        """Puts tokens to sleep that are not picked if gains go on to fall by `slope` a pick, if these are many."""
        bound, wanted = self.bounds(), len(self.order) - self.picks
        near = bound >= self.level - self.caution * slope * wanted
        if wanted <= int(near.sum()) < len(near) / 2:
            self.asleep = max(self.asleep, float(bound[~near].max()))
            self.awake, self.rows, self.factor = self.awake[near], self.rows[near], self.factor[near]
            self.scale, self.own, self.left = self.scale[near], self.own[near], self.left[near]

    def bounds(self) -> Tensor:
        """What the tokens awake add at most, as a logarithm."""
        return 2 * self.relevance[self.awake] + (self.left + self.margin * self.own).clamp_min(0).log()

    def project(self, rows: Tensor, factor: Tensor) -> Tensor:
        """[b, picks - m] further columns of the Cholesky factor of `rows` [b, C], of which `factor` holds m."""
        before, new = factor.shape[1], slice(factor.shape[1], self.picks)
        corner = self.corner[new, : self.picks].to(rows.dtype)
        fresh = (rows @ self.basis[new].to(rows.dtype).T).addmm_(factor, corner[:, :before].T, alpha=-1)
        return torch.linalg.solve_triangular(corner[:, before:].T, fresh, upper=True, left=False)

    def pick(self) -> bool:
        """Picks some tokens, or finds some exhausted; False if the gains known can do neither."""
        bound = self.bounds()
        top = float(bound.max())
        if not self.asleep + TIED < top < math.inf:
            return False
        bound = (bound - top).exp()  # all gains in here are relative to the greatest bound
        if not self.margin:
            # Of the tied best the lowest index is next: it must be a candidate.
            bound[(bound >= 1 - TIED).int().argmax()] = 2
        places = bound.topk(min(self.width, len(bound))).indices.sort().values
        others = max(float(bound.scatter(0, places, 0).max()), math.exp(self.asleep - top))
        factor = self.factor.index_select(0, places)[:, : self.picks]
        rows, known = self.rows.index_select(0, places), self.left[places] > -torch.inf
        weight = (self.relevance[self.awake[places]] - top / 2).exp().where(known, 0)  # [b]
        left, own = (x[places] * weight.square() for x in (self.left, self.own))

        kernel = (rows @ rows.T).addmm_(factor, factor.T, alpha=-1)  # [b, b] what the picks leave of it
        scale = (weight * self.scale[places]).to(kernel.dtype)
        kernel *= scale
        kernel *= scale[:, None]
        most = min(len(self.order) - self.picks, len(rows))
        guess, past = _best(kernel.cpu(), (self.rank_eps * own).tolist(), others, most, not self.margin)
        past, slack, limit = past.to(own), self.margin * own, self.rank_eps * own
        least = (past - slack).where(past - slack > limit, 0).amax(1, keepdim=True)
        past += slack
        rival = ((past >= (1 - TIED) * least) & (past > limit)).any(0)
        bar = past.masked_fill(rival, 0).amax(1).clamp_min(others)  # [picks] what no other token gains by then
        guess = (rival.cumsum(0) - 1)[guess]

        rows = rows[rival].double()
        rows *= weight[rival, None] * _scale(rows, self.kind)
        factor = self.project(rows, rows[:, :0])
        kernel = rows @ rows.T
        own = kernel.diagonal().clone()
        kernel.addmm_(factor, factor.T, alpha=-1)
        if self.margin and not ((kernel.diagonal() - left[rival]).abs() <= self.margin / 4 * own).all():
            return False
        if not self.margin:
            bar[0] = 0
        limit = self.rank_eps * own
        spent = kernel.diagonal() <= limit
        places = places[rival]
        took, corner = _settled(kernel, limit, guess, bar)
        self.left[places[spent]] = self.left[places[took]] = -torch.inf
        self.width = min(max(CANDIDATES[0], 3 * len(took)), CANDIDATES[1])
        if len(took):
            new, self.picks = slice(self.picks, self.picks + len(took)), self.picks + len(took)
            self.order[new], self.basis[new] = self.awake[places[took]], rows[took]
            self.corner[new, : new.start], self.corner[new, new] = factor[took], corner
            self.level = top + 2 * math.log(corner[-1, -1])
        return bool(len(took)) or bool(spent.any())


def _best(kernel: Tensor, limit: list[float], others: float, most: int, sure: bool) -> tuple[list[int], Tensor]:
    """Greedy on the small kernel (spent in doing so) while no other token, gaining at most `others`, could win.

    Args:
        limit: so little left of a token is nothing.
        most: picks to make.
        sure: no other token can win against the first pick.

    Returns:
        The picks, and [picks, b] the gains before every pick (before the first one if there is none).
    """
    took: list[int] = []
    gain = kernel.diagonal()
    first, rows = gain.to(torch.float64, copy=True), kernel.new_zeros(most, len(kernel))
    while len(took) < most:
        now = gain.tolist()
        best = max(now)
        if not best > 0 or (best <= others and (took or not sure)):
            break
        pick = now.index(best)
        if best > limit[pick]:
            row = torch.mul(kernel[pick], best**-0.5, out=rows[len(took)])
            kernel.addr_(row, row, alpha=-1)
            took.append(pick)
        gain[pick] = -torch.inf
    return took, _past(first, rows[: max(1, len(took))].double(), torch.tensor(took, dtype=torch.long))


def _past(gain: Tensor, rows: Tensor, took: Tensor) -> Tensor:
    """[t, b] gains before every step, of which a row of the Cholesky factor is the outcome; -inf from a pick on."""
    past = gain + rows.square() - rows.square().cumsum(0)
    turn = torch.full_like(gain, len(rows)).index_copy_(0, took, torch.arange(len(took)).to(gain))
    return past.masked_fill_(turn < torch.arange(len(rows), device=gain.device)[:, None], -torch.inf)


def _settled(kernel: Tensor, limit: Tensor, guess: Tensor, bar: Tensor) -> tuple[Tensor, Tensor]:
    """Puts the guessed picks right, as far as what they gain is above the `bar`; with the factor of their kernel."""
    while len(guess):
        corner = torch.linalg.cholesky_ex(kernel[guess][:, guess]).L
        rows = torch.linalg.solve_triangular(corner, kernel[guess], upper=False)
        past = _past(kernel.diagonal(), rows, guess)
        past.masked_fill_(past <= limit, 0)
        best = (1 - TIED) * past.amax(1)
        won = (past >= best[:, None]).int().argmax(1)
        wrong = ((won != guess) | (best <= bar)).nonzero()[:, 0]
        if not len(wrong):
            break
        step = int(wrong[0])
        if best[step] <= bar[step]:
            return guess[:step], corner[:step, :step]
        order = [*guess[:step].tolist(), int(won[step])]
        later = [i for i in guess[step:].tolist() if i != order[-1]]
        # Till the same are picked again the bar is what it was when they last were.
        turn = guess.tolist().index(order[-1]) if order[-1] in guess.tolist() else len(guess)
        bar[step + 1 : turn + 1] = bar[step]
        guess = guess.new_tensor((order + later)[: len(guess)])
    else:
        return guess, kernel[:0, :0]
    return guess, corner
