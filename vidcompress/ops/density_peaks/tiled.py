"""Density peaks of one large set of tokens, without the matrix of all distances.

One pass over tiles of distances finds the few nearest of every token; most tokens have a denser one among them, and
only the others are compared with all that are denser. Products in fp32 say who is near, differences in fp64 how near.

Where tokens are much nearer to each other than they are long (a still picture), fp32 products cannot tell who is
nearest. Such tokens are searched again around one of them, the leader: with the leader at the origin they are short.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vidcompress.ops.hashing import hashes

TILE = 1024
"""Rows and columns of a tile of distances."""

SPARE = 8
"""Neighbours found beyond those asked for: room for what fp32 cannot order, and for a denser token among them."""

LEADERS, LEADER_ELEMENTS = 256, 16 << 20
"""Leaders that are taken at a time, and distances from them that exist at once."""

CHUNK_ELEMENTS = {"cpu": 1 << 16, "cuda": 16 << 20}
"""Elements of tokens that exist in fp64 at once: few enough for a CPU's cache, or enough to fill a GPU."""

NOISE = 2.0**-22
"""Rounding of a squared distance from products in fp32, over the square root of the number of channels and relative to
the sum of the two squared lengths: at least twice the largest that was measured, with 8 to 3584 channels."""


@dataclass(frozen=True)
class Points:
    """Different tokens, numbered.

    Args:
        tokens: [n, C].
        index: [m] where the points are among the tokens.
        below: [m] of a point, only the points of a lower number than this can be its neighbours; None: all can.
    """

    tokens: Tensor
    index: Tensor
    below: Tensor | None = None

    def around(self, points: Tensor, origin: Tensor | None) -> Tensor:
        """[p, C] fp32, as seen from an origin in fp64, or as they are."""
        x = self.exact(points, self.tokens.dtype if self.tokens.dtype == torch.float64 else torch.float32)
        return (x if origin is None else x.sub_(origin.to(x.dtype))).float()

    def exact(self, points: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
        """[p, C] as they are."""
        return self.tokens.index_select(0, self.index[points]).to(dtype)

    def middle(self) -> Tensor | None:
        """[C] fp64 mean of some of the points: an origin that makes most of them short. None: they are short."""
        step = max(1, len(self.index) // TILE)
        return self.tokens[self.index[::step]].mean(0, dtype=torch.float64)

    def noise(self, square: Tensor, distance: Tensor) -> Tensor:
        """Bound of the rounding of squared distances from a point of squared length `square`."""
        # The other point is no longer than the one and the distance together, and (a + b)^2 <= 2 a^2 + 2 b^2.
        return NOISE * self.tokens.shape[1] ** 0.5 * (3 * square + 2 * distance)

    def scan(self, rows: Tensor, columns: Tensor | None, origin: Tensor | None, kept: int) -> Near:
        """The nearest of `rows` among `columns` as `_search`, by one pass over all distances."""
        return _scan(self, rows, columns, origin, kept)

    def bounds(self, near: Near, wanted: int) -> tuple[Tensor, Tensor]:
        """[r] squared, what the `wanted` nearest are no farther than; and [r] whether another origin may tell more."""
        last = near.distance[:, min(wanted, near.distance.shape[1]) - 1].clamp_min(0)
        most = last + self.noise(near.square, last)
        # Where distances are about as long as the points, another origin would tell no more.
        return most, (most > near.reach) & (near.square > 5 * last)

    def measured(self, rows: Tensor, near: Near, last: Tensor, known: Tensor | None) -> Tensor:
        """[r, kept] fp64 squared distances over C, where `near` has them no farther than `last` or than fp32 can tell.

        Infinite elsewhere, but for what is `known`.
        """
        limit = last + 2 * self.noise(near.square, last)
        unknown = torch.full(near.distance.shape, torch.inf, dtype=torch.float64, device=rows.device)
        out = unknown if known is None else known.clone()
        row, column = ((near.distance <= limit[:, None]) & near.distance.isfinite() & out.isinf()).nonzero(
            as_tuple=True
        )
        one, other = rows[row], near.point[row, column]
        # Two tokens that are each other's neighbours are measured once.
        pairs, which = torch.unique(
            torch.minimum(one, other) * len(self.index) + torch.maximum(one, other), return_inverse=True
        )
        out[row, column] = self.apart(pairs // len(self.index), pairs % len(self.index))[which]
        return out

    def apart(self, one: Tensor, other: Tensor) -> Tensor:
        """[p] fp64 squared distances of pairs of points over C; 0 for a point and itself."""
        out = torch.zeros(one.shape, dtype=torch.float64, device=one.device)
        pair = (one != other).nonzero().squeeze(1)
        step = _step(self.tokens)
        parts = zip(one[pair].split(step), other[pair].split(step), strict=True)
        # By the words of the definition, so that what is equal there is equal here.
        distance = torch.cat([self.exact(a).sub_(self.exact(b)).norm(dim=-1) for a, b in parts])
        out[pair] = (distance / self.tokens.shape[1] ** 0.5) ** 2
        return out

    def above(self, near: Near, rank: Tensor, below: Tensor) -> tuple[Near, Tensor]:
        """The lists without those that are not denser, points whose rank [m] is not below `below` [m, by rank], and [m]
        the nearest that is left."""
        denser = (rank[near.point] < below[rank, None]) & near.distance.isfinite()
        above = replace(near, distance=near.distance.where(denser, torch.inf))
        return above, above.distance.amin(1)

    def settled(self, above: Near, exact: Tensor, rank: Tensor, below: Tensor) -> tuple[Tensor, Tensor]:
        """[m] squared distance over C to the nearest listed denser point; and by rank [m] whether one that is not
        listed may be nearer."""
        delta = exact.where(above.distance.isfinite(), torch.inf).amin(1)
        may = (delta * self.tokens.shape[1] > above.reach) & (below[rank] > 0)
        return delta, torch.empty_like(may).scatter_(0, rank, may)

    def largest(self, near: Near, origin: Tensor | None) -> Tensor:
        """[1] the largest squared distance over C; fp32 says between whom."""
        one, every = near.farthest.argmax()[None], torch.arange(len(self.index), device=self.index.device)
        return self.apart(one, _from_leaders(self, one, every, origin).argmax(1))

    def log_density(self, exact: Tensor, point: Tensor, copies: Tensor, neighbours: int) -> Tensor:
        """[r] fp64 from squared distances [r, kept] to points of which there are `copies` [m]."""
        exact, order = exact.sort(dim=1)
        upto = copies[point].gather(1, order).cumsum(1)
        slot = torch.arange(neighbours, device=copies.device).expand(len(upto), -1).contiguous()
        return -exact.gather(1, torch.searchsorted(upto, slot, right=True)).mean(1)

    @staticmethod
    def hashes(tokens: Tensor, chosen: Tensor) -> Tensor:
        """As `hashing.hashes`."""
        return hashes(tokens, chosen)


@dataclass
class Near:
    """The nearest points of some points, as far as fp32 tells.

    Args:
        distance: [r, kept] squared, ascending; infinite where there are fewer points.
        point: [r, kept].
        square: [r] squared length of the point itself, seen from where it was measured.
        reach: [r] every point that is not listed is farther than this, squared.
        farthest: [r] squared distance to the farthest point, where all were compared with all.
    """

    distance: Tensor
    point: Tensor
    square: Tensor
    reach: Tensor
    farthest: Tensor


def tiled_scores(
    tokens: Tensor,
    candidates: Tensor,
    neighbours: int,
    ties: str,
    noise: Tensor | None,
    kind: type[Points] | None = None,
) -> Tensor:
    """`density_peaks` of one row: tokens [n, C], candidates [n] and noise [n]; [n] fp32. `kind` does the arithmetic."""
    out = torch.full(candidates.shape, -torch.inf, dtype=torch.float32, device=tokens.device)
    chosen = candidates.nonzero().squeeze(1)
    if not len(chosen):
        return out
    kind = kind or Points
    copies, first = _copies(tokens, chosen, kind)
    points = kind(tokens, chosen[first])
    origin = points.middle()
    count = copies.bincount()
    every = torch.arange(len(first), device=tokens.device)
    near = _search(points, every, None, origin, neighbours)
    exact = points.measured(every, near, near.distance[:, min(neighbours, near.distance.shape[1]) - 1], None)
    density = points.log_density(exact, near.point, count, min(neighbours, len(chosen)))  # [m]
    # Of the copies of a token one is the densest, or the first; it alone can lie away from what is denser.
    head, highest = first, torch.ones((), dtype=torch.bool, device=tokens.device)
    if noise is not None:
        own = (density[copies].exp() + noise[chosen]).log()  # [candidates]
        density = density.new_full((len(first),), -torch.inf).scatter_reduce_(0, copies, own, "amax")
        highest = own == density[copies]
        place = torch.arange(len(chosen), device=tokens.device).where(highest, len(chosen))
        head = copies.new_full((len(first),), len(chosen)).scatter_reduce_(0, copies, place, "amin")
    order = density.argsort(descending=True, stable=True)
    if noise is not None:  # copies are no longer numbered by who comes first
        order = head.argsort()
        order = order[density[order].argsort(descending=True, stable=True)]
    delta = _delta(points, near, origin, exact, density, order, ties)  # [m] squared
    largest = points.largest(near, origin)  # [1]
    lowest = torch.finfo(torch.float32).min
    score = (density + 0.5 * delta.where(delta < torch.inf, largest).log()).float().clamp_min_(lowest)  # [m]
    if ties == "strict":
        out[chosen] = score[copies].where(highest, lowest)
    else:
        out[chosen] = lowest
        out[chosen[head]] = score
    return out


def _step(tokens: Tensor) -> int:
    """How many tokens to treat at once in fp64."""
    return max(1, CHUNK_ELEMENTS.get(tokens.device.type, 1 << 20) // tokens.shape[1])


def _copies(tokens: Tensor, chosen: Tensor, kind: type[Points] = Points) -> tuple[Tensor, Tensor]:
    """[candidates] number of every different token among the candidates, and [m] where each is first."""
    kinds, kind_of = torch.unique(kind.hashes(tokens, chosen), return_inverse=True)
    place = torch.arange(len(chosen), device=tokens.device)
    first = place.new_full((len(kinds),), len(chosen)).scatter_reduce_(0, kind_of, place, "amin").sort()
    number = torch.empty_like(first.indices).scatter_(0, first.indices, place[: len(kinds)])
    return number[kind_of], first.values


# -- who is near -------------------------------------------------------------------------------------------------------
def _search(points: Points, rows: Tensor, columns: Tensor | None, origin: Tensor | None, wanted: int) -> Near:
    """The nearest of `rows` among `columns`; both ascending, all rows among the columns. None: the rows themselves."""
    near = points.scan(rows, columns, origin, wanted + SPARE)
    _search_again(points, rows, rows if columns is None else columns, near, origin, wanted)
    return near


def _scan(points: Points, rows: Tensor, columns: Tensor | None, origin: Tensor | None, kept: int) -> Near:
    """One pass over tiles of distances. Without columns every tile serves both its rows and its columns."""
    across = rows if columns is None else columns
    count, kept = len(rows), min(kept, len(across))
    distance = torch.full((count, kept), torch.inf, dtype=torch.float32, device=rows.device)
    square, reach, farthest = (distance.new_zeros(count) for _ in range(3))
    near = Near(distance, rows.new_zeros(count, kept), square, reach, farthest)
    ends = _ends(points, rows, across)
    for i in range(0, count, TILE):
        x = points.around(rows[i : i + TILE], origin)
        here = slice(i, i + len(x))
        square[here] = x.norm(dim=1).square()
        for j in range(i if columns is None else 0, ends[i // TILE], TILE):
            number = across[j : j + TILE]
            same = columns is None and i == j
            y = x if same else points.around(number, origin)
            if same:
                tile = _products(x).mul_(-2).add_(square[here]).add_(square[here, None])
            else:
                tile = torch.addmm(y.norm(dim=1).square(), x, y.T, alpha=-2).add_(square[here, None])
            if points.below is not None:
                tile.masked_fill_(number >= points.below[rows[here], None], torch.inf)
            _keep(near, here, tile, number)
            if columns is None:
                farthest[here] = torch.maximum(farthest[here], tile.amax(1))
                if i != j:
                    _keep(near, slice(j, j + len(y)), tile.T.contiguous(), rows[here])
    last = distance[:, -1]
    listed = last.isinf() if kept < len(across) else torch.ones_like(last, dtype=torch.bool)
    near.reach = (last - points.noise(square, last)).masked_fill(listed, torch.inf)
    return near


def _products(x: Tensor) -> Tensor:
    """x x^T, of which one of four blocks is the mirror of another."""
    half, out = len(x) // 2, x.new_empty(len(x), len(x))
    out[:half, :half] = x[:half] @ x[:half].T
    out[half:, half:] = x[half:] @ x[half:].T
    out[:half, half:] = x[:half] @ x[half:].T
    out[half:, :half] = out[:half, half:].T
    return out


def _ends(points: Points, rows: Tensor, columns: Tensor) -> list[int]:
    """How many of the columns every tile of rows has to see."""
    if points.below is None:
        return [len(columns)] * len(rows.split(TILE))
    last = torch.stack([points.below[part].max() for part in rows.split(TILE)])
    return torch.searchsorted(columns, last).tolist()


def _keep(near: Near, rows: slice, tile: Tensor, number: Tensor) -> None:
    """Adds a tile's nearest to those of some rows."""
    kept = near.distance.shape[1]
    best = tile.topk(min(kept, tile.shape[1]), largest=False)
    value = torch.cat([near.distance[rows], best.values], 1)
    point = torch.cat([near.point[rows], number[best.indices]], 1)
    near.distance[rows], order = value.topk(kept, largest=False)
    near.point[rows] = point.gather(1, order)


def _search_again(
    points: Points, rows: Tensor, columns: Tensor, near: Near, origin: Tensor | None, wanted: int
) -> None:
    """Searches around leaders for the rows whose nearest the scan could not make out."""
    most, doubtful = points.bounds(near, wanted)
    unsure = doubtful.nonzero().squeeze(1)
    while len(unsure):
        leaders = rows[unsure[: max(1, min(LEADERS, LEADER_ELEMENTS // len(columns)))]]
        apart = _from_leaders(points, leaders, columns, origin)  # [leaders, columns]
        nearest = apart[:, torch.searchsorted(columns, rows[unsure])].min(0)
        led = nearest.values <= near.square[unsure] / 16
        slack = points.noise(near.square[unsure], nearest.values)
        radius = (nearest.values.clamp_min(0) + slack).sqrt() + most[unsure].sqrt()
        for leader in nearest.indices[led].unique():
            own = led & (nearest.indices == leader)
            mine, ball = unsure[own], radius[own].max() ** 2
            # All that can be among the nearest of these rows, by the triangle inequality.
            inside = columns[apart[leader] <= ball + points.noise(2 * near.square[mine].max(), ball)]
            again = _search(points, rows[mine], inside, points.exact(leaders[leader, None])[0], wanted)
            missing = near.distance.shape[1] - again.distance.shape[1]
            near.distance[mine] = torch.nn.functional.pad(again.distance, (0, missing), value=torch.inf)
            near.point[mine] = torch.nn.functional.pad(again.point, (0, missing))
            near.square[mine] = again.square
            near.reach[mine] = torch.minimum(again.reach, most[mine])
        unsure = unsure[~led]


def _from_leaders(points: Points, leaders: Tensor, columns: Tensor, origin: Tensor | None) -> Tensor:
    """[leaders, columns] squared distances."""
    x = points.around(leaders, origin)
    out = x.new_empty(len(x), len(columns))
    for part, to in zip(columns.split(TILE), out.split(TILE, dim=1)):
        y = points.around(part, origin)
        to.copy_(torch.addmm(y.norm(dim=1).square(), x, y.T, alpha=-2))
    return out.add_(x.norm(dim=1).square()[:, None])


# -- away from what is denser ------------------------------------------------------------------------------------------
def _delta(
    points: Points, near: Near, origin: Tensor | None, exact: Tensor, density: Tensor, order: Tensor, ties: str
) -> Tensor:
    """[m] squared distance over C to the nearest denser point, infinite where there is none.

    Args:
        order: [m] the points, densest first: what is denser than a point are the points below a number.
    """
    every = torch.arange(len(density), device=density.device)
    rank = torch.empty_like(order).scatter_(0, order, every)
    below = every  # [m] by rank
    if ties == "strict":
        falling = -density[order]
        below = torch.searchsorted(falling, falling)
    # Among the neighbours that are known.
    above, closest = points.above(near, rank, below)
    exact = points.measured(every, above, closest, exact)
    delta, is_open = points.settled(above, exact, rank, below)
    # The others, among all that are denser.
    rest = is_open.nonzero().squeeze(1)
    if len(rest):
        ranked = replace(points, index=points.index[order], below=below)
        found = _search(ranked, rest, every, origin, 1)
        delta[order[rest]] = ranked.measured(rest, found, found.distance[:, 0], None).amin(1)
    return delta
