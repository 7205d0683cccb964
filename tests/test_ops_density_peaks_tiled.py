"""density_peaks of many tokens, tile by tile: the same peaks as its definition, without the matrix of distances."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from neartie import assert_same_choice
from test_ops import implementations, rand, randn
from test_ops_density_peaks import PEAKS, Work
from test_ops_text_attention import Largest
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from vidcompress import ops
from vidcompress.ops.density_peaks import tiled
from vidcompress.ops.density_peaks import torch as fast

NEIGHBOURS = 7


@pytest.fixture(params=["one tile", "many tiles, one leader at a time"])
def anywhere(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even small rows go tile by tile."""
    monkeypatch.setattr(fast, "TILED_ABOVE", 0)
    if request.param != "one tile":
        monkeypatch.setattr(tiled, "TILE", 37)
        monkeypatch.setattr(tiled, "LEADERS", 1)


def still(noise: float, frames: int = 24, positions: int = 25, channels: int = 32) -> Tensor:
    """Frames that are the same but for noise."""
    return (randn(1, positions, channels) + noise * randn(frames, positions, channels, seed=1)).flatten(0, 1)


def clustered(spread: float, n: int = 600) -> Tensor:
    return randn(9, 32)[torch.arange(n) % 9] + spread * randn(n, 32, seed=3)


def with_copies(x: Tensor, share: float = 0.02) -> Tensor:
    """Some tokens are copies of others, to the last bit."""
    x, number = x.clone(), max(2, int(share * len(x)))
    x[-number:] = x[:number]
    return x


def nested() -> Tensor:
    """Groups of groups of groups, each a thousand times smaller."""
    large, middle, small = randn(1, 1, 6, 32), randn(1, 9, 6, 32, seed=1), randn(12, 9, 6, 32, seed=2)
    return (large.double() + 1e-3 * middle.double() + 1e-6 * small.double()).flatten(0, 2)


TOKENS = {
    "random": lambda: randn(600, 32),
    "random x 0.001": lambda: randn(600, 32) * 1e-3,
    "random x 10": lambda: randn(600, 32) * 10,
    "clustered": lambda: clustered(0.1),
    "clustered x 0.001": lambda: clustered(0.1) * 1e-3,
    "clustered x 10": lambda: clustered(0.1) * 10,
    "copies": lambda: with_copies(randn(600, 32)),
    "copies of clusters": lambda: with_copies(clustered(0.01)),
    "many copies": lambda: randn(20, 32)[torch.arange(600) % 20],
    "letterbox": lambda: randn(600, 32) * (torch.arange(600) % 3 > 0)[:, None],
    "all equal": lambda: randn(1, 32).expand(300, 32),
    "still 0.1": lambda: still(0.1),
    "still 0.01": lambda: still(0.01),
    "still 0.001": lambda: still(0.001),
    "still 0.00001": lambda: still(0.00001),
    "still x 0.001": lambda: still(0.001) * 1e-3,
    "still x 10": lambda: still(0.001) * 10,
    "still + 100": lambda: still(0.001) + 100,
    "still, copies": lambda: with_copies(still(0.001)),
    "still, one channel": lambda: still(0.001, channels=1),
    "still, bfloat16": lambda: still(0.01).bfloat16(),
    "still, float16": lambda: still(0.001).half(),
    "still, float64": lambda: still(0.001).double() + 1000,
    "nested": nested,
    "flat": lambda: still(0.001, 600, 1),
    "flat + 50": lambda: still(0.001, 600, 1) + 50,
    "slow": lambda: (randn(1, 25, 32) + 0.01 * randn(24, 25, 32, seed=2).cumsum(0)).flatten(0, 1),
    "one-hot": lambda: torch.eye(200),
    "whole numbers": lambda: torch.cartesian_prod(*[torch.arange(4.0)] * 4),
    "outlier": lambda: randn(600, 32) * (1 + 999 * (torch.arange(600) == 77))[:, None],
    "views": lambda: randn(64, 600, seed=4).T[:, ::2],
}


