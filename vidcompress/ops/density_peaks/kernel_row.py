"""Density peaks of one long row of tokens by Triton, in one line of launches: the host waits at its end.

How many candidates there are, how many of them differ, and which of them have to be searched a second time, only the
device knows; kernels that have nothing to do end at once. Copies of a token stay in the row, infinitely far away. If
fp32 could not make out some token's neighbours, the row is left to tiled.py, which searches around leaders.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vidcompress.ops.density_peaks import tiled
from vidcompress.ops.density_peaks.kernel_search import ROUNDING, SPLITS, search, tile_of
from vidcompress.ops.hashing import factors
from vidcompress.ops.kernel_bisect import _first_not_before
from vidcompress.ops.launch import INTERPRETED, launch

ROWS = 64 if INTERPRETED else 4
"""Tokens of a program: the interpreter takes as long for few as for many."""

MANY = 1 << 14 if INTERPRETED else 1024
"""Numbers of a program, where it looks at numbers only."""


def row_scores(tokens: Tensor, candidates: Tensor, neighbours: int, ties: str) -> Tensor | None:
    """`density_peaks` of tokens [n, C] and candidates [n], as [n] fp32; None if another search has to tell more."""
    row = Row(tokens)
    row.list_candidates(candidates)
    row.place()
    near, density, far = row.densities(neighbours)
    delta = row.deltas(near, density, ties)
    scores = row.scores(density, delta, far, ties)
    return None if int(row.flags[0]) else scores


class Row:
    """Tokens [n, C] and what is found out about them, in this order.

    Attributes:
        flags: [2] long: whether fp32 could not tell some token's neighbours; the bits of the largest distance.
        chosen: [n] the candidates, `counts[0]` of them.
        copies: [n] of a candidate, how many equal it; 0 if it is not the first of them, which is `first` [n].
        origin: from where to look, as `search` takes it.
        square: [n] fp32 squared lengths of the candidates, as seen from there.
    """

    def __init__(self, tokens: Tensor) -> None:
        self.tokens, (self.n, self.channels) = tokens, tokens.shape
        self.size = (self.n, self.channels, tokens.stride(0))
        self.rows, self.numbers = (triton.cdiv(self.n, ROWS),), (triton.cdiv(self.n, MANY),)
        self.unit = ROUNDING * tiled.NOISE * float(self.channels) ** 0.5
        self.every = torch.arange(self.n, device=tokens.device)
        self.flags = torch.zeros(2, dtype=torch.long, device=tokens.device)

    def new(self, *shape: int, dtype: torch.dtype = torch.long) -> Tensor:
        """Memory for a tensor."""
        return torch.empty(*shape, dtype=dtype, device=self.tokens.device)

    def list_candidates(self, candidates: Tensor) -> None:
        """Lists the candidates, and tells copies by a sum of their bits."""
        self.chosen, self.counts, self.copies, self.first = (self.new(size) for size in (self.n, 2, self.n, self.n))
        marks, value = candidates.contiguous().view(torch.uint8), self.new(self.n)
        launch(
            _list, (1,), marks, marks, self.chosen, marks, self.counts, self.counts, self.n,
            PAYLOAD=False, B=MANY, num_warps=8,
        )  # fmt: skip
        launch(
            _hash, self.rows, self.tokens, self.chosen, self.counts, factors(self.channels, value.device), value,
            *self.size, WIDE=self.tokens.dtype == torch.float64, R=ROWS, BK=256, num_warps=4,
        )  # fmt: skip
        value, order = value.sort(stable=True)
        launch(
            _kinds, self.numbers, value, order, self.counts, self.copies, self.first, self.n, self.n.bit_length(),
            B=MANY, num_warps=4,
        )  # fmt: skip

    def place(self) -> None:
        """Half-precision tokens stay where they are, unless most of their length is their mean."""
        half, parts = self.tokens.dtype in (torch.bfloat16, torch.float16), triton.cdiv(self.channels, 64)
        wide = torch.float64 if self.tokens.dtype == torch.float64 else torch.float32
        middle, spread = self.new(self.channels, dtype=wide), self.new(parts, 2, dtype=torch.float64)
        stays, self.square = self.new(1), self.new(self.n, dtype=torch.float32)
        self.origin = (middle, stays if half else None)
        launch(
            _middle, (parts,), self.tokens, self.chosen, self.counts, middle, spread, *self.size[1:], tiled.TILE,
            S=32, BK=64, num_warps=4,
        )  # fmt: skip
        launch(_stays, (1,), spread, stays, parts, HALF=half, W=triton.next_power_of_2(parts), num_warps=4)
        launch(
            _squares, self.rows, self.tokens, self.chosen, self.copies, self.counts, middle, stays, self.square,
            *self.size, R=ROWS, BK=256, num_warps=4,
        )  # fmt: skip

    def densities(self, neighbours: int) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], Tensor, Tensor]:
        """Everybody's nearest: fp32 and fp64 distances [n, kept], whose they are, and beyond what [n] the others lie;
        [n] fp64 log densities; and [n] the largest distance.
        """
        kept, n = neighbours + tiled.SPARE, self.n
        found = search(
            self.tokens, self.chosen, self.every, self.square, None, self.every, self.square, self.origin,
            self.counts, kept,
        )  # fmt: skip
        apart, reach, far = (self.new(*size, dtype=torch.float32) for size in ((n, kept), (n,), (n,)))
        exact, density = self.new(n, kept, dtype=torch.float64), self.new(n, dtype=torch.float64)
        near = (apart, exact, self.new(n, kept), reach)
        launch(
            _densities, self.rows, self.tokens, self.chosen, self.copies, self.counts, self.square, *found, *near, far,
            density, self.flags, n, neighbours, *self.size[1:], self.unit, WANTED=min(neighbours, kept),
            BK=32 if kept <= 16 else 16, **shape_of(kept, n),
        )  # fmt: skip
        return near, density, far

    def deltas(self, near: tuple[Tensor, Tensor, Tensor, Tensor], density: Tensor, ties: str) -> Tensor:
        """[n] fp64 squared distances over C to the nearest denser token: among the neighbours, or, where that cannot be
        said, among all that are denser.
        """
        n, few = self.n, 1 + tiled.SPARE
        falling, order = density.sort(descending=True, stable=True)
        rank, below, ranked, square = self.new(n), self.new(n), self.new(n), self.new(n, dtype=torch.float32)
        launch(
            _ranks, self.numbers, falling, order, self.chosen, self.square, rank, below, ranked, square,
            n, n.bit_length(), STRICT=ties == "strict", B=MANY, num_warps=4,
        )  # fmt: skip
        delta, is_open = self.new(n, dtype=torch.float64), self.new(n, dtype=torch.uint8)
        kept = near[0].shape[1]
        launch(
            _deltas, self.rows, self.tokens, self.chosen, self.copies, self.counts, self.square, *near, rank, below,
            delta, is_open, *self.size, self.unit, BK=32, R=ROWS, KEPT=kept, KW=max(2, triton.next_power_of_2(kept)),
            num_warps=4,
        )  # fmt: skip
        rest, rest_square, left = self.new(n), self.new(n, dtype=torch.float32), self.new(2)
        launch(
            _list, (1,), is_open, square, rest, rest_square, self.counts, left, n,
            PAYLOAD=True, B=MANY, num_warps=8,
        )  # fmt: skip
        found = search(self.tokens, ranked, rest, rest_square, below, self.every, square, self.origin, left, few)
        launch(
            _deltas_again, self.rows, self.tokens, ranked, rest, left, rest_square, order, *found, delta, self.flags,
            *self.size, self.unit, BK=32, **shape_of(few, n),
        )  # fmt: skip
        return delta

    def scores(self, density: Tensor, delta: Tensor, far: Tensor, ties: str) -> Tensor:
        """[n] fp32; where there is no denser token the largest distance counts, and fp32 says between whom that is."""
        launch(
            _largest, self.rows, self.tokens, self.chosen, self.copies, self.counts, far.argmax(), self.flags,
            *self.size, R=ROWS, BK=256, num_warps=4,
        )  # fmt: skip
        out = torch.full((self.n,), -torch.inf, dtype=torch.float32, device=delta.device)
        launch(
            _scores, self.numbers, self.chosen, self.copies, self.first, self.counts, density, delta, self.flags, out,
            self.n, STRICT=ties == "strict", LOWEST=torch.finfo(torch.float32).min, B=MANY, num_warps=4,
        )  # fmt: skip
        return out


def shape_of(kept: int, n: int) -> dict[str, int]:
    """Sizes of the lists that a search for the `kept` nearest among n leaves, and of those that they become."""
    slots = max(2, triton.next_power_of_2(kept))
    splits = min(SPLITS, triton.cdiv(n, tile_of(slots, False)["BN"]))
    width = triton.next_power_of_2(splits)
    return {"R": ROWS, "KEPT": kept, "KW": slots, "SPLITS": splits, "S": width, "W": width * slots, "num_warps": 4}


@triton.jit
def _list(marks, payload, out, out_payload, before, counts, n, PAYLOAD: tl.constexpr, B: tl.constexpr):
    """Where marks are, with what belongs to them; their number, and the number before."""
    to = tl.program_id(0).to(tl.int64) * 0
    for start in range(0, n, B):
        i = start + tl.arange(0, B)
        mark = tl.load(marks + i, mask=i < n, other=0).to(tl.int64)
        place = to + tl.cumsum(mark, 0) - 1
        tl.store(out + place, i.to(tl.int64), mask=mark != 0)
        if PAYLOAD:
            tl.store(out_payload + place, tl.load(payload + i, mask=mark != 0, other=0.0), mask=mark != 0)
        to += tl.sum(mark, 0)
    tl.store(counts, to)
    if PAYLOAD:
        tl.store(counts + 1, tl.load(before))
    else:
        tl.store(counts + 1, to)


@triton.jit
def _hash(
    tokens, chosen, counts, factor, out, n, channels, stride, WIDE: tl.constexpr, R: tl.constexpr, BK: tl.constexpr
):
    """Sums of bits with factors, as `hashing.hashes`; the largest number of all beyond the last candidate."""
    i, count = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R), tl.load(counts)
    place = tl.load(chosen + i, mask=i < count, other=0)
    total = tl.full((R,), 0, tl.int64)
    for start in range(0, channels, BK):
        k = start + tl.arange(0, BK)
        seen = (i < count)[:, None] & (k < channels)[None, :]
        x = tl.load(tokens + place[:, None] * stride + k[None, :], mask=seen, other=0.0)
        x = tl.where(x == 0, 0.0, x.to(tl.float64 if WIDE else tl.float32))  # -0 becomes 0
        bits = x.to(tl.int64 if WIDE else tl.int32, bitcast=True).to(tl.int64)
        total += tl.sum(bits * tl.load(factor + k, mask=k < channels, other=0)[None, :], 1)
    tl.store(out + i, tl.where(i < count, total, 9223372036854775807), mask=i < n)


@triton.jit
def _kinds(value, order, counts, copies, first, n, steps, B: tl.constexpr):
    """How many equal a token, 0 for one that is not the first of them, and which is."""
    i, count = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B), tl.load(counts)
    own = tl.load(value + i, mask=i < count, other=0)
    start = _first_not_before(value, own, tl.zeros_like(i), tl.where(i < count, i, 0), steps, False)
    end = _first_not_before(value, own + 1, tl.where(i < count, i, 0), tl.where(i < count, count, 0), steps, False)
    place = tl.load(order + i, mask=i < n, other=0)
    tl.store(copies + place, tl.where((start == i) & (i < count), end - i, 0), mask=i < n)
    tl.store(first + place, tl.load(order + start, mask=i < count, other=0), mask=i < n)


@triton.jit
def _middle(tokens, chosen, counts, middle, spread, channels, stride, most, S: tl.constexpr, BK: tl.constexpr):
    """Some channels of the mean of some tokens; what they add to its squared length, and to the bound of that."""
    part, count = tl.program_id(0), tl.load(counts)
    step = tl.maximum(count // most, 1)
    samples = (count + step - 1) // step
    k, s = part * BK + tl.arange(0, BK), tl.arange(0, S)
    total = tl.full((BK,), 0.0, tl.float64)
    square = tl.full((BK,), 0.0, tl.float64)
    for start in range(0, samples, S):
        i = (start + s) * step
        seen = (start + s < samples)[:, None] & (k < channels)[None, :]
        place = tl.load(chosen + i, mask=start + s < samples, other=0)
        x = tl.load(tokens + place[:, None] * stride + k[None, :], mask=seen, other=0.0).to(tl.float64)
        total += tl.sum(x, 0)
        square += tl.sum(x * x, 0)
    total = total / tl.maximum(samples, 1).to(tl.float64)
    tl.store(middle + k, total.to(middle.dtype.element_ty), mask=k < channels)
    tl.store(spread + 2 * part, tl.sum(total * total, 0))
    tl.store(spread + 2 * part + 1, 0.8 * tl.sum(square, 0) / tl.maximum(samples, 1).to(tl.float64))


@triton.jit
def _stays(spread, stays, parts, HALF: tl.constexpr, W: tl.constexpr):
    """Whether the mean is no longer than that bound, so that tokens stay where they are; only HALF precision may."""
    i = tl.arange(0, W)
    length = tl.sum(tl.load(spread + 2 * i, mask=i < parts, other=0.0), 0)
    bound = tl.sum(tl.load(spread + 2 * i + 1, mask=i < parts, other=0.0), 0)
    tl.store(stays, ((length <= bound) & HALF).to(tl.int64))


@triton.jit
def _squares(
    tokens, chosen, copies, counts, middle, stays, out, n, channels, stride, R: tl.constexpr, BK: tl.constexpr
):
    """Squared lengths; infinite for copies."""
    i, count = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R), tl.load(counts)
    alive = (i < count) & (tl.load(copies + i, mask=i < count, other=0) > 0)
    place = tl.load(chosen + i, mask=alive, other=0)
    shifted = tl.where(tl.load(stays) != 0, 0.0, 1.0)
    total = tl.full((R,), 0.0, tl.float32)
    for start in range(0, channels, BK):
        k = start + tl.arange(0, BK)
        seen = alive[:, None] & (k < channels)[None, :]
        origin = tl.load(middle + k, mask=k < channels, other=0.0) * shifted
        x = tl.load(tokens + place[:, None] * stride + k[None, :], mask=seen, other=0.0).to(origin.dtype)
        x = tl.where(seen, x - origin[None, :], 0.0).to(tl.float32)
        total += tl.sum(x * x, 1)
    tl.store(out + i, tl.where(alive, total, float("inf")), mask=i < n)


@triton.jit
def _joined(
    distance, point, i, valid, KEPT: tl.constexpr, SPLITS: tl.constexpr, R: tl.constexpr, KW: tl.constexpr,
    W: tl.constexpr,
):  # fmt: skip
    """[R, KW] one list a row from several: fp32 distances, the nearest first, and whose they are."""
    j, k = tl.arange(0, W), tl.arange(0, KW)
    base = i * (SPLITS * KW)
    row = tl.load(
        distance + base[:, None] + j[None, :], mask=valid[:, None] & (j < SPLITS * KW)[None, :], other=float("inf")
    )
    near = tl.full((R, KW), float("inf"), tl.float32)
    who = tl.full((R, KW), 0, tl.int64)
    for step in range(KEPT):
        least = tl.min(row, 1)
        place = tl.min(tl.where(row == least[:, None], j[None, :], W - 1), 1)
        name = tl.load(point + base + place, mask=valid & (least < float("inf")), other=0).to(tl.int64)
        near = tl.where(k[None, :] == step, least[:, None], near)
        who = tl.where(k[None, :] == step, name[:, None], who)
        row = tl.where(j[None, :] == place[:, None], float("inf"), row)
    return near, who


@triton.jit
def _entry(near, which, KW: tl.constexpr):
    """[R] one of a list's entries."""
    return tl.min(tl.where(tl.arange(0, KW)[None, :] == which, near, float("inf")), 1)


