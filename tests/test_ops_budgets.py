"""Shares, budgets, selections and segments against numbers worked out by hand."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_ops import at, equal, implementations, quick, rand, randn

from vidcompress import ops


# -- apportion ---------------------------------------------------------------------------------------------------------
def exact_shares(total: int, weights: list[float], caps: list[int]) -> list[Fraction]:
    """Water-filling in exact arithmetic."""
    share = [Fraction(0)] * len(weights)
    free, left = list(range(len(weights))), Fraction(total)
    while free:
        scale = left / sum(Fraction(weights[i]) for i in free)
        full = [i for i in free if Fraction(weights[i]) * scale > caps[i]]
        for i in full or free:
            share[i] = Fraction(caps[i]) if full else Fraction(weights[i]) * scale
        left -= sum(caps[i] for i in full)
        free = [i for i in free if i not in full] if full else []
    return share


@st.composite
def sharings(draw: st.DrawFn, weight: st.SearchStrategy) -> tuple[int, list[float], list[int]]:
    n = draw(st.integers(1, 9))
    weights = draw(st.lists(weight, min_size=n, max_size=n))
    caps = draw(st.lists(st.integers(0, 60) | st.just(99), min_size=n, max_size=n))
    return draw(st.integers(0, sum(caps))), weights, caps


@quick
@given(sharings(st.floats(1e-3, 1e3)))
def test_apportion_adds_up_below_the_caps(sharing: tuple[int, list[float], list[int]]) -> None:
    total, weights, caps = sharing
    counts = ops.apportion(total, weights, caps)
    assert sum(counts) == total
    assert all(0 <= c <= cap for c, cap in zip(counts, caps, strict=True))
    for count, share in zip(counts, exact_shares(total, weights, caps), strict=True):
        assert share - 1 - Fraction(1, 10**6) < count < share + 1 + Fraction(1, 10**6)


@settings(quick, max_examples=1000)
@given(sharings(st.integers(1, 7)))
@example((2, [4, 1, 1], [99] * 3))
def test_apportion_gives_the_rest_to_the_largest_remainders(sharing: tuple[int, list[float], list[int]]) -> None:
    # Weights are lengths here, as FastVID's: equal remainders are common, and the lowest index has to win.
    total, weights, caps = sharing
    share = exact_shares(total, weights, caps)
    want = [math.floor(s) for s in share]
    for i in sorted(range(len(share)), key=lambda i: (want[i] - share[i], i))[: total - sum(want)]:
        want[i] += 1
    assert ops.apportion(total, weights, caps) == want


@pytest.mark.parametrize(
    ("total", "weights", "caps", "want"),
    [
        (10, [1, 1], [10, 10], [5, 5]),
        (3, [1, 1], [10, 10], [2, 1]),  # equal remainders: the lowest
        (2, [4, 1, 1], [9, 9, 9], [2, 0, 0]),  # 4/3, 1/3, 1/3: three equal remainders, the lowest
        (10, [1, 3], [10, 10], [3, 7]),  # 2.5, 7.5: the lowest
        (10, [3, 1], [10, 10], [8, 2]),
        (10, [3, 1], [4, 10], [4, 6]),  # the first is capped, the other gets what it turned away
        (9, [6, 2, 1], [3, 9, 9], [3, 4, 2]),  # 6 left at 2 : 1
        (12, [8, 3, 1], [2, 5, 9], [2, 5, 5]),  # two caps, one after the other
        (0, [1, 2], [5, 5], [0, 0]),
        (7, [1, 2], [3, 4], [3, 4]),
        (29, [0.29, 0.71], [100, 100], [8, 21]),
        (1, [5.0], [1], [1]),
        (0, [1.0], [0], [0]),
        (5, [1.0, 0.0], [3, 10], [3, 2]),  # a weight that underflowed gets what nobody else can take
    ],
)
def test_apportion_by_hand(total: int, weights: list[float], caps: list[int], want: list[int]) -> None:
    assert ops.apportion(total, weights, caps) == want


def test_apportion_is_proportional_where_it_divides() -> None:
    assert ops.apportion(60, [1, 2, 3], [99] * 3) == [10, 20, 30]
    assert ops.apportion(60, [0.1, 0.2, 0.3], [99] * 3) == [10, 20, 30]


def test_apportion_refuses_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="6 tokens do not fit under caps that add up to 5"):
        ops.apportion(6, [1, 1], [2, 3])
    with pytest.raises(ValueError, match="6 tokens do not fit under caps that add up to 5"):
        ops.apportion(6, [1, 1], [2, 3], [1, 1])
    with pytest.raises(ValueError, match="2 tokens do not reach floors that add up to 3"):
        ops.apportion(2, [1, 1], [9, 9], [1, 2])


def shares_between(total: int, weights: list[int], caps: list[int], floors: list[int]) -> list[Fraction]:
    """clip(s * weight, floor, cap) with the s that makes them add up, between two of its breakpoints, exactly."""

    def at_scale(s: Fraction) -> list[Fraction]:
        return [
            min(max(s * w, Fraction(low)), Fraction(cap)) for w, low, cap in zip(weights, floors, caps, strict=True)
        ]

    limits = [*zip(weights, floors, strict=True), *zip(weights, caps, strict=True)]
    breaks = sorted({Fraction(limit) / w for w, limit in limits} | {Fraction(0)})
    high = next((s for s in breaks if sum(at_scale(s)) >= total), breaks[-1])
    low = max((s for s in breaks if s < high), default=high)
    below, above = sum(at_scale(low)), sum(at_scale(high))
    return at_scale(high if above == below else low + (high - low) * (total - below) / (above - below))


@st.composite
def sharings_between(draw: st.DrawFn) -> tuple[int, list[int], list[int], list[int]]:
    n = draw(st.integers(1, 9))
    weights = draw(st.lists(st.integers(1, 40), min_size=n, max_size=n))
    caps = draw(st.lists(st.integers(0, 30), min_size=n, max_size=n))
    floors = [draw(st.integers(0, 1) | st.integers(0, cap)) if cap else 0 for cap in caps]
    floors = [min(low, cap) for low, cap in zip(floors, caps, strict=True)]
    return draw(st.integers(sum(floors), sum(caps))), weights, caps, floors


@settings(quick, max_examples=1000)
@given(sharings_between())
@example((10, [1, 9], [10, 10], [4, 0]))
@example((10, [1, 9, 2], [10, 3, 10], [2, 0, 0]))  # the cap takes away more than the floor adds
@example((10, [1, 9, 2], [10, 7, 10], [4, 0, 0]))  # and the other way round
def test_apportion_between_floors_and_caps(sharing: tuple[int, list[int], list[int], list[int]]) -> None:
    total, weights, caps, floors = sharing
    counts = ops.apportion(total, weights, caps, floors)
    assert sum(counts) == total
    assert all(low <= c <= cap for low, c, cap in zip(floors, counts, caps, strict=True))
    share = shares_between(total, weights, caps, floors)
    assert sum(share) == total
    want = [math.floor(s) for s in share]
    for i in sorted(range(len(share)), key=lambda i: (want[i] - share[i], i))[: total - sum(want)]:
        want[i] += 1
    assert counts == want
    assert ops.apportion(total, [w / 7 for w in weights], caps, floors) == want  # only proportions count


@quick
@given(sharings(st.floats(1e-3, 1e3)))
def test_apportion_with_floors_of_zero(sharing: tuple[int, list[float], list[int]]) -> None:
    total, weights, caps = sharing
    assert ops.apportion(total, weights, caps, [0] * len(caps)) == ops.apportion(total, weights, caps)


@pytest.mark.parametrize(
    ("total", "weights", "caps", "floors", "want"),
    [
        (10, [1, 9], [10, 10], [0, 0], [1, 9]),
        (10, [1, 9], [10, 10], [3, 0], [3, 7]),
        (10, [0, 1], [10, 10], [1, 1], [1, 9]),
        (10, [0, 1], [10, 6], [1, 1], [4, 6]),  # zeros get what nobody else can take
        (10, [0, 0], [10, 10], [1, 1], [5, 5]),
        (10, [0, 0, 0], [10, 10, 10], [6, 0, 0], [6, 2, 2]),
        (10, [6, 3], [15, 5], [1, 1], [7, 3]),  # 6.67 and 3.33
        (2, [5, 3], [9, 9], [1, 1], [1, 1]),
        (18, [5, 3], [9, 9], [1, 1], [9, 9]),
        (12, [8, 1, 1, 1], [5, 9, 9, 9], [0, 0, 0, 4], [5, 2, 1, 4]),  # a cap and a floor: 3 left at 1 : 1
    ],
)
def test_apportion_with_floors_by_hand(
    total: int, weights: list[float], caps: list[int], floors: list[int], want: list[int]
) -> None:
    assert ops.apportion(total, weights, caps, floors) == want


# -- anchor_budgets ----------------------------------------------------------------------------------------------------
def spans(lengths: list[int]) -> list[tuple[int, int]]:
    ends = [sum(lengths[: i + 1]) for i in range(len(lengths))]
    return list(zip([0, *ends[:-1]], ends, strict=True))


@st.composite
def placings(draw: st.DrawFn) -> dict[str, Any]:
    lengths = draw(st.lists(st.integers(1, 9), min_size=1, max_size=6))
    positions, frames = draw(st.integers(1, 12)), sum(lengths)
    budget = draw(st.integers(1, max(1, frames * positions - 1)))
    if budget >= frames * positions:  # only P = 1 and one frame: nothing to remove, the op is not called
        positions, budget = 2, 1
    salient = draw(st.integers(0, budget // frames))
    weights = draw(st.lists(st.floats(0.01, 10), min_size=len(lengths), max_size=len(lengths)))
    return {
        "segments": spans(lengths),
        "positions": positions,
        "budget": budget,
        "salient": min(salient, positions),
        "weights": weights,
        "interval": draw(st.integers(1, 6)),
    }


@quick
@given(placings())
def test_anchor_budgets_place_exactly_the_budget(case: dict[str, Any]) -> None:
    salient, anchors = ops.anchor_budgets(**case)
    frames, p = case["segments"][-1][1], case["positions"]
    assert len(salient) == len(anchors) == frames
    assert sum(salient) + sum(anchors) == case["budget"]
    assert all(s >= 0 and a >= 0 and s + a <= p for s, a in zip(salient, anchors, strict=True))
    assert min(salient) >= case["salient"]
    # Anchors lie in the last frame of a segment and every interval-th before it, a later one has never fewer.
    for start, end in case["segments"]:
        own = [f for f in range(start, end) if (end - 1 - f) % case["interval"] == 0]
        assert all(anchors[f] == 0 for f in range(start, end) if f not in own)
        counts = [anchors[f] for f in own]
        assert counts == sorted(counts) and counts[-1] - counts[0] <= 1
    # More salient tokens than asked for only where one less would not leave room for the anchors.
    least = min(salient)
    anchor_frames = [f for s, e in case["segments"] for f in range(s, e) if (e - 1 - f) % case["interval"] == 0]
    if least > case["salient"]:
        assert len(anchor_frames) * (p - least + 1) < case["budget"] - frames * (least - 1)
    # And one more than the others only where all anchor frames are full: the first frames without anchors.
    more = [f for f in range(frames) if salient[f] > least]
    if more:
        assert all(least + anchors[f] == p for f in anchor_frames)
        assert more == [f for f in range(frames) if f not in anchor_frames][: len(more)]
        assert {salient[f] for f in more} == {least + 1}


@pytest.mark.parametrize(
    ("lengths", "positions", "budget", "salient", "weights", "interval", "want"),
    [
        # Five frames, p = 4: anchors in frames 0 and 4. 50 - 5 * 6 = 20 anchors, 10 each.
        pytest.param([5], 50, 50, 6, [5], 4, ([6] * 5, [10, 0, 0, 0, 10]), id="even"),
        # One more: the latest gets it.
        pytest.param([5], 50, 51, 6, [5], 4, ([6] * 5, [10, 0, 0, 0, 11]), id="the latest gets the rest"),
        # Frames 0, 2, 4 of five; 8 anchors are 2, 3, 3.
        pytest.param([5], 50, 13, 1, [5], 2, ([1] * 5, [2, 0, 3, 0, 3]), id="two of three"),
        # Two segments, weights 3 : 1: 6 and 2 of 8; the first has anchors in frames 0 and 2.
        pytest.param([3, 1], 9, 12, 1, [3, 1], 2, ([1] * 4, [3, 0, 3, 2]), id="weights"),
        # The second segment's one frame holds 4 - 1 = 3 anchors; the rest goes to the other.
        pytest.param([2, 1], 4, 7, 1, [1, 9], 1, ([1] * 3, [0, 1, 3]), id="a full frame"),
        # A_k = 1 anchor frame of room 4 - 1 = 3 cannot take 12 - 4 = 8; with 2 salient: room 2, rest 4; with 3: 0.
        pytest.param([4], 4, 12, 1, [1], 4, ([3] * 4, [0] * 4), id="salient rises"),
        # 13: 3 salient in four frames leave 1, which the anchor frame takes.
        pytest.param([4], 4, 13, 1, [1], 4, ([3] * 4, [0, 0, 0, 1]), id="salient rises, one anchor"),
        # 15: the anchor frame takes 1 and two are left: one more salient in the first frames without anchors.
        pytest.param([4], 4, 15, 1, [1], 4, ([4, 4, 3, 3], [0, 0, 0, 1]), id="last resort"),
        pytest.param([1], 5, 4, 0, [1], 4, ([0], [4]), id="one frame, no salient"),
        pytest.param([1] * 3, 2, 3, 1, [1] * 3, 4, ([1] * 3, [0] * 3), id="no anchors"),
    ],
)
def test_anchor_budgets_by_hand(
    lengths: list[int], positions: int, budget: int, salient: int, weights: list[float], interval: int, want: tuple
) -> None:
    assert ops.anchor_budgets(spans(lengths), positions, budget, salient, weights, interval) == want


# -- select_in_turn -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["naive", "torch"])
def test_selection_by_hand(kind: str) -> None:
    # Position 0 is static: picked in frame 0, it counts 9 / 5 - 1.7 in frames 1 and 2. Frame 3 is another segment.
    run = implementations("select_in_turn")[kind == "torch"]
    scores = torch.tensor([[9.0, 1, 1, 1], [9, 3, 3, 2], [9, 0, 0, 0], [9, 0, 0, 0]], dtype=torch.float64)
    static = torch.tensor([[True, False, False, False], [False] * 4])
    picked, repeated = run(scores, (0.2, 1.7), [(0, 3), (3, 4)], static, torch.tensor([1, 2, 1, 2]))
    assert picked.int().tolist() == [[1, 0, 0, 0], [0, 1, 1, 0], [1, 0, 0, 0], [1, 1, 0, 0]]
    assert repeated.int().tolist() == [[1, 0, 0, 0]] * 3 + [[0] * 4]


@pytest.mark.parametrize("kind", ["naive", "torch"])
def test_selection_without_scores_for_what_comes_again(kind: str) -> None:
    # Position 0 is static: picked in frame 0, it comes after all others but the last, which is out of the question.
    run = implementations("select_in_turn")[kind == "torch"]
    scores = torch.tensor([[9, 1, 2, -math.inf], [9, 1, -3, -math.inf], [9, 1, -3, -math.inf]])
    static = torch.tensor([[True, False, False, False]])
    picked, _ = run(scores, None, [(0, 3)], static, torch.tensor([1, 2, 4]))
    assert picked.int().tolist() == [[1, 0, 0, 0], [0, 1, 1, 0], [1, 1, 1, 1]]
    picked, _ = run(scores, None, [(0, 3)], static, torch.tensor([1, 3, 1]))
    assert picked.int().tolist() == [[1, 0, 0, 0], [1, 1, 1, 0], [0, 1, 0, 0]]


@quick
@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.integers(1, 9), st.booleans())
def test_selection_equals_definition(lengths: list[int], positions: int, has_scores: bool) -> None:
    naive, fast = implementations("select_in_turn")
    frames = sum(lengths)
    scores, again = rand(frames, positions, seed=1).double().round(decimals=1), (0.5, 0.05)
    scores.flatten()[::7] = math.nan
    if not has_scores:
        scores, again = (scores.float() - 0.5).masked_fill_(scores > 0.7, -math.inf), None
    static, counts = rand(len(lengths), positions) < 0.6, (rand(frames, seed=3) * (positions + 1)).long()
    arguments = (scores, again, spans(lengths), static, counts)
    assert equal(fast(*arguments), naive(*arguments))
    assert torch.equal(naive(*arguments)[0].sum(1), counts)


# -- segment_frames ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("degrees", "c", "tau", "want"),
    [
        # Neighbours 10, 50, 10, 20 degrees apart: cosines .985, .643, .985, .940.
        pytest.param([0, 10, 60, 70, 90], 1, -1, [(0, 5)], id="one segment"),
        pytest.param([0, 10, 60, 70, 90], 2, -1, [(0, 2), (2, 5)], id="the least similar"),
        pytest.param([0, 10, 60, 70, 90], 3, -1, [(0, 2), (2, 4), (4, 5)], id="the two least similar"),
        pytest.param([0, 10, 60, 70, 90], 1, 0.95, [(0, 2), (2, 4), (4, 5)], id="below the threshold"),
        pytest.param([0, 10, 60, 70, 90], 2, 0.95, [(0, 2), (2, 4), (4, 5)], id="c is the least number"),
        pytest.param([0, 10, 60, 70, 90], 1, 1.01, [(0, 1), (1, 2), (2, 3), (3, 4), (4, 5)], id="all"),
        pytest.param([0, 10, 60, 70, 90], 9, -1, [(0, 1), (1, 2), (2, 3), (3, 4), (4, 5)], id="t < c"),
        pytest.param([0, 90], 8, -1, [(0, 1), (1, 2)], id="t = 2"),
        pytest.param([30], 8, 0.9, [(0, 1)], id="t = 1"),
        pytest.param([30], 1, 0.9, [(0, 1)], id="t = 1, c = 1"),
    ],
)
def test_segments_by_hand(degrees: list[float], c: int, tau: float, want: list[tuple[int, int]]) -> None:
    assert ops.segment_frames(at(*degrees), c, tau) == want
    assert ops.segment_frames(at(*degrees).float() * 7, c, tau) == want


def test_segments_ties_go_to_the_earliest() -> None:
    frames = torch.eye(6)  # all neighbours alike: cosine 0
    assert ops.segment_frames(frames, 3, -1) == [(0, 1), (1, 2), (2, 6)]


def test_segments_threshold_is_strict() -> None:
    frames = torch.tensor([[1.0, 0], [0, 1], [1, 0]])  # cosine exactly 0
    assert ops.segment_frames(frames, 1, 0.0) == [(0, 3)]
    assert ops.segment_frames(frames, 1, 1e-9) == [(0, 1), (1, 2), (2, 3)]


def test_frozen_frames_are_alike_exactly() -> None:
    # 40 copies of frames whose own cosine comes out as 1 - ulp for some: rounding must not choose the boundary.
    frames = randn(40, 1, 77).expand(40, 3, 77)
    for copies in frames.unbind(0):
        assert ops.segment_frames(copies, 1, 1.0) == [(0, 3)]
        assert ops.segment_frames(copies, 2, -1) == [(0, 1), (1, 3)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_segments_are_cut_in_better_than_storage_precision(dtype: torch.dtype) -> None:
    frames = (randn(1, 64) + 0.02 * randn(12, 64, seed=1)).to(dtype)
    assert ops.segment_frames(frames, 5, -1) == ops.segment_frames(frames.double(), 5, -1)


def test_black_frames_are_like_nothing() -> None:
    frames = torch.zeros(4, 3)
    assert ops.segment_frames(frames, 1, 0.9) == [(0, 1), (1, 2), (2, 3), (3, 4)]  # cosine 0 with all
    frames[2:] = 1
    assert ops.segment_frames(frames, 1, -1) == [(0, 4)]
    assert ops.segment_frames(frames, 1, 0.5) == [(0, 1), (1, 2), (2, 4)]


@quick
@given(st.integers(1, 12), st.integers(1, 15), st.floats(-1, 1.1))
def test_segments_cover_the_video(t: int, c: int, tau: float) -> None:
    segments = ops.segment_frames(randn(t, 5, seed=t), c, tau)
    assert [s for s, _ in segments] == [0, *[e for _, e in segments[:-1]]] and segments[-1][1] == t
    assert all(s < e for s, e in segments)
    assert len(segments) >= min(c, t)
