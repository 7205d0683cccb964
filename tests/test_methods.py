"""What every method promises, over `list_methods()`; and the papers' algorithms on examples worked out by hand."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from vidcompress import ops
from vidcompress.method import Method, Pipeline, floor, list_methods, setting
from vidcompress.methods.fastvid import FastVID
from vidcompress.methods.infomerge import InfoMerge
from vidcompress.methods.random import Random
from vidcompress.methods.uniform_frames import UniformFrames
from vidcompress.methods.uniform_tokens import UniformTokens
from vidcompress.tokens import Grid, Reduction, Site, VideoTokens

PROJECTOR = Site.projector()
OUTER = sorted(name for name, cls in list_methods().items() if PROJECTOR in cls().sites())
GRIDS = [(1, 1, 1), (1, 1, 2), (3, 1, 1), (1, 14, 14), (2, 3, 3), (5, 1, 7), (8, 4, 4), (32, 2, 2), (33, 3, 2)]
RATIOS = [0.01, 0.05, 0.1, 0.15, 0.25, 0.5, 0.9, 0.999, 1.0]

every_method = pytest.mark.parametrize("name", OUTER)
every_grid = pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: "x".join(map(str, grid)))


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def video(features: Tensor, grid: Grid, attention: Tensor | None = None, frames: Tensor | None = None) -> VideoTokens:
    """Tokens with all signals a method may ask for; frame features are mean tokens unless given."""
    n = features.shape[0]
    attention = rand(n, seed=17) if attention is None else attention.flatten()
    frames = features.float().view(grid[0], n // grid[0], -1).mean(1) if frames is None else frames
    signals = {"frame_features": frames, "saliency.head": attention, "saliency.received": attention}
    return VideoTokens(features, grid, signals=signals)


def count(grid: Grid) -> int:
    return grid[0] * grid[1] * grid[2]


SCENES = {
    "random": lambda t, p, c: randn(t, p, c),
    "slow": lambda t, p, c: randn(1, p, c) + 0.1 * randn(t, p, c, seed=1),
    "identical frames": lambda t, p, c: randn(1, p, c).expand(t, -1, -1),
    "one colour a frame": lambda t, p, c: randn(t, 1, c).expand(-1, p, -1),
    "one colour": lambda t, p, c: randn(1, 1, c).expand(t, p, -1),
    "all zero": lambda t, p, c: torch.zeros(t, p, c),
    "black bars": lambda t, p, c: randn(t, p, c) * (torch.arange(p)[:, None] % 3 == 1),
    "black frames": lambda t, p, c: randn(t, p, c) * (torch.arange(t)[:, None, None] % 3 == 1),
    "copies": lambda t, p, c: randn(t, p, c)[:, torch.arange(p) // 3 * 3],
    "small": lambda t, p, c: randn(t, p, c) * 1e-3,
    "large": lambda t, p, c: randn(t, p, c) * 1e3,
}


def scene(kind: str, grid: Grid, channels: int = 12, **signals: Any) -> VideoTokens:
    return video(SCENES[kind](grid[0], grid[1] * grid[2], channels).reshape(-1, channels), grid, **signals)


def dense(reduction: Reduction) -> Tensor:
    """[K, N] fp64."""
    out = torch.zeros(len(reduction), reduction.num_source, dtype=torch.float64)
    own = torch.ones(len(reduction), dtype=torch.bool)
    if reduction.slot is not None:
        out.index_put_((reduction.slot, reduction.source), reduction.weight.double(), accumulate=True)
        own[reduction.slot] = False
    out[own, reduction.keep[own]] = 1
    return out


def assert_lawful(reduction: Reduction, tokens: VideoTokens, budget: int) -> Tensor:
    """The contract of one answer; returns the survivors' vectors."""
    keep = reduction.keep
    assert keep.dtype == torch.long and reduction.num_source == len(tokens)
    assert keep.tolist() == sorted(set(keep.tolist())) and 0 <= keep[0] and keep[-1] < len(tokens)
    assert len(reduction) == budget
    torch.testing.assert_close(dense(reduction).sum(1), torch.ones(budget, dtype=torch.float64), atol=1e-5, rtol=0)
    out = reduction.apply(tokens.features)
    assert out.shape == (budget, tokens.features.shape[1]) and out.dtype == tokens.features.dtype
    assert out.isfinite().all()
    return out