@triton.jit
def _noise(square, distance, unit):
    return unit * (3 * square + 2 * distance)


@triton.jit
def _doubt(near, own, valid, last, flags, unit, KEPT: tl.constexpr, KW: tl.constexpr):
    """[R] beyond what everybody lies who is not listed; and notes in `flags` if some `last` may lie there."""
    least, last = _entry(near, KEPT - 1, KW), tl.maximum(last, 0.0)
    reach = tl.where(least < float("inf"), least - _noise(own, least, unit), float("inf"))
    # Where distances are about as long as the points, another origin would tell no more.
    doubt = valid & (last + _noise(own, last, unit) > reach) & (own > 5 * last)
    tl.atomic_max(flags, 1, mask=tl.max(doubt.to(tl.int32), 0) > 0)
    return reach


@triton.jit
def _measured(tokens, index, a, who, wanted, channels, stride, R: tl.constexpr, KW: tl.constexpr, BK: tl.constexpr):
    """[R, KW] fp64 squared distances over C from tokens a [R] to points, by the words of the definition."""
    b = tl.load(index + who, mask=wanted, other=0)
    total = tl.full((R, KW), 0.0, tl.float64)
    if tl.max(tl.max(wanted.to(tl.int32), 1), 0) > 0:
        for start in range(0, channels, BK):
            k = start + tl.arange(0, BK)
            x = tl.load(tokens + a[:, None] * stride + k[None, :], mask=(k < channels)[None, :], other=0.0)
            seen = wanted[:, :, None] & (k < channels)[None, None, :]
            y = tl.load(tokens + b[:, :, None] * stride + k[None, None, :], mask=seen, other=0.0)
            step = x.to(tl.float64)[:, None, :] - y.to(tl.float64)
            total += tl.sum(step * step, 2)
    length = tl.sqrt(total) / tl.sqrt(total * 0 + channels)
    return tl.where(wanted, length * length, float("inf"))


