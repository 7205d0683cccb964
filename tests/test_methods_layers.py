"""HieraVid, FastV and PyramidDrop on examples worked out by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from scenes import (
    PROJECTOR,
    randn,
    scene,
    walk,
)
from torch import Tensor

from vidcompress.config import load
from vidcompress.method import Pipeline, decay_for
from vidcompress.methods.fastv import FastV
from vidcompress.methods.hieravid import HieraVid
from vidcompress.methods.pyramiddrop import PyramidDrop
from vidcompress.tokens import Grid, Site, VideoTokens


# -- HieraVid ----------------------------------------------------------------------------------------------------------
def mean(values: list[float]) -> float:
    return sum(values) / len(values)


@pytest.mark.parametrize("ratio", [0.01, 0.05, 0.1, 0.13, 0.2, 0.25, 0.3, 0.5, 0.552, 0.6, 0.9, 1.0])
@pytest.mark.parametrize("q", [None, 0.1, 0.5, 1.0])
def test_hieravid_keeps_the_ratio_on_average(ratio: float, q: float | None) -> None:
    fractions = HieraVid(retention_ratio=ratio, q=q).fractions()
    assert mean(fractions) == pytest.approx(ratio) and len(fractions) == 4
    assert 1 >= fractions[0] >= fractions[1] >= fractions[2] >= fractions[3] > 0
    assert fractions[2] / fractions[1] == pytest.approx(fractions[1] / fractions[0])


@pytest.mark.parametrize(
    ("ratio", "q"),
    [(0.01, 0.23), (0.1, 0.23), (0.15, 0.2925), (0.2, 0.355), (0.25, 0.4825), (0.3, 0.61), (0.31, 0.61), (0.5, 0.61)],
)
def test_hieravid_interpolates_the_decay(ratio: float, q: float) -> None:
    fractions = HieraVid(retention_ratio=ratio).fractions()
    assert fractions[1] / fractions[0] == pytest.approx(q)


def test_hieravid_schedule_by_hand() -> None:
    # q = 1/2: x (1 + 1/2 + 1/4 + 1/8) / 4 = r, so that r = 15/32 is x = 1, and r = 15/64 is x = 1/2.
    assert HieraVid(retention_ratio=15 / 64, q=0.5).fractions() == pytest.approx([1 / 2, 1 / 4, 1 / 8, 1 / 16])
    assert HieraVid(retention_ratio=15 / 32, q=0.5).fractions() == pytest.approx([1, 1 / 2, 1 / 4, 1 / 8])
    # Beyond that all tokens stay at first, and q grows: 1 + .8 + .64 + .512 = 4 * .738.
    assert HieraVid(retention_ratio=0.738, q=0.5).fractions() == pytest.approx([1, 0.8, 0.64, 0.512])
    assert HieraVid(retention_ratio=1.0).fractions() == [1, 1, 1, 1]
    # A first fraction of one's own decides, and the ratio only gives q.
    assert HieraVid(retention_ratio=0.2, first=0.6).fractions() == pytest.approx([0.6, 0.213, 0.075615, 0.026843325])
    counts = Pipeline.of(HieraVid(retention_ratio=15 / 64, q=0.5)).counts((8, 5, 5))
    assert counts == {PROJECTOR: 100, Site.decoder(7): 50, Site.decoder(14): 25, Site.decoder(21): 12}


def test_hieravid_cannot_merge_the_first_frame() -> None:
    # 36 tokens a frame: two frames keep 36 of 72 at 10 %, later stages go on with their own shares.
    method = HieraVid(retention_ratio=0.1)
    x, q = 0.4 / (1 + 0.23 + 0.23**2 + 0.23**3), 0.23
    for t, first in {1: 36, 2: 36, 3: 36, 4: 44}.items():
        n = t * 36
        counts = list(Pipeline.of(method).counts((t, 6, 6)).values())
        assert counts == [first, *(max(1, math.floor(x * q**i * n)) for i in (1, 2, 3))]
        reduction = method.decide(scene("slow", (t, 6, 6)), PROJECTOR)
        assert len(reduction) == first
        if first == 36:
            assert reduction.keep.tolist() == list(range(36))
            segments = [(0, t)]
            assert reduction.notes["segments"] == segments  # every position of every frame is merged


@pytest.mark.parametrize(
    ("name", "x", "q", "counts"),
    [
        ("hieravid-30", 0.54, 0.61, [3386, 2065, 1260, 768]),
        ("hieravid-20", 0.545, 0.355, [3418, 1213, 430, 152]),
        ("hieravid-10", 0.335, 0.23, [2101, 483, 111, 25]),
    ],
)
def test_hieravid_presets(name: str, x: float, q: float, counts: list[int]) -> None:
    method = load(name)
    assert type(method) is HieraVid
    assert method.retention_ratio == pytest.approx(x * (1 + q + q**2 + q**3) / 4)  # near the ratio that it is called by
    assert method.retention_ratio == pytest.approx(int(name[-2:]) / 100, rel=0.1)
    assert method.fractions() == pytest.approx([x, x * q, x * q**2, x * q**3])
    assert list(Pipeline.of(method).counts((32, 14, 14)).values()) == counts
    with pytest.raises(ValueError, match=r"retention_ratio=0\.25 contradicts other settings, which fix it at"):
        load(method, retention_ratio=0.25)


def drifting() -> Tensor:
    """[4, 2, 2]: position 0 keeps its direction for three frames, position 1 in frames 1 and 2; then both turn."""
    return torch.tensor([[[1.0, 0], [1, 0]], [[2, 0], [0, 1]], [[3, 0], [0, 2]], [[0, 1], [-1, 0]]])


def test_hieravid_merges_runs_by_hand() -> None:
    # Three tokens go: the ones that have not turned. Position 0 of frames 1 and 2 joins frame 0, mean (2, 0); position
    # 1 of frame 2 joins frame 1, mean (0, 1.5). Overlaps 1/2, 1 and 0: frame 3 begins a segment.
    # Segments: means of (2, 0), (1, 0), (0, 1.5) and of (0, 1), (-1, 0), with cosine -.25 / sqrt(1.25 * .5) = -.31623.
    #   b_1 = .5 * -.31623 + .5 * (1 - 0) = .34189, b_2 = .5 * 0 + .5 * (1 + .31623) = .65811; z = -1 and 1.
    x = drifting()
    tokens = VideoTokens(x.flatten(0, 1), (4, 1, 2))
    reduction = HieraVid(first=5 / 8).decide(tokens, PROJECTOR)
    assert reduction.keep.tolist() == [0, 1, 3, 6, 7]
    want = torch.tensor([[2.0, 0], [1, 0], [0, 1.5], [0, 1], [-1, 0]])
    torch.testing.assert_close(reduction.apply(tokens.features), want, atol=1e-5, rtol=0)
    assert reduction.notes["segments"] == [(0, 3), (3, 4)]
    assert reduction.notes["b"].tolist() == pytest.approx([0.341886, 0.658114], abs=1e-5)
    assert reduction.notes["z"].tolist() == pytest.approx([-1, 1])
    novelty = HieraVid(first=5 / 8, lam=0.0).decide(tokens, PROJECTOR).notes["b"].tolist()
    stands_for = HieraVid(first=5 / 8, lam=1.0).decide(tokens, PROJECTOR).notes["b"].tolist()
    assert novelty == pytest.approx([1, 1.316228], abs=1e-5)
    assert stands_for == pytest.approx([-0.316228, 0], abs=1e-5)


@pytest.mark.parametrize(
    ("beta", "segments"),
    [
        (0.0, [(0, 4)]),
        (0.5, [(0, 3), (3, 4)]),  # an overlap of exactly beta is no boundary
        (0.51, [(0, 1), (1, 3), (3, 4)]),
        (1.0, [(0, 1), (1, 3), (3, 4)]),
    ],
)
def test_hieravid_segments(beta: float, segments: list[tuple[int, int]]) -> None:
    tokens = VideoTokens(drifting().flatten(0, 1), (4, 1, 2))
    reduction = HieraVid(first=5 / 8, beta=beta).decide(tokens, PROJECTOR)
    assert reduction.notes["segments"] == segments
    # Runs do not stop at a boundary: frame 1's position 0 is in frame 0's token all the same.
    assert reduction.keep.tolist() == [0, 1, 3, 6, 7]
    if len(segments) == 1:
        assert reduction.notes["z"].tolist() == [0]


def test_hieravid_segments_that_score_alike() -> None:
    # Two segments at a right angle but for rounding: both score 1/2, and a difference of 1e-9 is none.
    x = torch.tensor([[1.0, 0.0], [2e-9, 1.0]]).repeat_interleave(6, 0)
    notes = HieraVid(first=1.0).decide(VideoTokens(x, (2, 2, 3)), PROJECTOR).notes
    assert notes["segments"] == [(0, 1), (1, 2)] and notes["z"].tolist() == [0, 0]
    assert notes["b"].tolist() == pytest.approx([0.5, 0.5])
    assert HieraVid(first=1.0, eps=0.0).decide(VideoTokens(x, (2, 2, 3)), PROJECTOR).notes["z"].abs().tolist() == (
        pytest.approx([1, 1])
    )


def test_hieravid_marks_equals_by_index() -> None:
    # A still video: every token is as like the one before as any other; the earliest go first.
    x = randn(1, 6, 8).expand(5, -1, -1).flatten(0, 1)
    reduction = HieraVid(first=20 / 30).decide(VideoTokens(x, (5, 2, 3)), PROJECTOR)
    assert reduction.keep.tolist() == [*range(6), *range(16, 30)]
    assert reduction.notes["z"].eq(0).all() or len(reduction.notes["segments"]) > 1


def test_hieravid_notes_segments_even_if_nothing_is_merged() -> None:
    tokens = scene("slow", (6, 3, 3), 24)
    method = HieraVid(first=1.0, q=0.5, beta=0.4)
    steps = list(walk(method, tokens))
    assert steps[0].reduction.is_identity and steps[0].reduction.notes["segments"] == [(f, f + 1) for f in range(6)]
    assert [len(s.reduction) for s in steps] == [54, 27, 13, 6]
    assert sum(steps[2].reduction.notes["budgets"]) == 13 and sum(steps[2].reduction.notes["sizes"]) == 27


def staged(x: Tensor, index: list[int], grid: Grid, z: list[float], ends: list[int], last: Tensor) -> VideoTokens:
    """Tokens at one of HieraVid's later stages."""
    segments = list(zip([0, *ends[:-1]], ends, strict=True))
    notes = {"segments": segments, "z": torch.tensor(z, dtype=torch.float64)}
    return VideoTokens(x, grid, torch.tensor(index), {"last_text_hidden": last}, notes, math.prod(grid))