def true_scores(x: Tensor, k: int, ties: str = "index") -> Tensor:
    """[n] log scores in fp64, all tokens candidates."""
    square = torch.stack([(x.double() - y).square().sum(1) for y in x.double()]) / x.shape[1]
    density = -square.sort(1).values[:, :k].mean(1)
    denser = density > density[:, None]
    if ties == "index":
        denser |= (density == density[:, None]).tril(-1)
    delta = square.masked_fill(~denser, math.inf).amin(1)
    return density + 0.5 * delta.where(delta.isfinite(), square.max()).log()


def one(x: Tensor) -> tuple[Tensor, Tensor]:
    return x[None], torch.ones(1, len(x), dtype=torch.bool)


@pytest.mark.usefixtures("anywhere")
@pytest.mark.parametrize("ties", ["index", "strict"])
@pytest.mark.parametrize("case", TOKENS)
def test_peaks_are_those_of_the_definition(case: str, ties: str) -> None:
    naive, run = implementations("density_peaks")
    x = TOKENS[case]()
    got, want = (f(*one(x), NEIGHBOURS, ties)[0] for f in (run, naive))
    torch.testing.assert_close(got, want, atol=2e-6, rtol=2e-6)
    true = true_scores(x, NEIGHBOURS, ties)
    true = true.clamp_min(torch.finfo(torch.float32).min)
    for m in (1, len(x) // 50, len(x) // 10, len(x) // 3):
        mine, right, best = (ops.top_tokens(s[None], m)[0] for s in (got, want, true))
        assert torch.equal(mine, right) or assert_same_choice(mine, best, true, logarithmic=True)


@pytest.mark.usefixtures("anywhere")
@pytest.mark.parametrize("ties", ["index", "strict"])
@pytest.mark.parametrize("case", PEAKS)
def test_small_rows_too(case: str, ties: str) -> None:
    naive, run = implementations("density_peaks")
    tokens, candidates, k = PEAKS[case]()
    torch.testing.assert_close(
        run(tokens, candidates, k, ties), naive(tokens, candidates, k, ties), atol=2e-6, rtol=2e-6
    )


@pytest.mark.usefixtures("anywhere")
@pytest.mark.parametrize("ties", ["index", "strict"])
@pytest.mark.parametrize("case", ["random", "copies", "many copies", "still 0.001", "all equal"])
def test_candidates_and_noise(case: str, ties: str) -> None:
    naive, run = implementations("density_peaks")
    x = torch.stack([TOKENS[case](), TOKENS[case]().flip(0)])
    candidates, noise = rand(*x.shape[:2], seed=1) < 0.8, 1e-6 * rand(*x.shape[:2], seed=5)
    got, want = (f(x, candidates, NEIGHBOURS, ties, noise) for f in (run, naive))
    assert torch.equal(got.isfinite(), candidates)
    torch.testing.assert_close(got, want, atol=2e-6, rtol=2e-6)
    other = torch.where(candidates[..., None], x, torch.nan)
    assert torch.equal(run(other, candidates, NEIGHBOURS, ties, noise), got)


@pytest.mark.usefixtures("anywhere")
@pytest.mark.parametrize("case", ["random", "still 0.001", "copies"])
def test_the_same_bits_twice_and_whatever_else_is_in_the_batch(case: str) -> None:
    x, candidates = one(TOKENS[case]())
    once = fast.density_peaks(x, candidates, NEIGHBOURS)
    pair = fast.density_peaks(torch.cat([-x, x]), candidates.expand(2, -1), NEIGHBOURS)
    assert torch.equal(pair[1:], once)


def test_long_rows_go_tile_by_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def note(tokens: Tensor, candidates: Tensor, neighbours: int, ties: str, noise: Tensor | None) -> Tensor:
        seen.append((tuple(tokens.shape), neighbours, ties, noise))
        return tokens[:, 0]

    monkeypatch.setattr(fast, "tiled_scores", note)
    for n, calls in ((fast.TILED_ABOVE, 0), (fast.TILED_ABOVE + 1, 2)):
        x = randn(2, n, 1)
        out = fast.density_peaks(x, torch.ones(2, n, dtype=torch.bool), 3, "strict")
        assert seen == [((n, 1), 3, "strict", None)] * calls
        assert out.shape == (2, n) and torch.equal(out, x[..., 0]) == bool(calls)
    none = fast.density_peaks(randn(0, n, 1), torch.ones(0, n, dtype=torch.bool), 3)
    assert none.shape == (0, n) and none.dtype == torch.float32


@pytest.fixture
def many() -> Iterator[dict[str, Tensor]]:
    """Enough tokens that tiles and lists are small beside all distances."""
    yield {"random": randn(3000, 64), "still": still(0.001, 30, 100, 64), "flat": still(0.001, 3000, 1, 64)}


def test_memory_holds_tiles_and_lists_only(many: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiled, "TILE", 256)
    monkeypatch.setattr(tiled, "LEADERS", 20)
    monkeypatch.setitem(tiled.CHUNK_ELEMENTS, "cpu", 1 << 14)
    for x in many.values():
        with Largest() as largest:
            fast.density_peaks(*one(x), NEIGHBOURS)
        # Beside the input (192,000 elements) the longest are the tile and the lists of 15 neighbours.
        assert largest.elements <= max(x.numel(), 256**2, 20 * 3000, 2 * 15 * 3000) < 3000**2 / 40


def test_work_is_that_of_half_the_distances(many: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiled, "TILE", 128)
    for kind, x in many.items():
        with FlopCounterMode(display=False) as flops:
            fast.density_peaks(*one(x), NEIGHBOURS)
        # All distances once are 2 n^2 C. Half of them, the rest of the tiles on the diagonal, and who has no denser
        # neighbour among the nearest or, in a still picture, is searched around a leader.
        assert flops.get_total_flops() < {"random": 0.75, "still": 0.8, "flat": 0.75}[kind] * 2 * 3000**2 * 64
    with Work() as work:
        fast.density_peaks(*one(many["random"]), NEIGHBOURS)
    with Work() as still_work:
        fast.density_peaks(*one(many["still"]), NEIGHBOURS)
    assert still_work.elements < 2.5 * work.elements


@pytest.mark.parametrize("channels", [8, 64, 896])
def test_rounding_stays_below_its_bound(channels: int) -> None:
    # The search is exact as long as this holds.
    index = torch.arange(120)
    x = torch.cat([randn(60, channels), randn(1, channels) + 1e-3 * randn(60, channels, seed=1)])
    points = tiled.Points(x, index)
    near = tiled._scan(points, index, index, points.middle(), 120)
    true = (x.double()[:, None] - x.double()[near.point]).square().sum(-1)
    bound = points.noise(near.square[:, None], near.distance)
    assert ((near.distance - true).abs() < 0.5 * bound).all()


def test_a_still_picture_needs_its_leaders(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast, "TILED_ABOVE", 0)
    x = one(TOKENS["still 0.00001"]())
    right = ops.top_tokens(implementations("density_peaks")[0](*x, NEIGHBOURS), 60)
    assert torch.equal(ops.top_tokens(fast.density_peaks(*x, NEIGHBOURS), 60), right)
    monkeypatch.setattr(tiled, "_search_again", lambda *_: None)
    assert not torch.equal(ops.top_tokens(fast.density_peaks(*x, NEIGHBOURS), 60), right)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_copies_are_told_by_all_their_bits(dtype: torch.dtype) -> None:
    x = randn(50, 6)[torch.arange(200) % 50].to(dtype)
    x[60] = x[61]
    x[70, 5] = -x[70, 5]
    x[[3, 8], 2] = torch.tensor([0.0, -0.0], dtype=dtype)
    x[8] = x[3] * torch.tensor([1, 1, -1, 1, 1, 1], dtype=dtype)
    copies, first = tiled._copies(x, torch.arange(5, 200))
    same: dict[Any, list[int]] = {}
    for i, row in enumerate(x[5:].tolist()):
        same.setdefault(tuple(v + 0.0 for v in row), []).append(i)
    assert first.tolist() == [group[0] for group in same.values()]
    assert [copies.eq(c).nonzero().squeeze(1).tolist() for c in range(len(first))] == list(same.values())


def test_a_row_that_is_long_as_it_is(many: dict[str, Tensor]) -> None:
    naive, run = implementations("density_peaks")
    for x in many.values():
        few = one(with_copies(x[: fast.TILED_ABOVE + 50, :8]))
        torch.testing.assert_close(run(*few, NEIGHBOURS), naive(*few, NEIGHBOURS), atol=2e-6, rtol=2e-6)
