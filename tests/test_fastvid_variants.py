"""FastVID's `official` switch: recorded runs of the official codes, what they stop at, and which code a model gets."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from recorded import recorded
from reductions import same
from tiny import ONE, llava, llava_inputs, without_head
from tiny_llava_video import llava_video, video_inputs
from tiny_qwen import qwen, qwen_inputs
from torch import Tensor

import vidcompress
from vidcompress import ops
from vidcompress.method import Pipeline, floor, list_methods
from vidcompress.methods.fastvid import VARIANTS, FastVID
from vidcompress.tokens import Grid, Reduction, Site, VideoTokens

PROJECTOR = Site.projector()
FOLDER = "fastvid_variants"
SETTINGS = ("retention_ratio", "dyseg_c", "dyseg_tau", "dyseg_ignore", "context_share", "anchor_interval", "beta")


LLAVA_VIDEO, QWEN = recorded("fastvid_llava_video", FOLDER), recorded("fastvid_qwen25vl", FOLDER)


def official(variant: str, facts: dict[str, Any]) -> FastVID:
    return FastVID(official=True, variant=variant, **{k: facts[k] for k in SETTINGS if k in facts})


def tokens_of(features: Tensor, grid: Grid, attention: Tensor, frame_features: Tensor | None = None) -> VideoTokens:
    """From [T, P, C] and [T, P]; frame features are mean tokens unless given."""
    seen = features.float().mean(1) if frame_features is None else frame_features
    signals = {"saliency.head": attention.flatten(), "frame_features": seen}
    return VideoTokens(features.flatten(0, 1), grid, signals=signals)


def scene(grid: Grid, kind: str = "slow", seed: int = 0) -> VideoTokens:
    """A clip of 8 channels whose pictures hardly move, or are unlike each other, or are one picture."""
    t, h, w = grid
    generator = torch.Generator().manual_seed(seed)
    first = torch.randn(1, h * w, 8, generator=generator)
    moving = torch.randn(t, h * w, 8, generator=generator)
    features = {"slow": first + 0.3 * moving, "cuts": moving, "still": first.expand(t, -1, -1)}[kind]
    return tokens_of(features, grid, torch.rand(t, h * w, generator=generator))


def assert_as_recorded(reduction: Reduction, tokens: VideoTokens, keep: Tensor, case: dict[str, Tensor]) -> None:
    """Same survivors, same vectors, same salient tokens and anchors, same segments; salient tokens are copies."""
    assert torch.equal(reduction.keep, keep)
    out = reduction.apply(tokens.features)
    assert (out - case["tokens"]).abs().max() <= 1e-5 * case["tokens"].abs().max().clamp_min(1)
    notes = reduction.notes
    assert [end - start for start, end in notes["segments"]] == case["segments"].tolist()
    attention = tokens.signal("saliency.head").view(tokens.grid[0], -1)
    salient = ops.top_tokens(attention, torch.tensor(notes["salient"])).flatten()
    assert torch.equal(salient.nonzero().squeeze(1), case["salient"])
    assert torch.equal(keep[~salient[keep]], case["anchors"])
    per_frame = case["anchors"].div(attention.shape[1], rounding_mode="floor").bincount(minlength=tokens.grid[0])
    assert notes["anchors"] == per_frame.tolist()
    assert torch.equal(out[salient[keep]], tokens.features[case["salient"]])


# -- recorded runs -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("implementation", ["torch", "naive"])
@pytest.mark.parametrize("name", LLAVA_VIDEO)
def test_llava_video_as_recorded(name: str, implementation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VIDCOMPRESS_OPS", implementation)
    facts, case = LLAVA_VIDEO[name]
    tokens = tokens_of(case["features"].float(), (64, 13, 13), case["attention"], case["frame_features"])
    method = official("llava_video", facts)
    reduction = method.decide(tokens, PROJECTOR)
    assert_as_recorded(reduction, tokens, case["keep_patches"], case)
    assert method.exact and method.budget(tokens.grid) == facts["n_patches"] == len(reduction)
    # A row of 13 patches keeps its newline if it keeps any patch.
    newlines = (reduction.keep // 13).unique() * 14 + 13
    assert torch.equal(newlines, case["keep_newlines"])
    before, after, grid = len(case["prefix"]), len(case["suffix"]), 64 * 182
    patches = reduction.keep // 13 * 14 + reduction.keep % 13
    video = torch.cat([patches, newlines]).sort().values + before
    around = torch.arange(before), torch.arange(before + grid, before + grid + after)
    assert torch.equal(torch.cat([around[0], video, around[1]]), case["keep"])


@pytest.mark.parametrize("implementation", ["torch", "naive"])
@pytest.mark.parametrize("name", QWEN)
def test_qwen_as_recorded(name: str, implementation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VIDCOMPRESS_OPS", implementation)
    facts, case = QWEN[name]
    tokens = tokens_of(case["features"], tuple(facts["grid"]), case["attention"])
    method = official("qwen2_5_vl", facts)
    reduction = method.decide(tokens, PROJECTOR)
    assert_as_recorded(reduction, tokens, case["keep"], case)
    notes = reduction.notes
    per_frame = [s + a for s, a in zip(notes["salient"], notes["anchors"], strict=True)]
    assert per_frame == case["kept_per_frame"].tolist()
    assert not method.exact and method.budget(tokens.grid) == facts["nominal"] >= len(reduction)


def test_each_code_needs_its_own_variant() -> None:
    # Were the variants one, the recorded runs would not tell them apart.
    facts, case = QWEN["paper"]
    tokens = tokens_of(case["features"], tuple(facts["grid"]), case["attention"])
    others = [official(v, facts).decide(tokens, PROJECTOR) for v in ("onevision", "llava_video")]
    assert all(other.keep.tolist() != case["keep"].tolist() for other in others)


# -- by hand -----------------------------------------------------------------------------------------------------------
def one_segment(variant: str, **settings: Any) -> FastVID:
    """p = 2 and no cut: every second frame, counted from the last, has anchors."""
    settings = {"dyseg_c": 1, "dyseg_tau": -2.0, "anchor_interval": 2, "context_share": 0.4} | settings
    return FastVID(official=True, variant=variant, **settings)


def test_llava_video_budgets_by_hand() -> None:
    # R = 3 of 10: S = 5 * 3 = 15, floor(.4 * 15) = 6 context, 9 salient. Salient: 9 = 2 + 2 + 2 + 2 + 1, the first
    # frames get more; context: 3 anchor frames of 2. With d = .5: 7 = 3 + 2 + 2, the last frame gets more; 8 salient.
    tokens = scene((5, 2, 5))
    notes = one_segment("llava_video", retention_ratio=0.3).decide(tokens, PROJECTOR).notes
    assert notes["salient"] == [2, 2, 2, 2, 1] and notes["anchors"] == [2, 0, 2, 0, 2]
    notes = one_segment("llava_video", retention_ratio=0.3, context_share=0.5).decide(tokens, PROJECTOR).notes
    assert notes["salient"] == [2, 2, 2, 1, 1] and notes["anchors"] == [2, 0, 2, 0, 3]


def test_llava_video_places_what_does_not_fit_by_d8() -> None:
    # r = .8 of 5: S = 4 * 4 = 16, floor(.4 * 16) = 6 context, 10 salient: 3 3 2 2. Anchor frames 1 and 3 are to take
    # 3 each, and frame 1 has room for 2. D8: 2 salient in every frame, so 8 anchors for 2 * 3 places; 3 salient leave 4
    # anchors for 2 * 2.
    notes = one_segment("llava_video", retention_ratio=0.8).decide(scene((4, 1, 5)), PROJECTOR).notes
    assert notes["salient"] == [3, 3, 3, 3] and notes["anchors"] == [0, 2, 0, 2]


def test_qwen_budgets_by_hand() -> None:
    # Frames 0-1 and 2-4 are alike: two runs, of which frames 1 and 4 count. R = 3 of 10: S = 15, floor(.4 * 15) = 6
    # context, all at the last run (p = 2), where P // 2 = 5 fit; 9 salient: 5 in frame 1, 4 in frame 4.
    # With r = .5: S = 25, 10 context of which 5 fit; 15 salient: 8 in frame 1, and of 7 in frame 4 the 5 that fit.
    a, b = torch.tensor([1.0, 0.0, 0.0]), torch.tensor([0.6, 0.8, 0.0])
    features = torch.stack([a, a, b, b, b])[:, None] + torch.zeros(5, 10, 3)
    features[..., 2] = torch.linspace(-0.1, 0.1, 10)  # tokens differ, mean tokens do not
    tokens = tokens_of(features, (5, 2, 5), torch.rand(5, 10, generator=torch.Generator().manual_seed(0)))
    notes = one_segment("qwen2_5_vl", retention_ratio=0.3).decide(tokens, PROJECTOR).notes
    assert notes["salient"] == [0, 5, 0, 0, 4] and notes["anchors"] == [0, 0, 0, 0, 5]
    reduction = one_segment("qwen2_5_vl", retention_ratio=0.5).decide(tokens, PROJECTOR)
    assert reduction.notes["salient"] == [0, 8, 0, 0, 5] and reduction.notes["anchors"] == [0, 0, 0, 0, 5]
    assert len(reduction) == 18 < one_segment("qwen2_5_vl", retention_ratio=0.5).budget((5, 2, 5))
    # With nothing ignored every frame is a run of its own.
    notes = one_segment("qwen2_5_vl", retention_ratio=0.3, dyseg_ignore=2.0).decide(tokens, PROJECTOR).notes
    assert notes["salient"] == [2, 2, 2, 2, 1] and notes["anchors"] == [2, 0, 2, 0, 2]


def test_qwen_rounds_half_a_frame_down() -> None:
    # One run of two frames, R = 3 of 5, d = .6: 3 context of which 5 // 2 fit, 3 salient, all in the last frame.
    method = one_segment("qwen2_5_vl", retention_ratio=0.6, context_share=0.6)
    notes = method.decide(scene((2, 1, 5), "still"), PROJECTOR).notes
    assert notes["salient"] == [0, 3] and notes["anchors"] == [0, 2]


def test_qwen_caps_no_segment_of_one_frame() -> None:
    # R = 8 of 10, d = .9: 7 context, more than P // 2.
    method = one_segment("qwen2_5_vl", retention_ratio=0.8, context_share=0.9)
    notes = method.decide(scene((1, 2, 5)), PROJECTOR).notes
    assert notes["salient"] == [1] and notes["anchors"] == [7]


def test_other_frames_anchors_are_merged_and_own_ones_are_not() -> None:
    # Two frames of three tokens, p = 1, r = 2/3: S = 4, d = .5: 1 salient and 1 anchor in either frame.
    # Salient: token 0 of each frame. Two candidates are equally dense, so the lower index, token 1, is the anchor.
    # Frame 0's anchor (1, 0) takes its frame's other token (3, 0) and both of frame 1, (0, 2) and (0, 4), of which one
    # is an anchor: .6 (1, 0) + .4 (1, 2) = (1, .8). Frame 1's: .6 (0, 2) + .4 (4/3, 4/3) = (.53333, 1.73333).
    # OneVision would count the anchor itself, here with d's share within its frame: .6 (1, 0) + .4 (2, 0) = (1.4, 0).
    features = torch.tensor([[[9.0, 9.0], [1, 0], [3, 0]], [[9, 9], [0, 2], [0, 4]]])
    tokens = tokens_of(features, (2, 1, 3), torch.tensor([[0.9, 0.1, 0.1], [0.9, 0.1, 0.1]]))
    shared = {"retention_ratio": 0.7, "context_share": 0.5, "anchor_interval": 1}
    for variant in ("llava_video", "qwen2_5_vl"):
        reduction = one_segment(variant, **shared).decide(tokens, PROJECTOR)
        assert reduction.keep.tolist() == [0, 1, 3, 4]
        want = torch.tensor([[9, 9], [1, 0.8], [9, 9], [0.533333, 1.733333]])
        torch.testing.assert_close(reduction.apply(tokens.features), want, atol=1e-5, rtol=0)
    out = one_segment("onevision", **shared).decide(tokens, PROJECTOR).apply(tokens.features)
    torch.testing.assert_close(out[1], torch.tensor([1.4, 0]), atol=1e-5, rtol=0)


# -- what the codes stop at --------------------------------------------------------------------------------------------
GRIDS = [(t, 1, p) for t in (1, 2, 3, 9) for p in (1, 2, 3, 4)] + [(5, 1, 7), (12, 4, 4)]


@pytest.mark.parametrize("variant", ["onevision", "llava_video", "qwen2_5_vl"])
@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: "x".join(map(str, grid)))
def test_any_grid_and_ratio(variant: str, grid: Grid) -> None:
    t, h, w = grid
    clips = [scene(grid, kind) for kind in ("slow", "cuts", "still")]
    for ratio, d, c in itertools.product((0.01, 0.1, 0.3, 0.5, 0.7, 0.9), (0.0, 0.4, 1.0), (1, 4)):
        method = FastVID(official=True, variant=variant, retention_ratio=ratio, context_share=d, dyseg_c=c)
        nominal = method.budget(grid)
        assert nominal == t * max(1, floor(ratio * h * w))
        for tokens in clips:
            reduction = method.decide(tokens, PROJECTOR)
            assert 0 < len(reduction) <= nominal
            if variant == "llava_video":
                assert len(reduction) == nominal
            if reduction.is_identity:
                continue
            notes = reduction.notes
            kept = [s + a for s, a in zip(notes["salient"], notes["anchors"], strict=True)]
            assert reduction.keep.div(h * w, rounding_mode="floor").bincount(minlength=t).tolist() == kept
            if reduction.slot is not None:
                sums = torch.zeros(len(reduction)).index_add_(0, reduction.slot, reduction.weight)
                assert torch.allclose(sums[reduction.slot], torch.ones(()), atol=1e-5)
            assert reduction.apply(tokens.features).isfinite().all()


def test_llava_video_without_context_keeps_salient_tokens_only() -> None:
    # R = 1 and segments of one frame: floor(.4) = 0 anchors.
    method = FastVID(official=True, variant="llava_video", retention_ratio=0.05, dyseg_c=9)
    reduction = method.decide(scene((9, 2, 5)), PROJECTOR)
    assert reduction.notes["salient"] == [1] * 9 and reduction.notes["anchors"] == [0] * 9
    assert reduction.slot is None


def test_qwen_without_salient_tokens_keeps_anchors_only() -> None:
    method = FastVID(official=True, variant="qwen2_5_vl", retention_ratio=0.05, dyseg_c=9)
    notes = method.decide(scene((9, 2, 5)), PROJECTOR).notes
    assert notes["salient"] == [0] * 9 and notes["anchors"] == [1] * 9


@pytest.mark.parametrize("variant", ["onevision", "llava_video", "qwen2_5_vl"])
def test_a_ratio_of_one_changes_nothing(variant: str) -> None:
    tokens = scene((6, 3, 3))
    assert FastVID(official=True, variant=variant, retention_ratio=1.0).decide(tokens, PROJECTOR).is_identity


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("variant", ["llava_video", "qwen2_5_vl"])
def test_the_dtype_is_storage_only(variant: str, dtype: torch.dtype) -> None:
    tokens = scene((12, 4, 4))
    stored = replace(tokens, features=tokens.features.to(dtype))
    method = FastVID(official=True, variant=variant, retention_ratio=0.3, dyseg_c=3)
    first, again = (method.decide(stored, PROJECTOR) for _ in range(2))
    exact = method.decide(replace(tokens, features=stored.features.float()), PROJECTOR)
    assert torch.equal(first.keep, exact.keep) and torch.equal(first.keep, again.keep)
    assert torch.equal(first.weight, again.weight) and torch.equal(first.source, again.source)


# -- the switch --------------------------------------------------------------------------------------------------------
def test_without_official_nothing_changes() -> None:
    tokens = scene((13, 3, 4))
    plain = FastVID(retention_ratio=0.4, dyseg_c=3)
    want = plain.decide(tokens, PROJECTOR)
    for variant in ("onevision", "llava_video", "qwen2_5_vl"):
        method = replace(plain, variant=variant, dyseg_ignore=0.1)
        assert method.exact and same(method.decide(tokens, PROJECTOR), want)


@pytest.mark.parametrize("remainder", ["exact", "official"])
@pytest.mark.parametrize("dispatch", ["length", "official"])
def test_official_on_onevision_is_remainder_and_dispatch(remainder: str, dispatch: str) -> None:
    # R = 3 of 5, 1 of them context; the two anchor frames share 3, of which one is lost, and 1 is d's share.
    tokens = scene((3, 1, 5))
    settings = {"retention_ratio": 0.6, "dyseg_c": 1, "dyseg_tau": -2.0, "anchor_interval": 2}
    want = FastVID(remainder="official", dispatch="official", **settings)
    given = FastVID(official=True, variant="onevision", remainder=remainder, dispatch=dispatch, **settings)
    assert same(given.decide(tokens, PROJECTOR), want.decide(tokens, PROJECTOR))
    assert not given.exact and given.budget(tokens.grid) == want.budget(tokens.grid)
    # Both matter here: with one of them alone another answer comes out.
    for other in (replace(want, remainder="exact"), replace(want, dispatch="length")):
        assert not same(other.decide(tokens, PROJECTOR), want.decide(tokens, PROJECTOR))


MODELS = {
    "llava_onevision": "onevision",
    "llava_video": "llava_video",
    "llava_qwen": "llava_video",
    "qwen2_vl": "qwen2_5_vl",
    "qwen2_5_vl": "qwen2_5_vl",
    "qwen3_vl": "qwen2_5_vl",
    "qwen3_vl_moe": "qwen2_5_vl",
}


def test_every_model_type_has_a_variant() -> None:
    assert VARIANTS == MODELS


@pytest.mark.parametrize("model_type, variant", MODELS.items())
def test_auto_is_the_code_of_the_model(model_type: str, variant: str) -> None:
    method = FastVID(official=True, retention_ratio=0.3)
    assert method.on(model_type) == replace(method, variant=variant)
    chosen = replace(method, variant="onevision")
    assert chosen.on(model_type) is chosen
    unofficial = FastVID()
    assert unofficial.on(model_type) is unofficial


def test_a_model_without_official_code() -> None:
    with pytest.raises(ValueError, match=r"no official code for 'mllama' \(only for llava_onevision, .*qwen3_vl_moe\)"):
        FastVID(official=True).on("mllama")
    for method in (FastVID(), FastVID(official=True, variant="llava_video")):
        assert method.on("mllama") is method


def test_auto_needs_a_model() -> None:
    method = FastVID(official=True, retention_ratio=0.3)
    assert not method.exact
    with pytest.raises(ValueError, match=r"official=True with variant='auto': set `variant`, or apply it to a model"):
        method.decide(scene((4, 3, 3)), PROJECTOR)
    assert len(method.on("qwen2_vl").decide(scene((4, 3, 3)), PROJECTOR)) > 0


def test_other_methods_are_the_same_on_every_model() -> None:
    for name, cls in list_methods().items():
        method = cls()
        assert method.on("mllama") is method, name


def test_a_pipeline_asks_its_methods() -> None:
    pipeline = Pipeline([FastVID(official=True), vidcompress.load("fastv")])
    (before, inner), (after, same_inner) = pipeline, pipeline.on("qwen2_5_vl")
    assert (before.variant, after.variant) == ("auto", "qwen2_5_vl") and same_inner is inner


def test_load() -> None:
    method = vidcompress.load("fastvid", official=True, variant="llava_video")
    assert method.official and method.exact and method.budget((64, 13, 13)) == 64 * 16
    assert vidcompress.load({"method": "fastvid"} | method.settings()) == method
    assert not vidcompress.load(method, official=False).official
    assert not vidcompress.load("fastvid").official
    with pytest.raises(ValueError, match=r"variant must be one of 'auto', 'onevision', 'llava_video', 'qwen2_5_vl'"):
        vidcompress.load("fastvid", variant="qwen")
    with pytest.raises(TypeError, match="official must be of type bool, got 1"):
        vidcompress.load("fastvid", official=1)


@pytest.mark.parametrize("variant", ["onevision", "llava_video", "qwen2_5_vl"])
def test_official_on_a_model_is_its_own_variant(variant):
    if variant == "qwen2_5_vl":
        model, inputs = qwen("qwen2_5_vl"), qwen_inputs("qwen2_5_vl", [ONE], [(6, 8, 8)])
    elif variant == "llava_video":
        model = llava_video()
        inputs = video_inputs(model, [ONE])
    else:
        model, inputs = llava(), llava_inputs([ONE])
    with without_head(), vidcompress.apply(model, "fastvid", official=True, retention_ratio=0.5) as handle:
        assert handle.compression.methods[0].variant == variant
        model(**inputs)
        step = handle.trace.last.steps[0]
        chosen = vidcompress.load("fastvid", official=True, retention_ratio=0.5, variant=variant)
        assert step.after <= chosen.budget(step.grid) and (step.after == chosen.budget(step.grid) or not chosen.exact)
        handle.switch("fastvid", official=True, variant="onevision")
        assert handle.compression.methods[0].variant == "onevision"