@pytest.mark.parametrize(
    ("r_var", "sizes", "z", "budgets"),
    [
        # Half of 20 stays: a_3 / a_2 = 1/2.
        (0.0, [10, 10], [-1.0, 1.0], [5, 5]),
        (0.1, [10, 10], [-1.0, 1.0], [4, 6]),
        (0.1, [15, 5], [-1.0, 1.0], [7, 3]),  # 6 and 3, times 10/9: 6.67 and 3.33
        (0.1, [20, 0], [-1.0, 1.0], [10, 0]),  # an emptied segment
        (1.0, [10, 10], [-1.0, 1.0], [1, 9]),  # shares 0 and 1: one token is left to a segment that has any
        (1.0, [14, 6], [-1.0, 1.0], [4, 6]),  # no more than there are
        (1.0, [10, 10], [0.1, 1.0], [4, 6]),  # shares .6 and 1, not 1.5: 3.75 and 6.25
        (0.1, [8, 8, 4], [-1.0, 0.0, 1.0], [3, 4, 3]),  # 3.2, 4, 2.4 times 10/9.6: 3.33, 4.17, 2.5
    ],
)
def test_hieravid_budgets_by_hand(r_var: float, sizes: list[int], z: list[float], budgets: list[int]) -> None:
    grid = (4, 1, 10)  # 40 tokens, so that the third stage keeps a quarter
    ends = {2: [2, 4], 3: [1, 2, 4]}[len(sizes)]
    starts = [0, *(10 * end for end in ends[:-1])]
    index = [start + i for start, size in zip(starts, sizes, strict=True) for i in range(size)]
    x = randn(20, 24)
    tokens = staged(x, index, grid, z, ends, randn(24, seed=3))
    method = HieraVid(first=1.0, q=0.5, r_var=r_var)
    reduction = method.decide(tokens, Site.decoder(14, 2))
    assert reduction.notes["sizes"] == sizes
    assert reduction.notes["budgets"] == budgets
    segment = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    assert segment[reduction.keep].bincount(minlength=len(sizes)).tolist() == budgets