def same(a: Reduction, b: Reduction) -> bool:
    """Bit for bit."""
    columns = [(getattr(a, name), getattr(b, name)) for name in ("keep", "slot", "source", "weight")]
    return all((x is None and y is None) or torch.equal(x, y) for x, y in columns)


# -- the contract ------------------------------------------------------------------------------------------------------
def test_there_are_methods() -> None:
    assert {"fastvid", "infomerge", "random", "uniform_frames", "uniform_tokens"} <= set(OUTER)


@every_grid
@every_method
def test_lawful_and_exact_at_every_budget(name: str, grid: Grid) -> None:
    budgets = []
    for ratio in RATIOS:
        method = list_methods()[name](retention_ratio=ratio)
        budget = method.budget(grid)
        budgets.append(budget)
        assert isinstance(budget, int) and 1 <= budget <= count(grid)
        tokens = scene("random", grid)
        first, second = method.decide(tokens, PROJECTOR), method.decide(tokens, PROJECTOR)
        assert_lawful(first, tokens, budget)
        assert same(first, second)
    assert budgets == sorted(budgets) and budgets[-1] == count(grid)


@pytest.mark.parametrize("kind", [kind for kind in SCENES if kind != "random"])
@every_method
def test_lawful_and_exact_on_every_scene(name: str, kind: str) -> None:
    for grid in [(1, 5, 5), (5, 1, 7), (8, 4, 4), (17, 2, 1), (12, 2, 2)]:
        for ratio in (0.05, 0.1, 0.25, 0.5, 0.9, 0.97):
            method = list_methods()[name](retention_ratio=ratio)
            tokens = scene(kind, grid)
            assert_lawful(method.decide(tokens, PROJECTOR), tokens, method.budget(grid))


@pytest.mark.parametrize("attention", ["constant", "zero", "one peak"])
@every_method
def test_lawful_whatever_the_saliency(name: str, attention: str) -> None:
    grid = (9, 4, 3)
    value = {"constant": torch.ones(108), "zero": torch.zeros(108), "one peak": torch.eye(108)[50]}[attention]
    for ratio in (0.05, 0.3, 0.9):
        method = list_methods()[name](retention_ratio=ratio)
        tokens = scene("random", grid, attention=value)
        assert_lawful(method.decide(tokens, PROJECTOR), tokens, method.budget(grid))


@every_grid
@every_method
def test_everything_kept_is_the_identity(name: str, grid: Grid) -> None:
    tokens = scene("random", grid)
    reduction = list_methods()[name](retention_ratio=1.0).decide(tokens, PROJECTOR)
    assert reduction.is_identity
    assert torch.equal(reduction.apply(tokens.features), tokens.features)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
@every_method
def test_decisions_are_those_of_the_same_numbers_in_fp32(name: str, dtype: torch.dtype) -> None:
    grid, method = (10, 4, 5), list_methods()[name](retention_ratio=0.2)
    half = video(randn(200, 24).to(dtype), grid, rand(200).to(dtype))
    exact = video(half.features.float(), grid, half.signal("saliency.head").float())
    got, want = method.decide(half, PROJECTOR), method.decide(exact, PROJECTOR)
    assert same(got, want)
    assert torch.equal(assert_lawful(got, half, method.budget(grid)), want.apply(exact.features).to(dtype))


@every_method
def test_only_the_input_decides(name: str) -> None:
    # Not the default dtype, autocast, the global random state or gradients; and nothing of that is changed.
    grid, method = (8, 4, 4), list_methods()[name](retention_ratio=0.2)
    tokens = scene("random", grid)
    want = method.decide(tokens, PROJECTOR)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    torch.set_default_dtype(torch.bfloat16)
    try:
        got = method.decide(tokens, PROJECTOR)
    finally:
        torch.set_default_dtype(torch.float32)
    assert same(got, want)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = method.decide(tokens, PROJECTOR)
        out = got.apply(tokens.features)
    assert same(got, want) and torch.equal(out, want.apply(tokens.features))
    assert torch.equal(torch.get_rng_state(), state)
    with_grad = replace(tokens, features=tokens.features.clone().requires_grad_())
    got = method.decide(with_grad, PROJECTOR)
    assert same(got, want) and (got.weight is None or not got.weight.requires_grad)


