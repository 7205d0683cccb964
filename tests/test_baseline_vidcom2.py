"""VidCom2: recorded runs of the official code, exact counts, and how frames share them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from baseline_cases import GRIDS, KINDS, RATIOS, answers, clip
from recorded import recorded
from reductions import per_frame
from torch.nn.functional import normalize

from vidcompress.method import floor
from vidcompress.methods.vidcom2 import VidCom2
from vidcompress.tokens import Site, VideoTokens

PROJECTOR = Site.projector()
CASES = recorded("vidcom2")


@pytest.mark.parametrize("implementation", ["torch", "naive"])
@pytest.mark.parametrize("name", CASES)
def test_as_recorded(name: str, implementation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VIDCOMPRESS_OPS", implementation)
    facts, case = CASES[name]
    params = facts["params"]
    features = case["in.features"]
    tokens = VideoTokens(features.flatten(0, 1), (features.shape[0], 1, features.shape[1]))
    method = VidCom2(official=True, retention_ratio=params["base_scale"])
    reduction = method.decide(tokens, PROJECTOR)
    assert torch.equal(reduction.keep, case["out.index_ascending"])
    assert reduction.notes["counts"] == case["out.count_per_frame"].tolist() == per_frame(reduction, tokens.grid)
    torch.testing.assert_close(reduction.notes["frame_scores"].float(), case["out.frame_weight"], atol=1e-5, rtol=1e-4)
    # The recorded order is ascending within a frame; its newlines, if any, are the engine's.
    video = case["out.kind"] == 0
    assert torch.equal(case["out.index"][video], reduction.keep)
    torch.testing.assert_close(reduction.apply(tokens.features), case["out.tokens"][video], atol=1e-5, rtol=1e-4)
    assert not method.exact and len(reduction) <= method.budget(tokens.grid)
    # Without the code's rounding: the same frames in front, and the ratio's count.
    plain = VidCom2(retention_ratio=params["base_scale"])
    kept = plain.decide(tokens, PROJECTOR)
    assert plain.exact and len(kept) == floor(params["base_scale"] * len(tokens))
    assert all(abs(a - b) <= 1 for a, b in zip(kept.notes["counts"], reduction.notes["counts"], strict=True))


def test_by_definition() -> None:
    # Word for word, all in fp64 and over pairs: the scores decide what is kept.
    tokens = clip((6, 3, 4), channels=10)
    x = tokens.features.double()
    calm = x.var(0, correction=0).argsort(stable=True)[:5]
    unit = normalize(x[:, calm], dim=-1).view(6, 12, 5)

    def near(centre: torch.Tensor) -> torch.Tensor:
        distance = (unit - centre).square().sum(-1)
        return sum((-distance / (2 * 2.0**a)).exp() for a in (-3, -2, -1, 0, 1))

    to_video, to_frame = near(unit.mean((0, 1))), near(unit.mean(1, keepdim=True))
    unusual = -to_video.mean(1)
    share = 1 + (unusual / 0.01).softmax(0) - 1 / 6
    method = VidCom2(retention_ratio=0.25)
    reduction = method.decide(tokens, PROJECTOR)
    counts = reduction.notes["counts"]
    assert sum(counts) == 18
    assert all(abs(c - 18 * float(s) / 6) < 1 for c, s in zip(counts, share, strict=True))
    order = (to_video + to_frame).argsort(1)
    want = [sorted((f * 12 + order[f, : counts[f]]).tolist()) for f in range(6)]
    assert reduction.keep.tolist() == [i for frame in want for i in frame]


def test_an_unusual_frame_gets_more() -> None:
    tokens = clip((8, 4, 4), "slow", 16)
    features = tokens.frames.clone()
    features[3] = torch.randn(16, 16, generator=torch.Generator().manual_seed(9))
    tokens = replace(tokens, features=features.flatten(0, 1))
    counts = VidCom2(retention_ratio=0.5).decide(tokens, PROJECTOR).notes["counts"]
    # Eight tokens a frame by 2 - 1/8 and seven times 1 - 1/8.
    assert counts == [7, 7, 7, 15, 7, 7, 7, 7]


def test_what_exceeds_a_frame_goes_to_the_others() -> None:
    tokens = clip((4, 4, 4), "slow", 16)
    features = tokens.frames.clone()
    features[1] = torch.randn(16, 16, generator=torch.Generator().manual_seed(9))
    tokens = replace(tokens, features=features.flatten(0, 1))
    # Scales .8 (2 - 1/4) = 1.4, cut at 1, and .8 (1 - 1/4) = .6 of 16 tokens: 16 and three times 9.6.
    official = VidCom2(retention_ratio=0.8, official=True).decide(tokens, PROJECTOR).notes["counts"]
    assert official == [10, 16, 10, 10]
    exact = VidCom2(retention_ratio=0.8).decide(tokens, PROJECTOR).notes["counts"]
    assert exact[1] == 16 and sum(exact) == 51 and min(exact) == 11


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: "x".join(map(str, grid)))
def test_any_grid_and_ratio(grid: tuple[int, int, int], kind: str) -> None:
    tokens = clip(grid, kind)
    n, t = len(tokens), grid[0]
    for ratio in RATIOS:
        assert len(VidCom2(retention_ratio=ratio).decide(tokens, PROJECTOR)) == max(1, floor(ratio * n))
        official = VidCom2(retention_ratio=ratio, official=True)
        reduction = official.decide(tokens, PROJECTOR)
        assert t <= len(reduction) <= official.budget(grid) <= n
        if ratio == 1.0:
            assert reduction.is_identity


def test_the_official_bound_is_reached() -> None:
    # One frame that stands out has all the probability.
    tokens = clip((4, 4, 4), "still", 16)
    features = tokens.frames.clone()
    features[1] = torch.randn(16, 16, generator=torch.Generator().manual_seed(9))
    method = VidCom2(retention_ratio=0.5, official=True)  # 6, 6, 6 and 14 of 16
    tokens = replace(tokens, features=features.flatten(0, 1))
    assert method.decide(tokens, PROJECTOR).notes["counts"] == [6, 14, 6, 6]
    assert method.budget((4, 4, 4)) == 34  # each share may round up by a half


def test_a_still_video_is_shared_out_evenly_and_by_index() -> None:
    tokens = clip((6, 2, 5), "still")
    reduction = VidCom2(retention_ratio=0.3).decide(tokens, PROJECTOR)
    assert reduction.notes["counts"] == [3] * 6
    assert (reduction.keep % 10).view(6, 3).eq(reduction.keep[:3] % 10).all()
    equal = VidCom2(retention_ratio=0.3).decide(clip((6, 2, 5), "equal"), PROJECTOR)
    assert equal.keep.tolist() == [10 * f + i for f in range(6) for i in range(3)]


@pytest.mark.parametrize("official", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_dtype_is_storage_only(dtype: torch.dtype, official: bool) -> None:
    stored = clip((12, 4, 4), "slow", 24)
    stored = replace(stored, features=stored.features.to(dtype))
    method = VidCom2(official=official)
    keep, _ = answers(method, stored)
    assert keep == answers(method, stored)[0] == answers(method, replace(stored, features=stored.features.float()))[0]


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"channel_share": 0.0}, r"channel_share must be in \(0, 1\]"),
        ({"temperature": 0.0}, "temperature must be"),
        ({"retention_ratio": 1.1}, r"retention_ratio must be in \(0, 1\]"),
    ],
)
def test_bad_settings(settings: dict[str, float], says: str) -> None:
    with pytest.raises(ValueError, match=f"vidcom2: {says}"):
        VidCom2(**settings)
    with pytest.raises(TypeError, match="official must be of type bool"):
        VidCom2(official="yes")