def test_hieravid_has_fewer_tokens_than_segments() -> None:
    # Four segments, two tokens: no segment is sure of one.
    x = torch.eye(8)[:4] + 0.1
    tokens = staged(x, [0, 1, 2, 3], (4, 1, 1), [0.0] * 4, [1, 2, 3, 4], torch.ones(8))
    reduction = HieraVid(first=1.0, q=0.5**0.5, r_var=0.0).decide(tokens, Site.decoder(14, 2))
    assert reduction.notes["budgets"] == [1, 1, 0, 0] and reduction.keep.tolist() == [0, 1]


def test_hieravid_relevance_by_hand() -> None:
    # Dot products with the last instruction token: 1, -3, 2, 2, 0. Of the equals the lower index; order restored.
    x = torch.tensor([[1.0, 9], [-3, 0], [2, 5], [2, -5], [0, 7]])
    signals = {"last_text_hidden": torch.tensor([1.0, 0])}
    tokens = VideoTokens(x, (1, 1, 5), torch.arange(5), signals)
    for keep, want in {0.2: [2], 0.4: [2, 3], 0.6: [0, 2, 3], 0.8: [0, 2, 3, 4]}.items():
        method = HieraVid(first=1.0, q=keep)
        assert method.decide(tokens, Site.decoder(7, 1)).keep.tolist() == want


