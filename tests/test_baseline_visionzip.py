"""VisionZip against recorded runs of its official codes, by hand, at every size, and on models."""

from __future__ import annotations

from typing import Any

import oracle_qwen
import pytest
import torch
from baselines import KINDS, PROJECTOR, assert_exact, clip, video
from recorded import recorded
from reductions import dense, per_frame
from tiny import ONE
from tiny_qwen import GRIDS, qwen, qwen_inputs
from torch import Tensor

import vidcompress
from vidcompress.config import load
from vidcompress.methods.visionzip import VisionZip
from vidcompress.tokens import VideoTokens

VIDEO, CLIP = recorded("visionzip_video"), recorded("visionzip_clip")
NEWLINE = 2
TOLERANCE: dict[str, float] = {"rtol": 1e-4, "atol": 1e-5}


def of_video(facts: dict[str, Any], case: dict[str, Tensor], **settings: Any) -> tuple[VideoTokens, VisionZip]:
    tokens = video(case["in.features"], case["in.attention"], case["in.keys"])
    ratio = facts["params"]["spatial_tokens"] / case["in.features"].shape[1]
    share = facts["params"]["dominant_ratio"]
    return tokens, VisionZip(retention_ratio=ratio, dominant_share=share, **settings)


# -- recorded runs -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("implementation", ["torch", "naive"])
@pytest.mark.parametrize("name", VIDEO)
def test_videos_as_recorded(name: str, implementation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VIDCOMPRESS_OPS", implementation)
    facts, case = VIDEO[name]
    tokens, method = of_video(facts, case)
    reduction = method.decide(tokens, PROJECTOR)
    assert torch.equal(reduction.keep, case["out.index_ascending"].long())
    # The code's order differs, and in grids its places: compare every token where it comes from.
    own = case["out.kind"] != NEWLINE
    source, vectors = case["out.index"][own].long(), case["out.tokens"][own]
    out = reduction.apply(tokens.features)
    torch.testing.assert_close(out, vectors[source.argsort()], **TOLERANCE)
    copied = case["out.kind"][own][source.argsort()] == 0
    assert torch.equal(out[copied], tokens.features[reduction.keep[copied]])
    assert set(reduction.notes["dominant"]) == {facts["facts"]["dominant_num"]}
    assert set(reduction.notes["contextual"]) == {facts["facts"]["contextual_num"]}
    # Every other token is in the one target that was recorded, with an equal share; a target's own weight is 1.
    p = case["out.assign"].shape[1]
    assign = case["out.assign"].long()
    others = (assign >= 0).flatten()
    weights = dense(reduction)
    others[reduction.keep] = False
    member = others.nonzero().squeeze(1)
    joined = torch.searchsorted(reduction.keep, member // p * p + assign.flatten()[member])
    want = torch.zeros_like(weights)
    want[torch.arange(len(reduction)), reduction.keep] = 1
    want[joined, member] = (1 / joined.bincount(minlength=len(reduction)).double())[joined]
    torch.testing.assert_close(weights, want, atol=1e-6, rtol=0)


@pytest.mark.parametrize("implementation", ["torch", "naive"])
def test_the_places_of_the_official_grid(implementation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VIDCOMPRESS_OPS", implementation)
    facts, case = VIDEO["grid_20"]
    tokens, method = of_video(facts, case, official=True)
    reduction = method.decide(tokens, PROJECTOR)
    frame = torch.arange(len(case["out.claimed_position"]))[:, None] * case["in.features"].shape[1]
    assert torch.equal(reduction.keep, (case["out.claimed_position"] + frame).flatten().long())
    in_order = case["out.tokens"][case["out.kind"] != NEWLINE]
    torch.testing.assert_close(reduction.apply(tokens.features), in_order, **TOLERANCE)
    assert not torch.allclose(of_video(facts, case)[1].decide(tokens, PROJECTOR).apply(tokens.features), in_order)


@pytest.mark.parametrize("implementation", ["torch", "naive"])
@pytest.mark.parametrize("name", CLIP)
def test_images_as_recorded(name: str, implementation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # CLIP's class token is not among a video's tokens: it is always kept, and never a target or a member.
    monkeypatch.setenv("VIDCOMPRESS_OPS", implementation)
    facts, case = CLIP[name]
    dominant, contextual = facts["params"]["dominant_num"], facts["params"]["contextual_num"]
    for b, hidden in enumerate(case["in.hidden"]):
        attention = case["in.cls_attention"][b, :, 1:].sum(0)
        tokens = video(hidden[None, 1:], attention[None], case["in.keys"][b][None, 1:])
        kept = dominant + contextual
        method = VisionZip(retention_ratio=kept / len(tokens), dominant_share=dominant / kept)
        reduction = method.decide(tokens, PROJECTOR)
        order = case["out.index"][b, 1:].long()
        assert torch.equal(reduction.keep + 1, order.sort().values)
        out = reduction.apply(tokens.features)
        torch.testing.assert_close(out, case["out.tokens"][b, 1:][order.argsort()], **TOLERANCE)


# -- by hand -----------------------------------------------------------------------------------------------------------
def test_one_frame_by_hand() -> None:
    # Tokens 1 and 4 are dominant. Of 0 2 3 5 6 7 every third is a target: 0 and 5. By their keys 2 and 6 join 0, and 3
    # and 7 join 5.
    attention = torch.tensor([[0.0, 9, 0, 0, 8, 0, 0, 0]])
    right, up = [1.0, 0.0], [0.0, 1.0]
    keys = torch.tensor([[right, up, right, up, up, up, right, up]])
    tokens = video(torch.eye(8)[None], attention, keys)
    reduction = VisionZip(retention_ratio=0.5, dominant_share=0.5).decide(tokens, PROJECTOR)
    assert reduction.keep.tolist() == [0, 1, 4, 5]
    want = [
        [1, 0, 0.5, 0, 0, 0, 0.5, 0],
        [0, 1, 0, 0, 0, 0, 0, 0],
        [0, 0, 0, 0, 1, 0, 0, 0],
        [0, 0, 0, 0.5, 0, 1, 0, 0.5],
    ]
    assert reduction.apply(tokens.features).tolist() == want


def test_a_target_without_members_stays_and_few_others_are_all_targets() -> None:
    # Of 6 tokens 2 are dominant and 3 contextual: step 1, targets are the first three others, and the last joins one.
    tokens = video(torch.eye(6)[None], torch.tensor([[9.0, 8, 0, 0, 0, 0]]), torch.eye(6)[None, :, :4])
    reduction = VisionZip(retention_ratio=5 / 6, dominant_share=0.4).decide(tokens, PROJECTOR)
    assert reduction.keep.tolist() == [0, 1, 2, 3, 4]
    weights = dense(reduction)
    assert torch.equal(weights[:, :5], torch.eye(5).double())
    assert weights[:, 5].tolist() == [0, 0, 1, 0, 0]  # its key is 0, as like to all: the first


def test_only_dominant_and_only_contextual() -> None:
    tokens = clip((3, 4, 4))
    pruned = VisionZip(retention_ratio=0.25, dominant_share=1.0).decide(tokens, PROJECTOR)
    assert pruned.slot is None
    top = tokens.signal("saliency.received").view(3, 16).topk(4).indices.sort().values
    assert torch.equal(pruned.keep.view(3, 4), top + 16 * torch.arange(3)[:, None])
    merged = VisionZip(retention_ratio=0.25, dominant_share=0.0).decide(tokens, PROJECTOR)
    assert merged.keep.tolist() == list(range(0, 48, 4))
    torch.testing.assert_close(dense(merged).sum(0)[merged.keep], torch.ones(12).double())


# -- every size --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("scope", ["frame", "video"])
def test_counts_are_exact(scope: str) -> None:
    assert_exact(VisionZip, scope=scope)


@pytest.mark.parametrize("kind", KINDS)
def test_the_places_of_the_official_code_change_no_choice(kind: str) -> None:
    tokens = clip((5, 4, 4), kind)
    for ratio in (0.02, 0.2, 0.9):
        methods = [VisionZip(retention_ratio=ratio, official=official) for official in (False, True)]
        plain, official = (method.decide(tokens, PROJECTOR) for method in methods)
        assert torch.equal(plain.keep, official.keep)
        torch.testing.assert_close(dense(plain).sum(0), dense(official).sum(0))


def test_what_does_not_divide_is_spread_over_the_frames() -> None:
    grid = (7, 3, 3)
    reduction = VisionZip(retention_ratio=10 / 63).decide(clip(grid), PROJECTOR)
    assert per_frame(reduction, grid) == [1, 1, 2, 1, 2, 1, 2]


def test_a_video_as_a_whole_takes_tokens_where_attention_is() -> None:
    tokens = clip((4, 3, 3))
    signals = dict(tokens.signals) | {"saliency.received": torch.arange(36.0)}
    tokens = VideoTokens(tokens.features, tokens.grid, signals=signals)
    reduction = VisionZip(retention_ratio=0.25, dominant_share=8 / 9, scope="video").decide(tokens, PROJECTOR)
    assert reduction.keep.tolist() == [0, *range(28, 36)]
    assert per_frame(VisionZip(retention_ratio=0.25).decide(tokens, PROJECTOR), tokens.grid) == [2, 2, 2, 3]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dominant_share": 1.1}, "dominant_share must be in .0, 1., got 1.1"),
        ({"dominant_share": -0.1}, "dominant_share must be"),
        ({"scope": "clip"}, "scope must be one of 'auto', 'frame', 'video', got 'clip'"),
        ({"retention_ratio": 0}, "retention_ratio must be"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VisionZip(**settings)


def test_presets_keep_the_tokens_a_frame_of_the_scripts() -> None:
    for percent, kept in ((10, 20), (15, 30), (20, 40), (25, 50)):
        assert load(f"visionzip-{percent}").budget((32, 14, 14)) == 32 * kept


# -- on models ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_qwen_is_taken_as_a_whole(kind: str) -> None:
    model, inputs = qwen(kind), qwen_inputs(kind, [ONE])
    with vidcompress.apply(model, "visionzip", retention_ratio=0.3) as handle, torch.no_grad():
        model(**inputs)
        (step,) = handle.trace.last.steps
    t, h, w = GRIDS[0]
    assert (step.before, step.after) == (t * h * w // 4, int(0.3 * t * h * w / 4))
    assert len(step.reduction.notes["dominant"]) == 1
    (seen,) = oracle_qwen.read(qwen(kind), inputs).videos
    tokens = VideoTokens(torch.zeros(step.before, 1), seen.grid, signals=seen.signals)
    want = VisionZip(retention_ratio=0.3, scope="video").decide(tokens, PROJECTOR)
    assert torch.equal(step.reduction.keep, want.keep)
    torch.testing.assert_close(dense(step.reduction), dense(want), atol=1e-6, rtol=0)


def test_the_model_decides_the_scope_unless_it_is_given() -> None:
    assert VisionZip().on("qwen3_vl_moe").scope == VisionZip(scope="video").on("llava_onevision").scope == "video"
    for method, model_type in ((VisionZip(), "llava_onevision"), (VisionZip(scope="frame"), "qwen2_5_vl")):
        assert method.on(model_type) is method
        assert len(method.decide(clip((4, 2, 2)), PROJECTOR).notes["dominant"]) == 4  # each frame has its own
