from __future__ import annotations

import torch
from torch import Tensor

from vidcompress.ops.farthest_points.naive import TIED

BLOCK = 64
"""Tokens whose distances to all others are computed at once, to find the first pick."""

CANDIDATES = 256
"""Least number of tokens among which picks are made before the others are looked at again."""

MOST = 2048
"""More candidates than these are too close to each other for fp32, or tied."""

ROWS = 512
"""Rows in fp32 or fp64 at once."""

WINDOW = 32
"""Periods within which tokens are compared before all others."""

NOISE = {torch.float32: 2.0**-22, torch.float64: 2.0**-51}
"""Rounding of a product of two unit vectors, over the square root of their length: several times what is usual."""


def farthest_points(tokens: Tensor, count: int, period: int = 1) -> Tensor:
    if not count:
        return torch.empty(0, dtype=torch.long, device=tokens.device)
    search = _Search(tokens, count)
    search.add(torch.tensor([search.loneliest(period)], device=tokens.device))
    while search.picked < count and search.pick():
        pass
    # Copies of the picked are left.
    left = torch.ones(len(tokens), dtype=torch.bool, device=tokens.device)
    left[search.picks[: search.picked]] = False
    search.picks[search.picked :] = left.nonzero()[: count - search.picked, 0]
    return search.picks


def _best(reach: Tensor) -> Tensor:
    """Marks the farthest, of which none is a copy."""
    return (reach >= reach.max() - TIED) & (reach > TIED)