def test_hieravid_prefers_another_view_to_a_copy() -> None:
    # 0 and 1 are copies and the most relevant. Relevance alone takes both; the DPP one of them, and then 2, which is
    # less relevant but new. Logits 2, 2, 1.9 and 0, over the root of 2.
    x = torch.tensor([[2.0, 0], [2, 0], [0, 1.9], [0, 0]])
    tokens = staged(x, [0, 1, 2, 3], (4, 1, 1), [0.0], [4], torch.ones(2))
    assert HieraVid(first=1.0, q=0.5).decide(tokens, Site.decoder(7, 1)).keep.tolist() == [0, 1]
    assert HieraVid(first=1.0, q=0.5**0.5).decide(tokens, Site.decoder(14, 2)).keep.tolist() == [0, 2]


def test_hieravid_kernels() -> None:
    # Relevance is nearly equal, so that the dot product prefers the long tokens, and the cosine what is most relevant.
    x = torch.tensor([[0.0, 0, 9, 0], [0, 0, 0, 8], [1.01, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0], [-9, -9, 0, 0]])
    tokens = staged(x, list(range(6)), (6, 1, 1), [0.0], [6], torch.tensor([0.1, 0.1, 0, 0]))
    kept = {
        kernel: HieraVid(first=1.0, q=(2 / 6) ** 0.5 + 1e-9, kernel=kernel).decide(tokens, Site.decoder(14, 2)).keep
        for kernel in ("dot", "cosine")
    }
    assert kept["dot"].tolist() == [0, 1] and kept["cosine"].tolist() == [2, 3]


