"""FrameFusion: recorded runs of the official code, its schedule worked out by hand, and its budget on any video."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from recorded import recorded
from tiny import ONE, compress, generate, llava, llava_inputs, new_tokens
from torch import Tensor

from vidcompress import load
from vidcompress.engine.decoder_signals import LayerView
from vidcompress.method import Pipeline
from vidcompress.methods.framefusion import FrameFusion
from vidcompress.tokens import Grid, Reduction, Site, VideoTokens

ATTENTION = "last_query_attention.previous"


CASES = recorded("framefusion")


@pytest.mark.parametrize("implementation", ["torch", "naive"])
@pytest.mark.parametrize("name", CASES)
def test_as_recorded(name: str, implementation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VIDCOMPRESS_OPS", implementation)
    facts, case = CASES[name]
    method = FrameFusion(
        retention_ratio=facts["cost"],
        similarity=facts["similarity_lower_bound"],
        least_merged=facts["ratio_lower_bound"],
    )
    patch = case["patch_type"][0]
    start, entered = facts["image_start"], facts["image_length"]
    grid = (entered // facts["patch_num"], 1, facts["patch_num"])
    place = torch.arange(len(patch))  # what is left of the sequence, text included
    notes: dict[str, Any] = {"phase": "prune", "spent": 0} if facts.get("finish_merging") else {}
    for number, step in enumerate(facts["trace"]):
        hidden, video = case[f"hook{number}.hidden"], patch[place] >= 0
        signals = {ATTENTION: case["prune_attention"].mean(0)[video]} if step["phase"] == "prune" else {}
        seen = VideoTokens(hidden[video], grid, place[video] - start, signals, notes, entered)
        site = Site.decoder(number, number, 28)
        reduction = method.decide(seen, site)
        assert len(reduction) <= method.count(site, grid, entered, len(seen))
        after = torch.cat([place[~video], place[video][reduction.keep]]).sort().values
        assert torch.equal(after, case[f"hook{number}.keep"])
        tokens = case[f"hook{number}.tokens"]
        torch.testing.assert_close(reduction.apply(hidden[video]), tokens[patch[after] >= 0], atol=1e-5, rtol=1e-5)
        notes = {**notes, **reduction.notes}
        assert (notes["phase"] == "merge") == (not step["finish_merging"])
        assert (notes["phase"] == "done") == step["finish_pruning"]
        place = after
    assert notes["phase"] == "done"


# -- the schedule ------------------------------------------------------------------------------------------------------
def walk(method: FrameFusion, tokens: VideoTokens, depth: int = 8) -> Iterator[tuple[VideoTokens, Reduction]]:
    """What it sees at every layer and its answers; the layers in between change nothing."""
    features, index = tokens.features, torch.arange(len(tokens))
    attention, notes = tokens.signals[ATTENTION], {}
    for site in method.sites(depth):
        signals = {} if site.layer == 0 else {ATTENTION: attention[index]}
        seen = VideoTokens(features, tokens.grid, index, signals, notes, len(tokens))
        reduction = method.decide(seen, site)
        yield seen, reduction
        features, index, notes = reduction.apply(features), index[reduction.keep], {**notes, **reduction.notes}


def lengths(method: FrameFusion, tokens: VideoTokens, depth: int = 8) -> list[int]:
    return [len(reduction) for _, reduction in walk(method, tokens, depth)]


def clip(grid: Grid, kind: str, seed: int = 0) -> VideoTokens:
    """A clip of 16 channels: `still`, `cuts` between still scenes, `slow`, `random` or of one colour."""
    t, p = grid[0], grid[1] * grid[2]
    generator = torch.Generator().manual_seed(seed)
    picture, noise = (torch.randn(n, p, 16, generator=generator) for n in (t, t))
    frames = {
        "still": picture[:1].expand(t, -1, -1),
        "cuts": picture[torch.arange(t) // 3],
        "slow": picture[:1] + 0.7 * noise,
        "random": noise,
        "one colour": picture[:1, :1].expand(t, p, -1),
    }[kind]
    attention = torch.rand(t * p, generator=generator)
    return VideoTokens(frames.flatten(0, 1).clone(), grid, signals={ATTENTION: attention})


KINDS = ["still", "cuts", "slow", "random", "one colour"]


def test_a_video_that_repeats_is_merged_to_the_budget_at_once() -> None:
    # 4 frames of 3: all 9 later tokens are like the first ones, and .5 * 12 = 6 are in excess. Among equals the first
    # by place and time go: all three of place 0, and of place 1.
    tokens = clip((4, 1, 3), "still")
    (_, first), *others = walk(FrameFusion(retention_ratio=0.5), tokens)
    assert first.keep.tolist() == [0, 1, 2, 5, 8, 11]
    assert all(reduction.is_identity for _, reduction in others)
    torch.testing.assert_close(first.apply(tokens.features), tokens.features[first.keep])


def test_a_video_that_does_not_repeat_is_pruned_at_layer_1() -> None:
    # Nothing merges in layer 0; .5 * 8 * 12 - 12 = 36 tokens are left for 7 layers: round(36 / 7) = 5.
    tokens = clip((4, 1, 3), "random")
    method = FrameFusion(retention_ratio=0.5, similarity=1.01)
    assert lengths(method, tokens) == [12] + [5] * 7
    pruned = list(walk(method, tokens))[1][1]
    assert torch.equal(pruned.keep, tokens.signals[ATTENTION].topk(5).indices.sort().values)


def test_merging_goes_on_while_it_pays() -> None:
    # One place holds a, a, b, b, c, the other five more, all at right angles. Layer 0: two of ten tokens join, less
    # than the .6 in excess and enough to go on; layer 1: none, so that was the last; layer 2: pruning. Of .4 * 8 * 10 =
    # 32 tokens 8 + 8 are spent: round(16 / 6) = 3 are left.
    axes = torch.eye(8)
    left, right = axes[[0, 0, 1, 1, 2]], axes[[3, 4, 5, 6, 7]]
    features = torch.stack([left, right], 1).flatten(0, 1)
    tokens = VideoTokens(features, (5, 1, 2), signals={ATTENTION: torch.arange(10.0)})
    steps = list(walk(FrameFusion(retention_ratio=0.4), tokens))
    assert [len(reduction) for _, reduction in steps] == [8, 8] + [3] * 6
    assert steps[0][1].keep.tolist() == [0, 1, 3, 4, 5, 7, 8, 9]
    assert steps[2][0].index is not None
    assert steps[2][0].index[steps[2][1].keep].tolist() == [7, 8, 9]


def test_a_run_becomes_the_plain_mean_at_its_first_token() -> None:
    features = torch.tensor([[1.0, 0.0], [1, 0.1], [1, 0.2], [0, 1]])
    tokens = VideoTokens(features, (4, 1, 1), signals={ATTENTION: torch.ones(4)})
    (_, first), *_ = walk(FrameFusion(retention_ratio=0.3, similarity=0.9), tokens)
    assert first.keep.tolist() == [0, 3]
    torch.testing.assert_close(first.apply(features), torch.tensor([[1.0, 0.1], [0, 1]]))


def test_what_is_left_of_a_place_is_compared_with_what_is_left_before_it() -> None:
    # Frame 1 is gone: token 2 stands next to token 0.
    features = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    tokens = VideoTokens(features, (4, 1, 1), torch.tensor([0, 2, 3]), {ATTENTION: torch.ones(3)}, entered=4)
    reduction = FrameFusion(retention_ratio=0.5).decide(tokens, Site.decoder(0, 0, 8))
    assert reduction.keep.tolist() == [0, 2]


def test_merging_that_would_spend_the_budget_ends_in_pruning() -> None:
    # Layer 0 merges 4 of 20. Layer 1 would keep all 16, with which .2 * 8 * 20 = 32 tokens were spent: instead 7 layers
    # share the other 16.
    features = torch.eye(20)
    features[1:17:8] = features[:16:8]
    features[5:17:8] = features[4:16:8]
    tokens = VideoTokens(features, (20, 1, 1), signals={ATTENTION: torch.rand(20)})
    assert lengths(FrameFusion(retention_ratio=0.2), tokens) == [16] + [2] * 7


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("grid", [(1, 4, 4), (2, 1, 1), (9, 3, 3), (16, 2, 5)], ids=str)
def test_the_mean_over_layers_is_the_budget(grid: Grid, kind: str) -> None:
    tokens = clip(grid, kind)
    n = len(tokens)
    for ratio, least, depth in itertools.product((0.2, 0.3, 0.5, 0.9, 1.0), (0.0, 0.1, 0.5), (4, 28)):
        method = FrameFusion(retention_ratio=ratio, least_merged=least)
        counts, most = lengths(method, tokens, depth), Pipeline.of(method).lengths(grid, depth)
        assert counts == sorted(counts, reverse=True) and counts[-1] >= 1
        assert all(count <= bound for count, bound in zip(counts, most, strict=True))
        # But for rounding; layer 0 cannot prune, and one token is left at least.
        spent = sum(counts)
        assert spent <= max(ratio * n * depth + depth, n + depth - 1)
        if kind != "slow" and least:  # where merging goes on for ever, less is kept
            assert spent >= ratio * n * depth - depth
        if ratio == 1:
            assert counts == [n] * depth


def test_merging_may_begin_at_a_later_layer() -> None:
    # The layers before it keep all: of .5 * 8 * 12 = 48 tokens 24 are spent, and 6 layers share 24.
    tokens = clip((4, 1, 3), "still")
    method = FrameFusion(retention_ratio=0.5, layer=2)
    assert [site.layer for site in method.sites(8)] == [2, 3, 4, 5, 6, 7]
    assert lengths(method, tokens) == [4] * 6
    assert lengths(replace(method, similarity=1.01), tokens) == [12, 2, 2, 2, 2, 2]  # round(12 / 5)


# -- what every method promises ----------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"retention_ratio": 0.0}, "retention_ratio must be"),
        ({"retention_ratio": 1.5}, "retention_ratio must be"),
        ({"least_merged": -0.1}, "least_merged must be"),
        ({"similarity": float("nan")}, "similarity must be"),
        ({"layer": -1}, "layer must be"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        load("framefusion", **settings)


def test_a_layer_that_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match="layer must be below 6, the decoder's depth; got 6"):
        compress(llava(), "framefusion", layer=6)


# -- inside a model ----------------------------------------------------------------------------------------------------
def still(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    pixels = inputs["pixel_values_videos"]
    return inputs | {"pixel_values_videos": pixels[:, :1].expand_as(pixels).contiguous()}


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_it_generates_on_fewer_tokens(attn: str) -> None:
    # 6 frames of 4 tokens, 6 layers, and 7 columns of text and newline. A still video: 12 are in excess at layer 0, and
    # merged. None merge: .5 * 6 * 24 - 24 = 48 tokens are left for 5 layers, round(48 / 5) = 10 each.
    model, inputs = llava(attn), still(llava_inputs([ONE]))
    handle = compress(model, "framefusion", retention_ratio=0.5)
    first = generate(model, inputs)
    prompt = handle.trace.last
    assert prompt.before == 24 and prompt.after == 12
    assert prompt.layer_lengths == [12 + 6] * 6
    assert [step.after for step in prompt.steps] == [12] * 6
    assert torch.equal(new_tokens(first, inputs), new_tokens(generate(model, inputs), inputs))
    handle.switch("framefusion", retention_ratio=0.5, similarity=1.01)
    generate(model, inputs)
    assert handle.trace.last.layer_lengths == [24 + 6] + [10 + 6] * 5


def test_nothing_is_worked_out_once_it_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    signals = LayerView.signals
    monkeypatch.setattr(LayerView, "signals", lambda view, *args: asked.append(view.number) or signals(view, *args))
    model, inputs = llava(), still(llava_inputs([ONE]))
    handle = compress(model, "framefusion", retention_ratio=0.5)
    with torch.no_grad():
        model(**inputs)
    assert asked == [0]
    handle.switch("framefusion", retention_ratio=0.5, similarity=1.01)
    with torch.no_grad():
        model(**inputs)
    assert asked == [0, 0, 1]


def test_it_generates_for_rows_that_merge_differently() -> None:
    inputs = llava_inputs([ONE, ONE])
    inputs["pixel_values_videos"][0] = inputs["pixel_values_videos"][0, :1]
    model = llava()
    handle = compress(model, "framefusion", retention_ratio=0.5, similarity=0.9999)
    together = new_tokens(generate(model, inputs), inputs)
    by_row = [[s.after for s in handle.trace.last.steps if s.row == row] for row in (0, 1)]
    assert by_row[0] == [12] * 6 and by_row[1] == [24] + [10] * 5
    for row in (0, 1):
        alone = {key: value[row : row + 1] for key, value in inputs.items()}
        assert torch.equal(new_tokens(generate(model, alone), alone)[0], together[row])
