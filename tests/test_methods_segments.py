"""FastVID and InfoMerge on examples worked out by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from reductions import dense, same
from scenes import (
    PROJECTOR,
    assert_lawful,
    count,
    rand,
    randn,
    scene,
    video,
)
from torch import Tensor

from vidcompress import ops
from vidcompress.method import Method
from vidcompress.methods.fastvid import FastVID
from vidcompress.methods.infomerge import InfoMerge
from vidcompress.tokens import Grid, Reduction, VideoTokens


# -- FastVID, by hand --------------------------------------------------------------------------------------------------
def by_hand() -> VideoTokens:
    """Three frames of five tokens in the plane. 0.9 and 0.8 mark the two most attended tokens of every frame; nothing
    is merged into them, so their vectors do not matter."""
    s = [9.0, 9]
    features = [
        [s, s, [1, 0], [1, 2], [4, 0]],  # s, s, a, b, c
        [[-3, 1], s, s, [2, 2], [0, -2]],  # e, s, s, f, g
        [[0, 1], [-2, 3], [3, 0], s, s],  # p, q, s2
    ]
    attention = [[0.8, 0.9, 0.1, 0.2, 0.3], [0.1, 0.9, 0.8, 0.3, 0.1], [0.2, 0.1, 0.3, 0.9, 0.8]]
    return video(torch.tensor(features).flatten(0, 1), (3, 1, 5), torch.tensor(attention))


def fastvid(**settings: Any) -> FastVID:
    """One segment of three frames; p = 2, so frames 0 and 2 have anchors. r P = 3 tokens a frame, d = 0.4 of them
    context: floor(1.2) = 1 context, 2 salient."""
    return FastVID(retention_ratio=0.6, dyseg_c=1, dyseg_tau=-1.0, context_share=0.4, anchor_interval=2, **settings)


def test_fastvid_by_hand() -> None:
    # Budget 3 * 3 = 9, of them 6 salient. The other 3 are anchors: 1 in frame 0, 2 in frame 2 (the latest gets more).
    #
    # Density peaks, all three candidates being neighbours (k = min(4, 3)), D^2 = d^2 / 2:
    # frame 0: ab 2, ac 4.5, bc 6.5. Minus the mean of the row: a -6.5/3, b -8.5/3, c -11/3; a is the densest and gets
    #   delta = sqrt(6.5). log scores: a -2.167 + .936 = -1.23, b -2.833 + log sqrt 2 = -2.49,
    #   c -3.667 + log sqrt 4.5 = -2.91. Anchor: a.
    # frame 2: p(0,1) q(-2,3) s2(3,0): pq 4, ps 5, qs 17. p -9/3, q -21/3, s2 -22/3; p -3 + log sqrt 17 = -1.58,
    #   q -7 + log 2 = -6.31, s2 -7.333 + log sqrt 5 = -6.53. Anchors: p, q.
    #
    # Frame 0 has as many anchors as d's share (1), so the official dispatch merges it within itself: a, b, c join a;
    #   w = max(1/4, .6) = .6: .6 (1,0) + .4 (2, 2/3) = (1.4, .26667).
    # Frame 2 takes the whole segment's non-salient tokens. Cosine with p is y / |x|, with q (-2 x + 3 y) / (3.606 |x|):
    #   a .0/-.55 p; b .89/.50 p; c p; e(-3,1) .32/.79 q; f .71/.20 p; g(0,-2) -1/-.83 q; p p; q q; s2 0/-.55 p.
    #   p: mean of a b c f p s2 = (11, 5) / 6; .6 (0,1) + .4 (1.8333, .8333) = (.73333, .93333).
    #   q: mean of e g q = (-5, 2) / 3; .6 (-2,3) + .4 (-1.6667, .6667) = (-1.86667, 2.06667).
    tokens = by_hand()
    reduction = fastvid().decide(tokens, PROJECTOR)
    assert reduction.keep.tolist() == [0, 1, 2, 6, 7, 10, 11, 13, 14]
    assert reduction.notes == {"segments": [(0, 3)], "salient": [2, 2, 2], "anchors": [1, 0, 2]}
    out = reduction.apply(tokens.features)
    want = torch.tensor([[1.4, 0.266667], [0.733333, 0.933333], [-1.866667, 2.066667]])
    torch.testing.assert_close(out[[2, 5, 6]], want, atol=1e-5, rtol=0)
    assert out[[0, 1, 3, 4, 7, 8]].eq(9).all()
    assert dense(reduction)[5].nonzero().squeeze(1).tolist() == [2, 3, 4, 8, 10, 12]


def test_fastvid_by_hand_dispatched_by_length() -> None:
    # Now frame 0's anchor takes all nine non-salient tokens of the segment: their sum is (6, 7).
    # .6 (1,0) + .4 (6/9, 7/9) = (.86667, .31111). The anchors of frame 2 stay as they were.
    tokens = by_hand()
    reduction = fastvid(dispatch="length").decide(tokens, PROJECTOR)
    out = reduction.apply(tokens.features)
    want = torch.tensor([[0.866667, 0.311111], [0.733333, 0.933333], [-1.866667, 2.066667]])
    torch.testing.assert_close(out[[2, 5, 6]], want, atol=1e-5, rtol=0)


def test_fastvid_by_hand_with_the_official_loss() -> None:
    # Each of the two anchor frames gets floor(1 * 3 / 2) = 1 and one token of nine is lost; one anchor equals d's
    # share, so frame 2 merges within itself too: p, q, s2 join p: .6 (0,1) + .4 (1, 4) / 3 = (.13333, 1.13333).
    tokens = by_hand()
    method = fastvid(remainder="official")
    assert not method.exact and method.budget(tokens.grid) == 9
    reduction = method.decide(tokens, PROJECTOR)
    assert reduction.keep.tolist() == [0, 1, 2, 6, 7, 10, 13, 14]
    out = reduction.apply(tokens.features)
    torch.testing.assert_close(out[[2, 5]], torch.tensor([[1.4, 0.266667], [0.133333, 1.133333]]), atol=1e-5, rtol=0)


def test_fastvid_by_hand_every_frame_a_segment() -> None:
    # Three segments of one frame: one anchor each, taking its own frame's tokens, under either dispatch.
    # Frame 1: e(-3,1) f(2,2) g(0,-2): ef 13, eg 9, fg 10: e -22/3, f -23/3, g -19/3; g is the densest.
    #   g: mean (-1, 1) / 3; .6 (0,-2) + .4 (-.33333, .33333) = (-.13333, -1.06667).
    tokens = by_hand()
    for dispatch in ("official", "length"):
        method = replace(fastvid(dispatch=dispatch), dyseg_c=8)
        reduction = method.decide(tokens, PROJECTOR)
        assert reduction.notes["segments"] == [(0, 1), (1, 2), (2, 3)]
        assert reduction.keep.tolist() == [0, 1, 2, 6, 7, 9, 10, 13, 14]
        want = torch.tensor([[1.4, 0.266667], [-0.133333, -1.066667], [0.133333, 1.133333]])
        torch.testing.assert_close(reduction.apply(tokens.features)[[2, 5, 6]], want, atol=1e-5, rtol=0)


# -- InfoMerge, by hand ------------------------------------------------------------------------------------------------
def test_infomerge_by_hand() -> None:
    # Three frames of four tokens, one segment (so all scores are 0). r = .5: B = 6; d = .5: floor(.5 * 6 / 3) = 1
    # salient a frame, 3 anchors: frame 2 gets 2 and frame 0 gets 1 (p = 2). rho = .25: one static position.
    #
    # Position 3 is static: its three tokens turn by 5.7 degrees a frame, TFD = .008; the others turn by tens of
    # degrees. It has the highest attention in all frames. Frame 0 picks it; in frames 1 and 2 it is penalised, and they
    # pick position 0 and position 1. From frame 0 on it carries its mean (3, 0).
    # Frame 0, candidates a(1,0) b(1,2) c(4,0), anchor a; frame 2, candidates p(0,1) q(-2,3) and the replaced (3,0),
    # anchors p and q: the numbers are those of FastVID's example.
    # Members are all non-salient: a b c; f(2,2) g(0,-2) m(3,0); p q m. All of them join frame 0's only anchor:
    #   sum (12, 6): .6 (1,0) + .4 (12, 6) / 9 = (1.13333, .26667).
    # Frame 2: a b c f m p m join p: sum (14, 5): .6 (0,1) + .4 (2, 5/7) = (.8, .885714).
    #   g q join q: sum (-2, 1): w = max(1/3, .6): .6 (-2,3) + .4 (-1, .5) = (-1.6, 2.0).
    features = torch.tensor(
        [
            [[1, 0], [1, 2], [4, 0], [3, 0.3]],
            [[0, 5], [2, 2], [0, -2], [3, 0]],
            [[0, 1], [-5, 0], [-2, 3], [3, -0.3]],
        ]
    )
    attention = torch.tensor([[0.1, 0.2, 0.3, 0.9], [0.5, 0.1, 0.2, 0.9], [0.2, 0.5, 0.1, 0.9]])
    tokens = video(features.flatten(0, 1), (3, 1, 4), attention)
    method = InfoMerge(
        retention_ratio=0.5, dyseg_c=1, dyseg_tau=-1.0, context_share=0.5, anchor_interval=2, static_ratio=0.25
    )
    reduction = method.decide(tokens, PROJECTOR)
    assert reduction.keep.tolist() == [0, 3, 4, 8, 9, 10]
    assert reduction.notes["salient"] == [1, 1, 1] and reduction.notes["anchors"] == [1, 0, 2]
    assert reduction.notes["weights"].tolist() == [1.5]  # 3 * sigmoid(0)
    out = reduction.apply(tokens.features)
    want = torch.tensor([[1.133333, 0.266667], [3, 0], [0, 5], [0.8, 0.885714], [-5, 0], [-1.6, 2.0]])
    torch.testing.assert_close(out, want, atol=1e-5, rtol=0)
    torch.testing.assert_close(
        dense(reduction)[1], torch.tensor([0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0, 1]).double() / 3, atol=1e-6, rtol=0
    )


def test_infomerge_budgets_by_hand() -> None:
    # Two segments, frames 0-1 with mean (2, 0) and frame 2 with mean (0, 1). The mean of the two is (1, .5): cosines
    # .894 and .447, so the second is the more unique; two values have z-scores -1 and 1. temperature log 3, alpha 1,
    # beta 0: sigmoid(-+ log 3) = 1/4 and 3/4, weights 2/4 and 3/4.
    # B = floor(.3 * 30) = 9 and floor(.3 * 9 / 3) = 0 salient: 9 anchors at 2 : 3 are 3.6 and 5.4, so 4 and 5.
    features = torch.zeros(3, 10, 2)
    features[:2, :, 0] = 2
    features[2, :, 1] = 1
    tokens = video(features.flatten(0, 1), (3, 2, 5))
    method = InfoMerge(
        retention_ratio=0.3,
        dyseg_c=2,
        context_share=0.7,
        temperature=math.log(3),
        uniqueness_weight=1.0,
        richness_weight=0.0,
    )
    notes = method.decide(tokens, PROJECTOR).notes
    assert notes["segments"] == [(0, 2), (2, 3)]
    assert notes["weights"].tolist() == pytest.approx([0.5, 0.75])
    assert notes["salient"] == [0, 0, 0] and notes["anchors"] == [0, 4, 5]
    # Without the content it is FastVID's rule, by length: 6 and 3.
    assert replace(method, uniqueness_weight=0.0).decide(tokens, PROJECTOR).notes["anchors"] == [0, 6, 3]
    # The video's mean over tokens, (4/3, 1/3), is nearer to the first segment and farther from the second.
    token_mean = replace(method, global_mean="token").decide(tokens, PROJECTOR).notes
    assert token_mean["weights"].tolist() == pytest.approx([0.5, 0.75])


def still(frames: int, positions: int, channels: int = 16, noise: float = 0.05) -> Tensor:
    """[T, P, C] of a picture that hardly moves."""
    return randn(1, positions, channels) + noise * randn(frames, positions, channels, seed=1)


def one_segment(**settings: Any) -> InfoMerge:
    return InfoMerge(**{"dyseg_c": 1, "dyseg_tau": -1.0} | settings)


def positions_kept(reduction: Reduction, grid: Grid) -> list[list[int]]:
    """Of every frame."""
    t, p = grid[0], grid[1] * grid[2]
    return [[i - f * p for i in reduction.keep.tolist() if i // p == f] for f in range(t)]


def test_infomerge_reduces_to_fastvid() -> None:
    # Nothing static, no content in the budgets, r P = 10 and d R = 4 whole numbers: the methods are one.
    # FastVID merges by segment length there, not by the official dispatch, which InfoMerge does not have.
    same_settings = {"retention_ratio": 0.2, "dyseg_c": 4, "context_share": 0.4, "anchor_interval": 4, "neighbours": 4}
    for seed, grid in enumerate([(12, 5, 10), (5, 5, 10), (1, 5, 10), (17, 10, 5)]):
        features = randn(count(grid), 20, seed=seed)
        tokens = video(features, grid, rand(count(grid), seed=seed), randn(grid[0], 8, seed=seed))
        theirs = FastVID(**same_settings, dispatch="length").decide(tokens, PROJECTOR)
        ours = InfoMerge(**same_settings, static_ratio=0.0, uniqueness_weight=0.0, richness_weight=0.0)
        ours = ours.decide(tokens, PROJECTOR)
        for key in ("segments", "salient", "anchors"):
            assert ours.notes[key] == theirs.notes[key]
        assert torch.equal(ours.keep, theirs.keep)
        torch.testing.assert_close(dense(ours), dense(theirs), atol=1e-7, rtol=0)  # weights are fp32


def test_a_static_position_is_picked_once_a_segment() -> None:
    # Two segments of five frames, all positions static, 2 salient of 12 a frame: ten different ones in each segment.
    # Without static positions every frame picks the same two.
    grid, features = (10, 3, 4), still(10, 12)
    features[5:] *= -1
    attention = rand(12).expand(10, 12).contiguous()
    tokens = video(features.flatten(0, 1), grid, attention)
    method = InfoMerge(retention_ratio=2 / 12, dyseg_c=2, dyseg_tau=-1.0, context_share=0.0, static_ratio=1.0)
    kept = positions_kept(method.decide(tokens, PROJECTOR), grid)
    best = attention[0].topk(2).indices.sort().values.tolist()
    for segment in (kept[:5], kept[5:]):
        picked = [p for frame in segment for p in frame]
        assert len(set(picked)) == len(picked) == 10
        assert segment[0] == best
    assert positions_kept(replace(method, tfd=False).decide(tokens, PROJECTOR), grid) == [best] * 10
    # More picks than positions: the penalised come again, only then, and in the order of their attention.
    long = replace(method, dyseg_c=1).decide(tokens, PROJECTOR)
    picked = positions_kept(long, grid)
    assert len({p for frame in picked[:6] for p in frame}) == 12 and picked[6] == best


def test_a_static_position_is_an_anchor_once_a_segment() -> None:
    # The same for anchors: all tokens are context, every frame an anchor frame, 2 of 6 positions each.
    grid = (3, 2, 3)
    tokens = video(still(3, 6).flatten(0, 1), grid)
    method = one_segment(retention_ratio=2 / 6, context_share=1.0, anchor_interval=1, static_ratio=1.0)
    kept = positions_kept(method.decide(tokens, PROJECTOR), grid)
    assert sorted(p for frame in kept for p in frame) == [0, 1, 2, 3, 4, 5]
    again = positions_kept(replace(method, tfd=False).decide(tokens, PROJECTOR), grid)
    assert again[0] == again[1] == again[2]


def test_switching_tfd_off_finds_nothing_static() -> None:
    grid = (8, 3, 4)
    tokens = video(still(8, 12).flatten(0, 1), grid)
    method = one_segment(retention_ratio=0.3, static_ratio=0.5)
    with_tfd, without = method.decide(tokens, PROJECTOR), replace(method, tfd=False).decide(tokens, PROJECTOR)
    assert not torch.equal(with_tfd.keep, without.keep)
    assert same(without, replace(method, static_ratio=0.0).decide(tokens, PROJECTOR))
    # With it, picked static tokens are means over all eight frames; without it salient tokens are their own.
    rows = {k: (dense(r) - torch.eye(96, dtype=torch.float64)[r.keep]).abs().sum(1) for k, r in
            {"with": with_tfd, "without": without}.items()}  # fmt: skip
    assert (dense(with_tfd) - 1 / 8).abs().lt(1e-6).sum(1).eq(8).any()
    assert not (dense(without) - 1 / 8).abs().lt(1e-6).sum(1).eq(8).any()
    assert rows["without"].eq(0).sum() == sum(without.notes["salient"])


def test_a_segment_of_one_frame_has_nothing_static() -> None:
    tokens = video(randn(36, 8), (3, 3, 4))
    method = InfoMerge(retention_ratio=0.3, dyseg_c=3, static_ratio=1.0)
    assert same(method.decide(tokens, PROJECTOR), replace(method, tfd=False).decide(tokens, PROJECTOR))


def turning(*degrees: float) -> Tensor:
    angle = torch.tensor(degrees).deg2rad()
    return torch.stack([angle.cos(), angle.sin()], 1)  # [T, 2]


def test_first_order_fingerprints_see_four_frames_at_a_time() -> None:
    # Position 0 swings by 60 degrees a frame. Position 1 turns once, by 90 degrees, between frames 3 and 4: that is
    # between two windows of four, so adjacent differences see nothing, while TFD is 8 / 56. Position 2 trembles by 5.
    # All is salient, one token a frame. First order: 1 is static and picked once, then 2. Second order: 2 is static,
    # and 1, which has more attention, is picked in every frame.
    swing, turn, tremble = turning(*[0, 60] * 4), turning(*[0] * 4, *[90] * 4), turning(*[0, 5] * 4)
    tokens = video(torch.stack([swing, turn, tremble], 1).flatten(0, 1), (8, 1, 3), torch.tensor([0.1, 0.9, 0.8] * 8))
    method = one_segment(retention_ratio=1 / 3, context_share=0.0, static_ratio=0.34)
    assert positions_kept(method.decide(tokens, PROJECTOR), tokens.grid) == [[1]] * 8
    first_order = replace(method, fingerprint="first_order").decide(tokens, PROJECTOR)
    assert positions_kept(first_order, tokens.grid) == [[1]] + [[2]] * 7


def test_penalties() -> None:
    # Position 0 is static and has 90 times the attention of the others. exp(-12) and subtraction put it behind them,
    # division by 13 does not.
    swing = turning(*[0, 60] * 3)
    features = torch.stack([turning(*[0] * 6), swing, swing.flip(1)], 1).flatten(0, 1)
    tokens = video(features, (6, 1, 3), torch.tensor([0.9, 0.01, 0.005] * 6))
    method = one_segment(retention_ratio=1 / 3, context_share=0.0, static_ratio=0.34)
    kept = {
        penalty: positions_kept(replace(method, penalty=penalty).decide(tokens, PROJECTOR), tokens.grid)
        for penalty in ("exp", "subtract", "divide")
    }
    assert kept["exp"] == kept["subtract"] == [[0]] + [[1]] * 5
    assert kept["divide"] == [[0]] * 6
    off = replace(method, penalty_strength=0.0).decide(tokens, PROJECTOR)
    assert positions_kept(off, tokens.grid) == [[0]] * 6


def test_entropy_is_computed_only_where_it_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(tokens: Tensor, segments: object) -> Tensor:
        raise AssertionError("computed")

    monkeypatch.setattr(ops, "spectral_entropies", refuse)
    tokens = scene("random", (8, 3, 3))
    InfoMerge(retention_ratio=0.3, richness_weight=0.0).decide(tokens, PROJECTOR)
    with pytest.raises(AssertionError, match="computed"):
        InfoMerge(retention_ratio=0.3, richness_weight=0.1).decide(tokens, PROJECTOR)


def test_content_moves_budget_to_unique_and_rich_segments() -> None:
    # Three segments of four frames: two of one picture, the third another, of few directions.
    grid, p = (12, 4, 4), 16
    features = still(12, p)
    features[:8, :, 0] += 4
    features[8:] = 0.1 * randn(4, p, 16, seed=10)
    features[8:, :, 1] += 4
    tokens = video(features.flatten(0, 1), grid, frames=torch.eye(3).repeat_interleave(4, 0))
    base = {"retention_ratio": 0.25, "dyseg_c": 3}

    def weights(unique: float, rich: float, temperature: float = 1.2) -> list[float]:
        method = InfoMerge(**base, uniqueness_weight=unique, richness_weight=rich, temperature=temperature)
        return method.decide(tokens, PROJECTOR).notes["weights"].tolist()

    assert weights(0, 0) == [2.0, 2.0, 2.0] == weights(1, 1, temperature=0)
    unique, rich = weights(1, 0), weights(0, 1)
    assert unique[2] > unique[0] and unique[2] > unique[1]
    assert rich[2] < rich[0] and rich[2] < rich[1]
    assert weights(1, 0, temperature=2)[2] > unique[2]


@pytest.mark.parametrize("kind", ["identical frames", "one colour", "all zero"])
def test_a_video_without_content_is_budgeted_by_length(kind: str) -> None:
    # Segments that differ in nothing but their length: rounding noise in uniqueness and entropy must not be
    # standardised into a difference.
    tokens = scene(kind, (13, 4, 4), frames=torch.eye(4)[[0] * 2 + [1] * 3 + [2] * 1 + [3] * 7])
    notes = InfoMerge(retention_ratio=0.3, dyseg_c=4).decide(tokens, PROJECTOR).notes
    assert notes["segments"] == [(0, 2), (2, 5), (5, 6), (6, 13)]
    assert notes["weights"].tolist() == pytest.approx([1.0, 1.5, 0.5, 3.5])


@pytest.mark.parametrize("temperature", [0.0, 50.0, 1e3, 1e6])
def test_any_temperature_places_the_budget(temperature: float) -> None:
    # At high temperatures a segment's weight underflows to 0; it still takes what the others have no room for.
    grid = (8, 4, 4)
    for ratio in (0.1, 0.5, 0.95):
        method = InfoMerge(retention_ratio=ratio, dyseg_c=3, dyseg_tau=-1.0, temperature=temperature)
        tokens = scene("random", grid)
        assert_lawful(method.decide(tokens, PROJECTOR), tokens, method.budget(grid))


@pytest.mark.parametrize("interval", [1, 3, 40])
@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("cls", [FastVID, InfoMerge])
def test_any_share_and_interval_place_the_budget(cls: type[Method], share: float, interval: int) -> None:
    for grid in [(1, 3, 3), (7, 3, 2), (20, 2, 2)]:
        for ratio in (0.05, 0.3, 0.8, 0.98):
            method = cls(retention_ratio=ratio, context_share=share, anchor_interval=interval, dyseg_c=2)
            tokens = scene("slow", grid)
            assert_lawful(method.decide(tokens, PROJECTOR), tokens, method.budget(grid))