class _Search:
    """Distances to the picked tokens only shrink, so that one to some of them is an upper bound: only tokens whose
    bound is among the highest are compared with the picks that they have missed, and picks are made among them while
    the best beats all other bounds. This is done in fp32; where it is too close to call fp64 decides.
    """

    def __init__(self, tokens: Tensor, count: int) -> None:
        n, channels = tokens.shape
        self.tokens, self.dtype = tokens, torch.float32
        length = torch.cat([part.double().norm(dim=1) for part in tokens.split(ROWS)])
        self.scale = torch.where(length > 0, 1 / length, 0)  # [N] fp64
        self.picks, self.picked = torch.empty(count, dtype=torch.long, device=tokens.device), 0
        self.rows = tokens.new_empty(count, channels, dtype=self.dtype)  # unit vectors of the picks
        self.reach = tokens.new_full((n,), 2.0, dtype=torch.float64)  # [N] at least the distance to the nearest pick
        self.seen = torch.zeros(n, dtype=torch.long, device=tokens.device)  # [N] how many picks `reach` knows of

    @property
    def noise(self) -> float:
        return NOISE[self.dtype] * self.tokens.shape[1] ** 0.5 + TIED

    def unit(self, places: Tensor | slice) -> Tensor:
        return self.tokens[places].to(self.dtype) * self.scale[places].to(self.dtype)[:, None]

    def add(self, places: Tensor) -> None:
        """Takes these as the next picks."""
        new = slice(self.picked, self.picked + len(places))
        self.picks[new], self.rows[new], self.picked = places, self.unit(places), new.stop
        self.reach[places] = -torch.inf

    def nearest(self, places: Tensor, others: Tensor, distance: Tensor) -> Tensor:
        """[m] exact distances of the places to their nearest of `others` [k], of all distances [m, k] with noise."""
        close = distance <= distance.amin(1, keepdim=True) + 2 * self.noise
        row, column = close.nonzero(as_tuple=True)
        value = self.between(places[row], others[column])
        return value.new_full((len(places),), torch.inf).scatter_reduce_(0, row, value, "amin")

    def between(self, a: Tensor, b: Tensor) -> Tensor:
        """[m] exact distances of pairs."""
        pairs = [*zip(a.split(ROWS), b.split(ROWS), strict=True)]
        dots = [
            (self.tokens[i].double() * self.tokens[j].double()).sum(1) * self.scale[i] * self.scale[j] for i, j in pairs
        ]
        return 1 - torch.cat(dots)

    # -- the first pick ------------------------------------------------------------------------------------------------
    def loneliest(self, period: int) -> int:
        """The token that is farthest from its nearest other."""
        everyone = torch.arange(len(self.tokens), device=self.tokens.device)
        bound, best = self.alike(period), -torch.inf
        if float(bound.max()) <= TIED:
            return 0
        known = torch.zeros_like(everyone, dtype=torch.bool)
        rival, value = everyone[:0], bound[:0]
        while True:
            top, places = bound.masked_fill(known, -torch.inf).topk(min(BLOCK, len(everyone)))
            places = places[(top > -torch.inf) & (top >= best - 2 * self.noise)]
            if not len(places):
                return int(rival[_best(value)].min()) if float(value.max()) > TIED else 0
            rows = self.unit(places)
            distance = torch.cat([1 - rows @ self.unit(part).T for part in everyone.split(ROWS)], 1).double()
            distance[torch.arange(len(places), device=places.device), places] = torch.inf
            bound = bound.minimum(distance.amin(0))
            bound[places], known[places] = distance.amin(1), True
            best = max(best, float(bound[places].max()))
            close = bound[places] >= best - 2 * self.noise
            rival = torch.cat([rival, places[close]])
            value = torch.cat([value, self.nearest(places[close], everyone, distance[close])])

    def alike(self, period: int) -> Tensor:
        """[N] distance to the nearest of some tokens that are whole periods away; exact where that is next to none."""
        n, channels = self.tokens.shape
        places = torch.arange(n, device=self.tokens.device)[: n - n % period].view(-1, period)  # [T, P]
        bound, other = torch.full_like(self.scale, 2.0), torch.zeros_like(self.seen)
        step = max(1, ROWS // WINDOW)
        for window in places.split(WINDOW):
            if len(window) < 2:
                continue
            for part in window.split(step, dim=1):
                part = part.T  # [step, T]
                rows = self.unit(part.flatten()).view(*part.shape, channels)
                distance = (1 - rows @ rows.transpose(1, 2)).double()
                distance.diagonal(dim1=1, dim2=2).fill_(torch.inf)
                low, at = distance.min(2)
                bound[part], other[part] = low, part.gather(1, at)
        small = (bound <= self.noise).nonzero()[:, 0]
        bound[small] = self.between(small, other[small])
        return bound

    # -- all others ----------------------------------------------------------------------------------------------------
    def pick(self) -> bool:
        """Picks some tokens, or learns more of their distances; False if only copies of the picked are left."""
        top = self.reach.topk(min(CANDIDATES, len(self.reach))).values
        if float(top[0]) == -torch.inf:
            return False
        chosen = (self.reach >= top[-1] - 3 * self.noise) & (self.reach > -torch.inf)
        others = float(self.reach.masked_fill(chosen, -torch.inf).max())
        places = chosen.nonzero()[:, 0]
        crowded = len(places) > MOST
        if self.dtype != torch.float64 and (crowded or float(top[0]) < 4 * self.noise):
            self.refine()
            return True
        if crowded:
            return self.pick_one(places, others)
        rows = self.measure(places)
        able = self.reach[places] > others + 2 * self.noise
        if not able.any():
            return True
        places, rows = places[able], rows[able]
        reach = self.reach[places]
        distance = (1 - rows @ rows.T).double()
        guess: list[Tensor] = []
        rival = torch.zeros_like(places, dtype=torch.bool)
        while len(guess) < len(self.picks) - self.picked:
            best, pick = reach.max(0)
            if not best > others + 2 * self.noise:
                break
            rival |= reach >= best - 2 * self.noise
            guess.append(pick)
            reach = reach.minimum(distance[pick])
            reach[pick] = -torch.inf
        self.settle(places[rival], rows[rival], places[torch.stack(guess)])
        return True

    def settle(self, rivals: Tensor, rows: Tensor, guess: Tensor) -> None:
        """Makes the guessed picks up to the first that is wrong, which it puts right; the exact best is a rival."""
        reach = self.nearest(rivals, self.picks[: self.picked], 1 - rows @ self.rows[: self.picked].T)
        rows = self.tokens[rivals].double() * self.scale[rivals][:, None]
        distance = 1 - rows @ rows.T
        took: list[Tensor] = []
        for wanted in guess:
            best = _best(reach)
            if not best.any():  # copies of the new picks are left
                break
            pick = best.int().argmax()
            took.append(rivals[pick])
            if took[-1] != wanted:
                break
            reach = reach.minimum(distance[pick])
            reach[pick] = -torch.inf
        self.add(torch.stack(took))

    def refine(self) -> None:
        """Goes on in fp64."""
        self.reach += self.noise  # what is known in fp32 remains a bound
        self.dtype, self.rows = torch.float64, self.rows.double()
        self.rows[: self.picked] = self.unit(self.picks[: self.picked])
        self.seen.zero_()

    def pick_one(self, places: Tensor, others: float) -> bool:
        """Measures all these, and picks the best if it beats the others."""
        for part in places.split(ROWS):
            self.measure(part)
        reach = self.reach[places]
        if reach.max() > others + 2 * self.noise:
            self.add(places[_best(reach)][:1])
        return True

    def measure(self, places: Tensor) -> Tensor:
        """Compares tokens with the picks that they have missed, and returns their unit vectors. A copy of a picked one
        is not looked at again.
        """
        rows, reach = self.unit(places), self.reach[places]
        missed = self.rows[int(self.seen[places].min()) : self.picked]
        if len(missed):
            reach = reach.minimum((1 - rows @ missed.T).amin(1).double())
        small = reach <= self.noise
        if small.any():
            distance = 1 - rows[small] @ self.rows[: self.picked].T
            copy = self.nearest(places[small], self.picks[: self.picked], distance) <= TIED
            reach[small] = reach[small].masked_fill(copy, -torch.inf)
        self.reach[places], self.seen[places] = reach, self.picked
        return rows