@triton.jit
def _densities(
    tokens, chosen, copies, counts, square, distance, point, farthest,
    near_out, exact_out, who_out, reach_out, far, density, flags, n, neighbours, channels, stride, unit,
    WANTED: tl.constexpr, BK: tl.constexpr, R: tl.constexpr, KEPT: tl.constexpr, KW: tl.constexpr,
    SPLITS: tl.constexpr, S: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    i, k, s, count = (
        tl.program_id(0).to(tl.int64) * R + tl.arange(0, R),
        tl.arange(0, KW),
        tl.arange(0, S),
        tl.load(counts),
    )
    alive = (i < count) & (tl.load(copies + i, mask=i < count, other=0) > 0)
    own, a = tl.load(square + i, mask=alive, other=0.0), tl.load(chosen + i, mask=alive, other=0)
    near, who = _joined(distance, point, i, alive, KEPT, SPLITS, R, KW, W)
    last = _entry(near, WANTED - 1, KW)
    reach = _doubt(near, own, alive, last, flags, unit, KEPT, KW)
    wanted = alive[:, None] & (near <= (last + 2 * _noise(own, last, unit))[:, None]) & (near < float("inf"))
    exact = _measured(tokens, chosen, a, who, wanted, channels, stride, R, KW, BK)
    at, listed = i[:, None] * KEPT + k[None, :], alive[:, None] & (k < KEPT)[None, :]
    tl.store(near_out + at, near, mask=listed)
    tl.store(who_out + at, who, mask=listed)
    tl.store(exact_out + at, exact, mask=listed)
    tl.store(reach_out + i, reach, mask=alive)
    most = tl.load(farthest + i[:, None] * SPLITS + s[None, :], mask=alive[:, None] & (s < SPLITS)[None, :], other=0.0)
    tl.store(far + i, tl.max(most, 1), mask=i < n)
    # A point counts as often as there are copies of it.
    left = tl.load(copies + who, mask=wanted, other=0)
    row, total, taken = (
        tl.where(left > 0, exact, float("inf")),
        tl.full((R,), 0.0, tl.float64),
        tl.minimum(neighbours, count),
    )
    for _ in range(0, taken):
        least = tl.min(row, 1)
        place = tl.min(tl.where(row == least[:, None], k[None, :], KW - 1), 1)
        total += least
        left = tl.where(k[None, :] == place[:, None], left - 1, left)
        row = tl.where(left > 0, row, float("inf"))
    tl.store(density + i, tl.where(alive, -total / tl.maximum(taken, 1).to(tl.float64), -float("inf")), mask=i < n)


@triton.jit
def _ranks(
    falling, order, chosen, square, rank, below, ranked, ranked_square, n, steps, STRICT: tl.constexpr, B: tl.constexpr
):
    """Points by density: where each is in that order, and what is denser, which is all below a number."""
    i = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    place = tl.load(order + i, mask=i < n, other=0)
    limit = i
    if STRICT:
        own = tl.load(falling + i, mask=i < n, other=0.0)
        limit = _first_not_before(falling, own, tl.zeros_like(i), tl.where(i < n, i, 0), steps, True)
    tl.store(rank + place, i, mask=i < n)
    tl.store(below + i, limit, mask=i < n)
    tl.store(ranked + i, tl.load(chosen + place, mask=i < n, other=0), mask=i < n)
    tl.store(ranked_square + i, tl.load(square + place, mask=i < n, other=0.0), mask=i < n)


@triton.jit
def _deltas(
    tokens, chosen, copies, counts, square, near, exact, who, reach, rank, below, delta, is_open,
    n, channels, stride, unit, BK: tl.constexpr, R: tl.constexpr, KEPT: tl.constexpr, KW: tl.constexpr,
):  # fmt: skip
    """Squared distances to the nearest listed denser point; by rank, whether one that is not listed may be nearer."""
    i, k, count = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R), tl.arange(0, KW), tl.load(counts)
    alive = (i < count) & (tl.load(copies + i, mask=i < count, other=0) > 0)
    at, listed = i[:, None] * KEPT + k[None, :], alive[:, None] & (k < KEPT)[None, :]
    own, a = tl.load(square + i, mask=alive, other=0.0), tl.load(chosen + i, mask=alive, other=0)
    mine = tl.load(rank + i, mask=i < n, other=0)
    limit = tl.load(below + mine, mask=alive, other=0)
    apart = tl.load(near + at, mask=listed, other=float("inf"))
    name = tl.load(who + at, mask=listed, other=0)
    denser = listed & (apart < float("inf"))
    denser = denser & (tl.load(rank + name, mask=denser, other=0) < limit[:, None])
    apart = tl.where(denser, apart, float("inf"))
    known = tl.load(exact + at, mask=denser, other=float("inf"))
    closest = tl.min(apart, 1)
    wanted = denser & (apart <= (closest + 2 * _noise(own, closest, unit))[:, None]) & (known == float("inf"))
    known = tl.minimum(known, _measured(tokens, chosen, a, name, wanted, channels, stride, R, KW, BK))
    least = tl.min(known, 1)
    beyond = least * channels > tl.load(reach + i, mask=alive, other=0.0).to(tl.float64)
    tl.store(delta + i, least, mask=i < n)
    tl.store(is_open + mine, (alive & beyond & (limit > 0)).to(tl.uint8), mask=i < n)


