"""The vocabulary: what is a lawful map of tokens, what it does to features, and that two maps compose."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vidcompress.tokens import Reduction, Site, VideoTokens

quick = settings(deadline=None, derandomize=True, max_examples=200)


def dense(reduction: Reduction) -> torch.Tensor:
    """[K, N] fp64 matrix of a reduction, from the words of its docstring."""
    matrix = torch.zeros(len(reduction), reduction.num_source, dtype=torch.float64)
    mixed = set()
    if reduction.slot is not None:
        for slot, source, weight in zip(reduction.slot, reduction.source, reduction.weight, strict=True):
            matrix[slot, source] += weight.double()
            mixed.add(int(slot))
    for slot, source in enumerate(reduction.keep.tolist()):
        if slot not in mixed:
            matrix[slot, source] = 1
    return matrix


@st.composite
def reductions(draw: st.DrawFn, num_source: int | None = None) -> Reduction:
    """Any lawful map: some slots mixed, some not, the same source twice in a slot, weights of zero, triplets unsorted.

    Weights are multiples of 1/8, so that fp32 holds every product and sum of them.
    """
    n = num_source or draw(st.integers(1, 9))
    keep = sorted(draw(st.sets(st.integers(0, n - 1), min_size=1)))
    triplet = st.tuples(st.integers(0, len(keep) - 1), st.integers(0, n - 1), st.integers(-8, 8))
    triplets = draw(st.none() | st.lists(triplet, max_size=12))
    if triplets is None:
        return Reduction(torch.tensor(keep), n)
    columns = [[t[i] for t in triplets] for i in range(3)]
    slot, source = (torch.tensor(c, dtype=torch.long) for c in columns[:2])
    return Reduction(torch.tensor(keep), n, slot, source, torch.tensor(columns[2], dtype=torch.float32) / 8)


# -- Reduction: what it means ------------------------------------------------------------------------------------------
@quick
@given(reductions())
def test_apply_is_the_dense_product(reduction: Reduction) -> None:
    features = torch.arange(reduction.num_source * 3, dtype=torch.float32).view(-1, 3).sin()
    want = dense(reduction) @ features.double()
    torch.testing.assert_close(reduction.check().apply(features).double(), want, atol=2e-6, rtol=0)


@quick
@given(st.data())
def test_then_is_the_product_of_the_two(data: st.DataObject) -> None:
    first = data.draw(reductions())
    later = data.draw(reductions(len(first)))
    both = first.then(later).check()
    assert both.num_source == first.num_source
    assert torch.equal(both.keep, first.keep[later.keep])
    torch.testing.assert_close(dense(both), dense(later) @ dense(first), atol=1e-6, rtol=0)


@quick
@given(st.data())
def test_then_is_associative(data: st.DataObject) -> None:
    a = data.draw(reductions())
    b = data.draw(reductions(len(a)))
    c = data.draw(reductions(len(b)))
    left, right = a.then(b).then(c), a.then(b.then(c))
    assert torch.equal(left.keep, right.keep)
    torch.testing.assert_close(dense(left), dense(right), atol=1e-5, rtol=0)


@quick
@given(reductions())
def test_the_identity_changes_nothing_on_either_side(reduction: Reduction) -> None:
    before = Reduction.identity(reduction.num_source).then(reduction)
    after = reduction.then(Reduction.identity(len(reduction)))
    for other in (before, after):
        assert torch.equal(other.keep, reduction.keep)
        torch.testing.assert_close(dense(other), dense(reduction), atol=0, rtol=0)


def test_then_by_hand() -> None:
    # Survivors 0 and 2 of four tokens: (t0 + t1) / 2 and t2. Then one survivor: a quarter of the first, the rest of
    # the second. So t0 / 8 + t1 / 8 + 3/4 t2.
    first = Reduction(torch.tensor([0, 2]), 4, torch.tensor([0, 0]), torch.tensor([0, 1]), torch.tensor([0.5, 0.5]))
    later = Reduction(torch.tensor([1]), 2, torch.tensor([0, 0]), torch.tensor([0, 1]), torch.tensor([0.25, 0.75]))
    both = first.then(later)
    assert both.keep.tolist() == [2]
    assert dense(both).tolist() == [[0.125, 0.125, 0.75, 0]]
    assert both.apply(torch.tensor([[8.0], [16.0], [4.0], [1.0]])).tolist() == [[6.0]]


def test_then_of_pure_pruning_stays_pure() -> None:
    both = Reduction(torch.tensor([1, 3, 4]), 6).then(Reduction(torch.tensor([0, 2]), 3))
    assert both.keep.tolist() == [1, 4] and both.slot is None


def test_then_has_no_triplets_for_what_both_hand_on() -> None:
    first = Reduction(torch.tensor([0, 2, 3]), 4, torch.tensor([0]), torch.tensor([1]), torch.tensor([1.0]))
    both = first.then(Reduction(torch.tensor([0, 2]), 3))
    assert both.slot is not None and both.slot.tolist() == [0] and both.keep.tolist() == [0, 3]
    assert first.then(Reduction(torch.tensor([1, 2]), 3)).slot is None


def test_then_refuses_maps_that_do_not_meet() -> None:
    with pytest.raises(ValueError, match="map to 2 tokens by a map of 3"):
        Reduction(torch.tensor([0, 1]), 5).then(Reduction.identity(3))


def test_merging_names_survivors_by_their_source() -> None:
    parts = [
        (torch.tensor([5, 5]), torch.tensor([5, 0]), torch.tensor([0.75, 0.25])),
        (torch.tensor([2]), torch.tensor([3]), torch.tensor([1.0])),
    ]
    reduction = Reduction.merging(torch.tensor([2, 4, 5]), 6, parts, {"a": 1})
    assert dense(reduction).tolist() == [[0, 0, 0, 1, 0, 0], [0, 0, 0, 0, 1, 0], [0.25, 0, 0, 0, 0, 0.75]]
    assert reduction.notes == {"a": 1}


@pytest.mark.parametrize("parts", [[], [(torch.empty(0, dtype=torch.long),) * 2 + (torch.empty(0),)]])
def test_merging_nothing_is_pruning(parts: list) -> None:
    reduction = Reduction.merging(torch.tensor([1]), 3, parts, {"a": 1})
    assert reduction.slot is None and reduction.notes == {"a": 1}


def test_identity() -> None:
    identity = Reduction.identity(3)
    features = torch.randn(3, 2)
    assert identity.is_identity and len(identity) == 3
    assert torch.equal(identity.apply(features), features)
    assert not Reduction(torch.tensor([0, 1]), 3).is_identity
    assert not Reduction(torch.arange(1), 1, torch.zeros(1).long(), torch.zeros(1).long(), torch.ones(1)).is_identity


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_apply_keeps_the_dtype_and_unmixed_tokens_bit_for_bit(dtype: torch.dtype) -> None:
    features = torch.randn(5, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    slot, source = torch.tensor([1, 1]), torch.tensor([0, 3])
    out = Reduction(torch.tensor([0, 1, 4]), 5, slot, source, torch.tensor([0.5, 0.5])).apply(features)
    assert out.dtype == dtype
    assert torch.equal(out[[0, 2]], features[[0, 4]])
    torch.testing.assert_close(out[1], ((features[0].double() + features[3].double()) / 2).to(dtype))


def test_apply_refuses_another_number_of_tokens() -> None:
    with pytest.raises(ValueError, match="maps 3 tokens, got 4"):
        Reduction.identity(3).apply(torch.zeros(4, 2))


def mixed(slot: list, source: list, weight: list) -> dict:
    return {"slot": torch.tensor(slot), "source": torch.tensor(source), "weight": torch.tensor(weight)}


@pytest.mark.parametrize(
    ("keep", "triplets"),
    [
        pytest.param([2, 1], {}, id="descending"),
        pytest.param([1, 1], {}, id="twice"),
        pytest.param([-1, 1], {}, id="negative"),
        pytest.param([1, 4], {}, id="beyond"),
        pytest.param([], {}, id="nothing"),
        pytest.param([0, 1, 2, 3, 4], {}, id="more than there are"),
        pytest.param([0.0, 1.0], {}, id="floats"),
        pytest.param([True, False, True], {}, id="a mask instead of indices"),
        pytest.param([[0, 1]], {}, id="two-dimensional"),
        pytest.param([0, 1], mixed([2], [0], [1.0]), id="slot beyond"),
        pytest.param([0, 1], mixed([-1], [0], [1.0]), id="slot negative"),
        pytest.param([0, 1], mixed([0], [4], [1.0]), id="source beyond"),
        pytest.param([0, 1], mixed([0], [-1], [1.0]), id="source negative"),
        pytest.param([0, 1], mixed([0], [1], [float("nan")]), id="weight NaN"),
        pytest.param([0, 1], mixed([0], [1], [float("inf")]), id="weight inf"),
        pytest.param([0, 1], mixed([0, 1], [1, 1], [1.0]), id="lengths differ"),
    ],
)
def test_check_refuses_what_is_no_map(keep: list, triplets: dict) -> None:
    kept = torch.tensor(keep, dtype=None if keep else torch.long)
    with pytest.raises(RuntimeError, match="unlawful reduction"):
        Reduction(kept, 4, **triplets).check()


def test_check_returns_what_is_lawful() -> None:
    for reduction in (Reduction(torch.tensor([0, 3]), 4), Reduction(torch.tensor([0, 3]), 4, **mixed([1], [0], [0.5]))):
        assert reduction.check() is reduction


def test_reduction_to_dict_is_json() -> None:
    notes = {"segments": [(0, 2), (2, 3)], "weights": torch.tensor([0.5, 0.25]), 3: {"deep": torch.tensor([1])}}
    reduction = Reduction(torch.tensor([0, 3]), 4, **mixed([1], [0], [0.5]), notes=notes)
    back = json.loads(json.dumps(reduction.to_dict()))
    assert back == {
        "keep": [0, 3],
        "num_source": 4,
        "merge": {"slot": [1], "source": [0], "weight": [0.5]},
        "notes": {"segments": [[0, 2], [2, 3]], "weights": [0.5, 0.25], "3": {"deep": [1]}},
    }
    assert Reduction.identity(1).to_dict()["merge"] is None


# -- VideoTokens and Site ----------------------------------------------------------------------------------------------
def test_frames_are_a_view_in_grid_order() -> None:
    features = torch.arange(24.0).view(12, 2)
    tokens = VideoTokens(features, (3, 2, 2))
    assert len(tokens) == 12
    assert tokens.frames.shape == (3, 4, 2)
    assert torch.equal(tokens.frames[1, 2], features[1 * 4 + 2])
    assert tokens.frames.data_ptr() == features.data_ptr()


def test_a_partly_emptied_video() -> None:
    tokens = VideoTokens(torch.zeros(2, 3), (2, 2, 2), torch.tensor([1, 6]))
    assert len(tokens) == 2


@pytest.mark.parametrize(
    ("shape", "grid", "index", "says"),
    [
        ((7, 2), (2, 2, 2), None, r"7 tokens do not fill the grid \(2, 2, 2\) \(8 tokens"),
        ((8, 2), (2, 2, 2), [0, 1], r"8 tokens .*\(2 tokens expected"),
        ((2, 2, 2), (2, 1, 1), None, r"\[tokens, channels\], got shape \(2, 2, 2\)"),
        ((0, 2), (0, 2, 2), None, r"\(0, 2, 2\) has an empty side"),
        ((4, 2), (1, -2, -2), None, "empty side"),
    ],
)
def test_video_tokens_refuse_what_does_not_fit(shape: tuple, grid: tuple, index: list | None, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        VideoTokens(torch.zeros(shape), grid, None if index is None else torch.tensor(index))


def test_a_signal_that_was_not_asked_for() -> None:
    tokens = VideoTokens(torch.zeros(1, 1), (1, 1, 1), signals={"saliency.head": torch.ones(1)})
    assert tokens.signal("saliency.head").item() == 1
    with pytest.raises(KeyError, match=r"'frame_features'.*needs.*saliency\.head"):
        tokens.signal("frame_features")


def test_sites() -> None:
    assert Site.projector() == Site.projector() != Site.decoder(0)
    assert Site.decoder(2) != Site.decoder(3)
    assert str(Site.projector()) == "projector" and str(Site.decoder(7)) == "decoder[7]"
    assert len({Site.decoder(1), Site.decoder(1), Site.projector()}) == 2
    assert Site.decoder(3).is_inner and Site.decoder(0).is_inner and not Site.projector().is_inner


def test_the_stage_of_a_site_does_not_count() -> None:
    first, second = Site.decoder(4, 0), Site.decoder(4, 1)
    assert first == second and hash(first) == hash(second) and (first.stage, second.stage) == (0, 1)
    assert {first: "found"}[second] == "found"


def test_tokens_that_entered() -> None:
    index = torch.tensor([1, 6])
    assert VideoTokens(torch.zeros(2, 3), (2, 2, 2), index).entered == 2
    assert VideoTokens(torch.zeros(2, 3), (2, 2, 2), index, entered=5).entered == 5