@pytest.mark.parametrize(
    ("depth", "layers"), [(28, [7, 14, 21]), (32, [8, 16, 24]), (24, [6, 12, 18]), (30, [7, 15, 22])]
)
def test_stages_are_quarters(depth: int, layers: list[int]) -> None:
    assert HieraVid().sites(depth) == [PROJECTOR, *map(Site.decoder, layers)]
    assert PyramidDrop().sites(depth) == [Site.decoder(layer) for layer in layers]
    assert [site.stage for site in HieraVid().sites(depth)] == [0, 1, 2, 3]


@pytest.mark.parametrize("ratio", [0.25, 0.3, 0.46875, 0.738, 0.99, 1.0])
def test_decay(ratio: float) -> None:
    q = decay_for(ratio)
    assert 0 <= q <= 1 and 1 + q + q**2 + q**3 == pytest.approx(4 * ratio)


# -- FastV and PyramidDrop ---------------------------------------------------------------------------------------------
def attended(*attention: float, entered: int | None = None, index: list[int] | None = None) -> VideoTokens:
    row = torch.tensor(attention)
    signals = {"last_query_attention": row, "last_query_attention.previous": row}
    places = torch.arange(len(row)) if index is None else torch.tensor(index)
    return VideoTokens(randn(len(row), 4), (1, 1, int(places[-1]) + 1), places, signals, entered=entered or len(row))


def test_fastv_by_hand() -> None:
    tokens = attended(0.1, 0.5, 0.2, 0.2, 0.05)
    assert FastV().decide(tokens, Site.decoder(2)).keep.tolist() == [1, 2]  # floor(2.5), the lower of two equals
    assert FastV(retention_ratio=0.6).decide(tokens, Site.decoder(2)).keep.tolist() == [1, 2, 3]
    assert FastV(retention_ratio=0.1).decide(tokens, Site.decoder(2)).keep.tolist() == [1]
    assert FastV().sites(28) == [Site.decoder(2)] and FastV(layer=3).sites(28) == [Site.decoder(3)]
    assert FastV().positions == "keep" and FastV().budget((32, 14, 14)) == 6272
    assert Pipeline.of(FastV()).counts((4, 12, 12)) == {Site.decoder(2): 288}


def test_which_layer_pays_the_attention() -> None:
    # FastV goes by the layer before, PyramidDrop by the layer's own projections.
    tokens = attended(0.1, 0.2, 0.3, 0.4)
    tokens = replace(tokens, signals=tokens.signals | {"last_query_attention.previous": torch.tensor([4.0, 3, 2, 1])})
    assert FastV().decide(tokens, Site.decoder(2)).keep.tolist() == [0, 1]
    assert PyramidDrop().decide(tokens, Site.decoder(7, 0)).keep.tolist() == [2, 3]


def test_fastv_needs_a_layer_before() -> None:
    with pytest.raises(ValueError, match="fastv: layer must be at least 1, got 0"):
        FastV(layer=0)
    with pytest.raises(ValueError, match=r"fastv acts at the input of layer 28; this decoder has 28 layers, 0 to 27"):
        Pipeline.of(FastV(layer=28)).stages(28)
    assert Pipeline.of(FastV(layer=27)).lengths((1, 2, 2)) == [4] * 27 + [2]