@every_method
def test_the_definitions_decide_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Two frames nearly alike, two segments, duplicated tokens: fast and naive ops give one answer.
    grid = (9, 3, 5)
    features = scene("slow", grid, 16).frames.clone()
    features[5:] += 0.7
    features[:, 3] = features[:, 7]
    tokens = video(features.flatten(0, 1), grid)
    for ratio in (0.1, 0.4):
        method = list_methods()[name](retention_ratio=ratio)
        fast = method.decide(tokens, PROJECTOR)
        monkeypatch.setenv("VIDCOMPRESS_OPS", "naive")
        slow = method.decide(tokens, PROJECTOR)
        monkeypatch.delenv("VIDCOMPRESS_OPS")
        assert torch.equal(fast.keep, slow.keep)
        torch.testing.assert_close(dense(fast), dense(slow), atol=1e-5, rtol=0)


@every_method
def test_needs_are_complete(name: str) -> None:
    # A method gets by with the signals it lists.
    method = list_methods()[name](retention_ratio=0.3)
    tokens = scene("random", (6, 3, 3))
    listed = replace(tokens, signals={key: tokens.signal(key) for key in method.needs})
    assert same(method.decide(listed, PROJECTOR), method.decide(tokens, PROJECTOR))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@every_method
def test_every_device_decides_the_same(name: str) -> None:
    for grid in [(1, 4, 4), (12, 4, 5), (33, 3, 2)]:
        for ratio in (0.05, 0.2, 0.6, 0.97):
            method, tokens = list_methods()[name](retention_ratio=ratio), scene("random", grid, 32)
            there = VideoTokens(tokens.features.cuda(), grid, signals={k: s.cuda() for k, s in tokens.signals.items()})
            want, got = method.decide(tokens, PROJECTOR), method.decide(there, PROJECTOR)
            assert got.keep.is_cuda and torch.equal(got.keep.cpu(), want.keep)
            out = got.apply(there.features)
            assert out.is_cuda
            torch.testing.assert_close(out.cpu(), want.apply(tokens.features), atol=1e-5, rtol=1e-5)


# -- what the base class adds ------------------------------------------------------------------------------------------
@dataclass(kw_only=True)
class First(Method):
    """Keeps the first tokens; `wrong` many too many."""

    wrong: int = setting(0, "tokens beyond the budget")

    def reduce(self, tokens: VideoTokens, site: Site) -> Reduction:
        assert not torch.is_grad_enabled()
        return Reduction(torch.arange(self.budget(tokens.grid) + self.wrong), len(tokens))


@dataclass(kw_only=True)
class Floored(First):
    budget_rule = "frame_floor"


@dataclass(kw_only=True)
class Rounded(First):
    budget_rule = "frame_round"


@pytest.mark.parametrize(
    ("cls", "ratio", "grid", "want"),
    [
        (First, 0.1, (32, 14, 14), 627),  # floor(627.2)
        (First, 0.29, (1, 10, 10), 29),  # 0.29 * 100 is 28.999999999999996 in binary
        (First, 0.57, (1, 10, 10), 57),
        (First, 0.01, (1, 2, 2), 1),
        (First, 1.0, (3, 2, 2), 12),
        (Floored, 0.1, (32, 14, 14), 608),  # 32 * floor(19.6)
        (Floored, 0.29, (2, 10, 10), 58),
        (Floored, 0.01, (7, 9, 9), 7),  # one a frame at least
        (Floored, 0.999, (3, 2, 2), 9),
        (Rounded, 0.1, (32, 14, 14), 640),  # 32 * round(19.6)
        (Rounded, 0.25, (3, 1, 10), 6),  # round(2.5) = 2, half to even
        (Rounded, 0.35, (3, 1, 10), 12),  # round(3.5) = 4
        (Rounded, 0.001, (7, 9, 9), 7),  # round(0.081) = 0, but one a frame at least
        (Rounded, 0.999, (3, 2, 2), 12),
    ],
)
def test_budgets(cls: type[Method], ratio: float, grid: Grid, want: int) -> None:
    assert cls(retention_ratio=ratio).budget(grid) == want


def test_floor_forgives_binary_fractions_only() -> None:
    assert [floor(x) for x in (0.29 * 100, 0.57 * 100, 0.58 * 100, 2.999, 3.0, 0.0)] == [29, 57, 58, 2, 3, 0]


