"""LLaVA-Scissor: recorded runs of the official code, its steps worked out by hand, and the search for a threshold."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from recorded import recorded
from tiny import ONE, compress, generate, llava, llava_inputs
from torch import Tensor

from vidcompress import load, ops
from vidcompress.method import floor
from vidcompress.methods.llava_scissor import LlavaScissor
from vidcompress.tokens import Grid, Site, VideoTokens

PROJECTOR = Site.projector()
CASES = recorded("llava_scissor")


@pytest.mark.parametrize("implementation", ["torch", "naive"])
@pytest.mark.parametrize("name", CASES)
def test_as_recorded(name: str, implementation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VIDCOMPRESS_OPS", implementation)
    facts, case = CASES[name]
    assert facts["equals_true_components"]
    t, p, _ = case["features"].shape
    tokens = VideoTokens(case["features"].flatten(0, 1), (t, 1, p))
    reduction = LlavaScissor(tau=facts["tau"]).decide(tokens, PROJECTOR)
    assert reduction.notes["within_frames"] == len(case["spatial_tokens"])
    # A representative stands at the first token of its component; the record's come in another order.
    row = case["temporal_component"][case["frame_component"].flatten()]  # [N]
    order = row[reduction.keep]
    assert order.sort().values.tolist() == list(range(facts["n_out"]))
    assert all(int((row == k).nonzero()[0]) == i for k, i in zip(order.tolist(), reduction.keep.tolist(), strict=True))
    torch.testing.assert_close(reduction.apply(tokens.features), case["tokens"][order], atol=1e-5, rtol=1e-5)
    # Who joined whom: a token weighs in the representative of its own component, and in the one that it joined.
    weights = torch.zeros(len(order), t * p).index_put_(
        (reduction.slot, reduction.source), reduction.weight, accumulate=True
    )
    joined = (order[:, None] == case["assign"].flatten()) | (order[:, None] == row)
    assert torch.equal(weights > 0, joined)


@pytest.mark.parametrize("implementation", ["torch", "naive"])
@pytest.mark.parametrize("name", CASES)
def test_components_as_recorded(name: str, implementation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VIDCOMPRESS_OPS", implementation)
    facts, case = CASES[name]
    across = ops.components(case["spatial_tokens"], facts["tau"])
    assert same_groups(across, case["temporal_component"])
    for frame, component in zip(case["features"], case["frame_component"], strict=True):
        assert same_groups(ops.components(frame, facts["tau"]), component)


def same_groups(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a[:, None] == a, b[:, None] == b)


# -- ops ---------------------------------------------------------------------------------------------------------------
def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_a_chain_is_one_component_and_named_by_its_first() -> None:
    angle = torch.tensor([90.0, 0, 20, 200, 40, 120]).deg2rad()
    vectors = torch.stack([angle.cos(), angle.sin()], 1)
    label = ops.components(vectors, 0.9)  # cos 25.8 degrees
    assert label.tolist() == [0, 1, 1, 3, 1, 5]
    assert ops.components(vectors, 0.8).tolist() == [0, 1, 1, 3, 1, 0]  # 36.9 degrees
    assert ops.components(vectors, -2.0).tolist() == [0] * 6
    assert ops.components(vectors, 1.0).tolist() == [0, 1, 2, 3, 4, 5]


def test_a_zero_vector_is_like_nothing() -> None:
    vectors = torch.tensor([[0.0, 0.0], [1, 0], [0, 0], [2, 0]])
    assert ops.components(vectors, 0.5).tolist() == [0, 1, 2, 1]
    assert ops.components(vectors, -0.5).tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("threshold", [-2.0, 0.0, 0.3, 0.5, 0.7, 0.99])
def test_components_are_those_of_the_definition(threshold: float, monkeypatch: pytest.MonkeyPatch) -> None:
    # More vectors than a tile has rows, in clusters that chains connect.
    vectors = randn(40, 6).repeat_interleave(35, 0) + 0.4 * randn(1400, 6, seed=1)
    fast = ops.components(vectors, threshold)
    monkeypatch.setenv("VIDCOMPRESS_OPS", "naive")
    assert torch.equal(fast, ops.components(vectors, threshold))
    assert torch.equal(fast[fast], fast) and (fast <= torch.arange(1400)).all()


def test_linkage_falls_apart_into_the_components_of_every_threshold() -> None:
    tokens = randn(3, 30, 5)
    to, cosine = ops.linkage(tokens)
    assert to.shape == cosine.shape == (3, 30) and (to[:, 0] == 0).all() and cosine[:, 0].isneginf().all()
    for threshold in (-2.0, 0.2, 0.5, 0.8, 0.95):
        for f in range(3):
            group = torch.arange(30)
            for _ in range(30):
                group = torch.where(cosine[f] > threshold, group[to[f]], group)
            assert same_groups(group, ops.components(tokens[f], threshold))


# -- by hand -----------------------------------------------------------------------------------------------------------
def test_the_steps_by_hand() -> None:
    # Frame 0: two alike and one other, (1, 0) (1, .2) (0, 1); frame 1: (1, .1), (.1, 1), and (-1, 0) alone.
    # Means: (1, .1), (0, 1); (1, .1), (.1, 1), (-1, 0). Across: (1, .1), (.05, 1), (-1, 0), at tokens 0, 2 and 5.
    # (1, 0), (1, .2) and (1, .1) join the first: ((1, .1) + (3, .3)) / 4; (0, 1) and (.1, 1) the second.
    features = torch.tensor([[1.0, 0.0], [1, 0.2], [0, 1], [1, 0.1], [0.1, 1], [-1, 0]])
    reduction = LlavaScissor(tau=0.9).decide(VideoTokens(features, (2, 1, 3)), PROJECTOR)
    assert reduction.keep.tolist() == [0, 2, 5] and reduction.notes["within_frames"] == 5
    torch.testing.assert_close(reduction.apply(features), torch.tensor([[1, 0.1], [0.05, 1], [-1, 0]]))


def test_a_token_may_join_another_component() -> None:
    # 0, 20, 40 and 60 degrees are a chain (cos 20 = .94), whose mean points to 30; 82 is alone. 60 is nearer to 82.
    angle = torch.tensor([0.0, 20, 40, 60, 82]).deg2rad()
    x = torch.stack([angle.cos(), angle.sin()], 1)
    reduction = LlavaScissor(tau=0.93).decide(VideoTokens(x, (1, 1, 5)), PROJECTOR)
    assert reduction.keep.tolist() == [0, 4]
    want = torch.stack([(x[:4].mean(0) + x[:3].sum(0)) / 4, (2 * x[4] + x[3]) / 3])
    torch.testing.assert_close(reduction.apply(x), want)


# -- the search --------------------------------------------------------------------------------------------------------
KINDS = ["slow", "random", "still", "one colour", "cuts"]
GRIDS: list[Grid] = [(1, 1, 2), (1, 5, 5), (9, 1, 1), (6, 4, 4), (16, 3, 4)]


def clip(grid: Grid, kind: str) -> VideoTokens:
    t, p = grid[0], grid[1] * grid[2]
    frames = {
        "still": randn(1, p, 16).expand(t, -1, -1),
        "cuts": randn(t, p, 16)[torch.arange(t) // 3],
        "slow": randn(1, p, 16) + 0.3 * randn(t, p, 16, seed=1),
        "random": randn(t, p, 16),
        "one colour": randn(1, 1, 16).expand(t, p, -1),
    }[kind]
    return VideoTokens(frames.flatten(0, 1).clone(), grid)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_any_grid_and_ratio(grid: Grid, kind: str) -> None:
    tokens = clip(grid, kind)
    n = len(tokens)
    for ratio in (0.01, 0.05, 0.1, 0.25, 0.5, 0.9, 1.0):
        method = LlavaScissor(retention_ratio=ratio)
        reduction = method.decide(tokens, PROJECTOR)
        assert 1 <= len(reduction) <= method.budget(grid) == max(1, floor(ratio * n))
        if ratio == 1.0:
            assert reduction.is_identity
        elif kind in ("slow", "random"):  # counts jump only where tokens are equal
            assert len(reduction) >= 0.9 * method.budget(grid) - 1
        elif kind == "one colour":
            assert len(reduction) == 1
        else:
            distinct = len(tokens.features.unique(dim=0))
            assert len(reduction) >= min(distinct, 0.9 * method.budget(grid) - 1)


def test_the_threshold_that_is_found_gives_the_same_when_it_is_given() -> None:
    for kind, ratio in itertools.product(KINDS, (0.1, 0.4)):
        tokens = clip((6, 4, 4), kind)
        found = LlavaScissor(retention_ratio=ratio).decide(tokens, PROJECTOR)
        given = LlavaScissor(tau=found.notes["tau"]).decide(tokens, PROJECTOR)
        assert torch.equal(found.keep, given.keep) and torch.equal(found.weight, given.weight)


def test_a_given_threshold_may_keep_anything() -> None:
    tokens = clip((6, 4, 4), "slow")
    method = LlavaScissor(retention_ratio=0.1, tau=0.99999)
    assert method.budget((6, 4, 4)) == len(method.decide(tokens, PROJECTOR)) == 96
    assert len(replace(method, tau=-2.0).decide(tokens, PROJECTOR)) == 1


@pytest.mark.parametrize("settings", [{"retention_ratio": 0.0}, {"retention_ratio": 2.0}, {"tau": float("inf")}])
def test_bad_settings_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must be"):
        load("llava_scissor", **settings)


# -- inside a model ----------------------------------------------------------------------------------------------------
def test_it_generates_on_fewer_tokens() -> None:
    # A still video of 6 frames of 4 tokens: the same 4 in every frame, so 4 are the most that a threshold leaves.
    inputs = llava_inputs([ONE])
    inputs["pixel_values_videos"] = inputs["pixel_values_videos"][:, :1].repeat(1, 6, 1, 1, 1)
    model = llava()
    handle = compress(model, "llava_scissor", tau=0.99999)
    generate(model, inputs)
    assert handle.trace.last.before == 24 and handle.trace.last.after == 4
    assert handle.trace.last.layer_lengths == [4 + 6] * 6
    handle.switch("llava_scissor", tau=-2.0)
    generate(model, inputs)
    assert handle.trace.last.after == 1
    handle.switch("llava_scissor", retention_ratio=0.5)
    generate(model, inputs)
    assert 1 <= handle.trace.last.after <= 4