def test_pyramiddrop_by_hand() -> None:
    method = PyramidDrop()
    assert method.positions == "renumber"
    assert list(Pipeline.of(method).counts((1, 1, 12)).values()) == [6, 3, 1]  # of what entered: 6, 3, 1.5
    assert Pipeline.of(method).lengths((1, 1, 16)) == [16] * 7 + [8] * 7 + [4] * 7 + [2] * 7
    tokens = attended(0.3, 0.1, 0.3, 0.3, entered=6, index=[0, 2, 3, 5])
    assert method.decide(tokens, Site.decoder(14, 1)).keep.tolist() == [0]  # floor(6 / 4)
    assert method.decide(tokens, Site.decoder(7, 0)).keep.tolist() == [0, 2, 3]
    # Four of twelve are left, and half of those that entered would be more: nothing goes.
    assert method.decide(attended(0.3, 0.1, 0.3, 0.3, entered=12), Site.decoder(7, 0)).is_identity


@pytest.mark.parametrize("ratio", [0.25, 0.3, 0.46875, 0.7, 1.0])
def test_pyramiddrop_keeps_the_ratio_on_average(ratio: float) -> None:
    lengths = Pipeline.of(PyramidDrop(retention_ratio=ratio)).lengths((10, 100, 100))
    assert mean(lengths) / 100_000 == pytest.approx(ratio, abs=1e-4)


def test_pyramiddrop_at_layers_of_ones_own() -> None:
    method = PyramidDrop(layers=[3, 20], ratios=[0.5, 0.1])
    assert method.sites(24) == [Site.decoder(3), Site.decoder(20)] and [s.stage for s in method.sites(24)] == [0, 1]
    assert method.layers == (3, 20) and method.settings()["layers"] == [3, 20]
    assert Pipeline.of(method).lengths((1, 10, 10), 24) == [100] * 3 + [50] * 17 + [10] * 4
    only_layers = PyramidDrop(layers=[1, 2, 3])
    assert list(Pipeline.of(only_layers).counts((1, 1, 16))) == [Site.decoder(layer) for layer in (1, 2, 3)]


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"layers": [5, 2], "ratios": [0.5, 0.2]}, r"layers must be ascending, got \[5, 2\]"),
        ({"layers": [5, 5], "ratios": [0.5, 0.2]}, r"layers must be ascending, got \[5, 5\]"),
        ({"layers": [5, 9], "ratios": [0.2, 0.5]}, r"ratios are of the tokens that entered, .*got \[0\.2, 0\.5\]"),
        ({"layers": [5, 9]}, "2 layers need as many ratios, got 3"),
        ({"layers": [5, 9], "ratios": [0.5]}, "2 layers need as many ratios, got 1"),
        ({"ratios": [0.5, 0.2]}, "3 layers need as many ratios, got 2"),
        ({"ratios": [0.5, 0.2, 0.0]}, r"ratios must be in \(0, 1\], got 0\.0"),
        ({"ratios": [1.5, 0.2, 0.1]}, r"ratios must be in \(0, 1\], got 1\.5"),
        ({"layers": [-1, 2, 3]}, "layers must be at least 0, got -1"),
        ({"retention_ratio": 0.2}, r"retention_ratio must be in \[0\.25, 1\.?0?\], got 0\.2"),
    ],
)
def test_pyramiddrop_refuses(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=f"pyramiddrop: {says}"):
        PyramidDrop(**settings)
    with pytest.raises(ValueError, match=f"pyramiddrop: {says}"):
        load("pyramiddrop", **settings)


@pytest.mark.parametrize("layers", [7, "7", [], [7.5, 8, 9], [True, 8, 9], {"a": 1}, ["7", "8", "9"]])
def test_pyramiddrop_refuses_other_types(layers: Any) -> None:
    with pytest.raises(TypeError, match=r"pyramiddrop: layers must be (a list of int|of type int), got "):
        PyramidDrop(layers=layers)


def test_pyramiddrop_beyond_the_depth() -> None:
    method = PyramidDrop(layers=[8, 16, 24])
    with pytest.raises(ValueError, match=r"pyramiddrop acts at the input of layer 24; this decoder has 24 layers"):
        Pipeline.of(method).stages(24)
    assert len(Pipeline.of(method).stages(25)) == 3