@pytest.mark.parametrize("wrong", [1, -1, 5])
def test_another_count_than_the_budget_is_the_methods_mistake(wrong: int) -> None:
    method = First(retention_ratio=0.5, wrong=wrong)
    with pytest.raises(RuntimeError, match=rf"First kept {9 + wrong} tokens of 18, its budget is 9"):
        method.decide(scene("random", (2, 3, 3)), PROJECTOR)


def test_decide_asks_nothing_when_all_fits() -> None:
    class Never(First):
        def reduce(self, tokens: VideoTokens, site: Site) -> Reduction:
            raise AssertionError("called")

    assert Never(retention_ratio=1.0).decide(scene("random", (2, 3, 3)), PROJECTOR).is_identity
    assert Never(retention_ratio=0.01).decide(scene("random", (1, 1, 1)), PROJECTOR).is_identity


def test_a_method_without_reduce() -> None:
    with pytest.raises(NotImplementedError):
        Method(retention_ratio=0.5).decide(scene("random", (2, 3, 3)), PROJECTOR)


def test_pipeline_of_a_method() -> None:
    pipeline = Pipeline.of(FastVID())
    assert pipeline.name == "fastvid" and [*pipeline] == [pipeline.stages[PROJECTOR]]
    assert pipeline.needs == FastVID.needs and pipeline.positions == "keep"
    assert Pipeline.of(pipeline) is pipeline


# -- the floors --------------------------------------------------------------------------------------------------------
def test_random_is_seeded() -> None:
    grid = (4, 5, 5)

    def kept(seed: int, tokens: VideoTokens | None = None) -> list[int]:
        return Random(retention_ratio=0.3, seed=seed).decide(tokens or scene("random", grid), PROJECTOR).keep.tolist()

    assert kept(3) == kept(3) == kept(3, scene("all zero", grid, 2))
    assert len({tuple(kept(seed)) for seed in range(8)}) == 8
    # Every token has its chance, on average the share that is kept.
    share = sum(torch.zeros(100).index_fill(0, torch.tensor(kept(seed)), 1) for seed in range(300)) / 300
    assert 0.1 < share.min() and share.max() < 0.5 and share.mean() == pytest.approx(0.3)


@pytest.mark.parametrize("seed", [2**32, 2**63, 2**64, 10**400], ids=["2**32", "2**63", "2**64", "10**400"])
def test_random_takes_or_refuses_a_large_seed(seed: int) -> None:
    try:
        method = Random(retention_ratio=0.5, seed=seed)
    except ValueError as refusal:
        assert "random: seed must be" in str(refusal) and str(seed)[:5] in str(refusal)
    else:
        assert len(method.decide(scene("random", (2, 3, 3)), PROJECTOR)) == 9


def test_uniform_frames_keeps_whole_frames() -> None:
    grid, p = (8, 2, 2), 4
    for frames, want in {1: [4], 2: [2, 6], 4: [1, 3, 5, 7]}.items():
        keep = UniformFrames(retention_ratio=frames / 8).decide(scene("random", grid), PROJECTOR).keep
        assert keep.tolist() == [f * p + i for f in want for i in range(p)]


def test_uniform_frames_thins_the_last_frame_only() -> None:
    # 18 of 32 tokens are four frames of four and half of one: frames 0, 2, 4, 5 and positions 1 and 3 of frame 7.
    keep = UniformFrames(retention_ratio=18 / 32).decide(scene("random", (8, 2, 2)), PROJECTOR).keep
    assert keep.tolist() == [f * 4 + i for f in (0, 2, 4, 5) for i in range(4)] + [29, 31]


def test_uniform_tokens_are_evenly_spaced() -> None:
    keep = UniformTokens(retention_ratio=0.25).decide(scene("random", (2, 2, 4)), PROJECTOR).keep
    assert keep.tolist() == [2, 6, 10, 14]
    for ratio in RATIOS[:-1]:
        keep = UniformTokens(retention_ratio=ratio).decide(scene("random", (7, 3, 11)), PROJECTOR).keep
        if len(keep) > 1:
            assert keep.diff().max() - keep.diff().min() <= 1


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
    def refuse(tokens: Tensor) -> Tensor:
        raise AssertionError("computed")

    monkeypatch.setattr(ops, "spectral_entropy", refuse)
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
