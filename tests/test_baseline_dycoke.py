"""DyCoke against recorded runs of its official code; on models, tests/test_eviction.py has it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from recorded import recorded
from reductions import per_frame

import vidcompress
from vidcompress.method import floor
from vidcompress.methods.dycoke import DyCoke
from vidcompress.methods.dycoke_decoding import DyCokeDecoding
from vidcompress.methods.dycoke_outer import DyCokeOuter
from vidcompress.tokens import CachedTokens, Grid, Site, VideoTokens

PROJECTOR = Site.projector()
GRIDS = [(t, 2, 5) for t in range(1, 14)] + [(32, 3, 3), (6, 1, 1)]

CASES = recorded("dycoke")


def clip(grid: Grid, seed: int = 0) -> VideoTokens:
    """Eight channels of noise."""
    generator = torch.Generator().manual_seed(seed)
    return VideoTokens(torch.randn(grid[0] * grid[1] * grid[2], 8, generator=generator), grid)


# -- recorded runs -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("implementation", ["torch", "naive"])
@pytest.mark.parametrize("name", CASES)
def test_as_recorded(name: str, implementation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VIDCOMPRESS_OPS", implementation)
    facts, case = CASES[name]
    features, params = case["in.features"], facts["params"]
    grid = (*features.shape[:2], 1)
    method = DyCokeOuter(k=params["k"], official=True)
    reduction = method.decide(VideoTokens(features.flatten(0, 1), grid), PROJECTOR)
    assert torch.equal(reduction.keep, case["out.index_ascending"].long())
    assert per_frame(reduction, grid) == case["out.count_per_frame"].tolist()
    assert method.exact and len(reduction) == method.budget(grid) == facts["facts"]["n_tokens"]
    # The code orders a pruned frame by similarity; the set and the vectors are the same.
    order = case["out.index"].long().argsort()
    assert torch.equal(reduction.apply(features.flatten(0, 1)), case["out.tokens"][order])


# -- by hand -----------------------------------------------------------------------------------------------------------
def turned(*angles: list[float]) -> VideoTokens:
    """Tokens of the plane, given by their angles in degrees: a list for every frame."""
    a = torch.deg2rad(torch.tensor(angles))
    return VideoTokens(torch.stack([a.cos(), a.sin()], -1).flatten(0, 1), (len(angles), 1, len(angles[0])))


def test_by_hand() -> None:
    # P = 3, K = 2/3: one token of every pruned frame. Frame 1 turned most against 0 at position 1. Frame 2 against 0:
    # 5, 61 and 80 degrees, position 2 (against frame 1 it is 5, 81 and 70, position 1). Frame 3 against 2: position 0
    # (against frame 0 it is position 2). Frame 5 against 4: position 1. Frame 6 against 4: position 0, although
    # against frame 5 it is position 1.
    tokens = turned(
        [0, 0, 0], [0, 20, 10], [5, -61, 80], [65, -61, 80],
        [0, 0, 0], [0, 90, 3], [30, 0, 0],
    )  # fmt: skip
    reduction = DyCokeOuter(k=2 / 3).decide(tokens, PROJECTOR)
    assert reduction.keep.tolist() == [0, 1, 2, 4, 8, 9, 12, 13, 14, 16, 18]
    assert reduction.slot is None


def test_official_by_hand() -> None:
    # Of seven frames the last is lost, and then the third frame of the last window would have none behind its pair.
    assert DyCokeOuter(k=0.5, official=True).frame_budgets((7, 1, 4)) == [4, 2, 2, 2, 4, 2, 0]
    assert DyCokeOuter(k=0.5).frame_budgets((7, 1, 4)) == [4, 2, 2, 2, 4, 2, 2]
    assert DyCokeOuter(k=0.5, official=True).frame_budgets((8, 1, 4)) == [4, 2, 2, 2, 4, 2, 4, 2]
    assert DyCokeOuter(k=0.5).frame_budgets((8, 1, 4)) == [4, 2, 2, 2, 4, 2, 2, 2]
    # 1 - .9 is .09999999999999998: of ten the code keeps none.
    assert DyCokeOuter(k=0.9, official=True).frame_budgets((2, 1, 10)) == [10, 0]
    assert DyCokeOuter(k=0.9).frame_budgets((2, 1, 10)) == [10, 1]
    # It stops at four frames; one frame alone is not lost.
    assert DyCokeOuter(k=0.5, official=True).frame_budgets((1, 1, 4)) == [4]


# -- what the library promises -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: "x".join(map(str, grid)))
def test_counts_are_exact(grid: Grid) -> None:
    t, p = grid[0], grid[1] * grid[2]
    tokens = clip(grid)
    for ratio in (0.25, 0.3, 0.475, 0.5, 0.77, 0.999, 1.0):
        method = DyCokeOuter(retention_ratio=ratio)
        reduction = method.decide(tokens, PROJECTOR)
        counts = per_frame(reduction, grid)
        assert len(reduction) == method.budget(grid) == max(-(-t // 4) * p, floor(ratio * t * p))
        assert counts == method.frame_budgets(grid) and set(counts[::4]) == {p}
        others = [count for f, count in enumerate(counts) if f % 4]
        assert not others or max(others) - min(others) <= 1
    assert DyCokeOuter(retention_ratio=1.0).decide(tokens, PROJECTOR).is_identity
    for k in (0.0, 0.3, 0.7, 1.0):
        for official in (False, True):
            method = DyCokeOuter(k=k, official=official)
            assert len(method.decide(tokens, PROJECTOR)) == method.budget(grid)


def test_k_and_the_ratio_are_two_names_of_one_thing() -> None:
    assert DyCokeOuter(k=0.7).retention_ratio == pytest.approx(0.475)
    for k in (0.3, 0.5, 0.7):
        by_ratio = DyCokeOuter(retention_ratio=1 - 0.75 * k).frame_budgets((8, 10, 10))
        assert by_ratio == DyCokeOuter(k=k).frame_budgets((8, 10, 10)) == [100, *[round(100 * (1 - k))] * 3] * 2
    # The same holds of the official counts, whichever of the two is given.
    for given in (DyCokeOuter(k=0.5, official=True), DyCokeOuter(retention_ratio=0.625, official=True)):
        assert given.frame_budgets((8, 10, 10)) == [100, 50, 50, 50, 100, 50, 100, 50]


@pytest.mark.parametrize("kind", ["still", "one token", "zero"])
def test_where_nothing_changes_the_first_tokens_stay(kind: str) -> None:
    grid = (6, 2, 3)
    features = {"still": clip((1, 2, 3)).features.repeat(6, 1), "one token": torch.ones(36, 8)}.get(kind)
    tokens = VideoTokens(torch.zeros(36, 8) if features is None else features, grid)
    reduction = DyCokeOuter(k=0.5).decide(tokens, PROJECTOR)
    want = [f * 6 + i for f in range(6) for i in range(3 if f % 4 else 6)]
    assert reduction.keep.tolist() == want


@pytest.mark.parametrize(
    ("settings", "error", "says"),
    [
        ({"retention_ratio": 0.2}, ValueError, r"retention_ratio must be in \[0.25, 1\], got 0.2"),
        ({"k": 1.2}, ValueError, r"k must be in \[0, 1\], got 1.2"),
        ({"k": -0.1}, ValueError, "k must be in"),
        ({"official": 1}, TypeError, "official must be of type bool, got 1"),
    ],
)
def test_bad_settings(settings: dict[str, Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        vidcompress.load("dycoke_outer", **settings)


# -- between decoding steps --------------------------------------------------------------------------------------------
DECODING = recorded("dycoke_decoding")


@pytest.mark.parametrize("implementation", ["torch", "naive"])
@pytest.mark.parametrize("name", DECODING)
def test_what_stays_cached_as_recorded(name: str, implementation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VIDCOMPRESS_OPS", implementation)
    facts, case = DECODING[name]
    start, n = facts["start"], facts["tokens"]
    index = torch.arange(n)
    chosen = [i for i, step in enumerate(facts["steps"]) if step["chosen"]]
    assert chosen[0] == 0  # the step after which the library chooses; the code may choose anew later, in the same way
    for i in chosen:
        attention, keep = case[f"step{i}.attention"], case[f"step{i}.keep"]  # [H, n], of the whole sequence
        own = keep[(keep >= start) & (keep < start + n)] - start
        assert len(keep) == attention.shape[1] - n + len(own)
        signals = {"last_query_attention.previous": attention.mean(0)[start : start + n]}
        method = DyCokeDecoding(retention_ratio=len(own) / n)
        kept = method.retain(CachedTokens((1, 1, n), index, signals, {}, n), Site.decoding(3))
        assert torch.equal(kept, own)
        asked = DyCokeDecoding(retention_ratio=1 - facts["p"]).count(Site.decoding(3), (1, 1, n), n, n)
        assert asked - len(own) in (0, 1)  # 60 * (1 - .8) is 11.999999999999996, of which the code keeps 11


def test_halves_and_the_whole() -> None:
    whole, grid = DyCoke(retention_ratio=0.5, keep_ratio=0.4, layer=2), (8, 4, 4)
    assert whole.sites(28) == [PROJECTOR, Site.decoding(2)] and DyCokeDecoding().sites(4) == [Site.decoding(3)]
    tokens = clip(grid)
    kept = whole.decide(tokens, PROJECTOR).keep
    assert torch.equal(kept, DyCokeOuter(retention_ratio=0.5).decide(tokens, PROJECTOR).keep)
    paid = {"last_query_attention.previous": torch.rand(64, generator=torch.Generator().manual_seed(3))}
    cached = CachedTokens(grid, kept, paid, {}, 64)
    stays = whole.retain(cached, Site.decoding(2))
    assert torch.equal(stays, DyCokeDecoding(retention_ratio=0.4).retain(cached, Site.decoding(2)))
    assert len(stays) == 25 and torch.equal(stays, paid["last_query_attention.previous"].topk(25).indices.sort().values)
    # Of what entered, whatever is left of it at the layer; and at least one.
    assert whole.count(Site.decoding(2), grid, 64, 20) == 20 and whole.count(Site.decoding(2), grid, 2, 2) == 1