@triton.jit
def _deltas_again(
    tokens, ranked, rest, left, rest_square, order, distance, point, farthest, delta, flags, n, channels, stride, unit,
    BK: tl.constexpr, R: tl.constexpr, KEPT: tl.constexpr, KW: tl.constexpr,
    SPLITS: tl.constexpr, S: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    valid = i < tl.load(left)
    if tl.max(valid.to(tl.int32), 0) > 0:
        mine, own = tl.load(rest + i, mask=valid, other=0), tl.load(rest_square + i, mask=valid, other=0.0)
        near, who = _joined(distance, point, i, valid, KEPT, SPLITS, R, KW, W)
        closest = _entry(near, 0, KW)
        _doubt(near, own, valid, closest, flags, unit, KEPT, KW)
        wanted = valid[:, None] & (near <= (closest + 2 * _noise(own, closest, unit))[:, None]) & (near < float("inf"))
        a = tl.load(ranked + mine, mask=valid, other=0)
        exact = _measured(tokens, ranked, a, who, wanted, channels, stride, R, KW, BK)
        tl.store(delta + tl.load(order + mine, mask=valid, other=0), tl.min(exact, 1), mask=valid)


@triton.jit
def _largest(tokens, chosen, copies, counts, one, flags, n, channels, stride, R: tl.constexpr, BK: tl.constexpr):
    i, count = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R), tl.load(counts)
    alive = (i < count) & (tl.load(copies + i, mask=i < count, other=0) > 0)
    a, b = (
        tl.load(chosen + i, mask=alive, other=0),
        tl.load(chosen + tl.minimum(tl.load(one), tl.maximum(count - 1, 0))),
    )
    b = tl.where(count > 0, b, 0)
    total = tl.full((R,), 0.0, tl.float64)
    for start in range(0, channels, BK):
        k = start + tl.arange(0, BK)
        x = tl.load(tokens + a[:, None] * stride + k[None, :], mask=(k < channels)[None, :], other=0.0).to(tl.float64)
        x -= tl.load(tokens + b * stride + k, mask=k < channels, other=0.0).to(tl.float64)[None, :]
        total += tl.sum(x * x, 1)
    length = tl.sqrt(total) / tl.sqrt(total * 0 + channels)
    length = tl.max(tl.where(alive, length * length, 0.0), 0)
    tl.atomic_max(flags + 1, length.to(tl.int64, bitcast=True))  # bits of numbers above 0 are in their order


@triton.jit
def _scores(
    chosen, copies, first, counts, density, delta, flags, out, n,
    STRICT: tl.constexpr, LOWEST: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    i, count = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B), tl.load(counts)
    here = i < count
    alive = here & (tl.load(copies + i, mask=here, other=0) > 0)
    head = tl.load(first + i, mask=here, other=0)
    apart = tl.load(delta + head, mask=here, other=1.0)
    apart = tl.where(apart < float("inf"), apart, tl.load(flags + 1).to(tl.float64, bitcast=True))
    score = tl.load(density + head, mask=here, other=0.0) + 0.5 * tl.log(tl.where(apart > 0, apart, 1.0))
    score = tl.where(apart > 0, tl.maximum(score, LOWEST).to(tl.float32), LOWEST)
    if not STRICT:
        score = tl.where(alive, score, LOWEST)
    tl.store(out + tl.load(chosen + i, mask=here, other=0), score, mask=here)
