"""DivPrune: recorded runs of the official code, exact counts, and what it does with copies."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from baseline_cases import GRIDS, KINDS, RATIOS, clip
from recorded import recorded

from vidcompress.method import floor
from vidcompress.methods.divprune import DivPrune
from vidcompress.tokens import Site, VideoTokens

PROJECTOR = Site.projector()
CASES = recorded("divprune")


@pytest.mark.parametrize("implementation", ["torch", "naive"])
@pytest.mark.parametrize("name", CASES)
def test_as_recorded(name: str, implementation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VIDCOMPRESS_OPS", implementation)
    facts, case = CASES[name]
    params = facts["params"]
    features = case["in.features"]
    tokens = VideoTokens(features, (1, 1, len(features)))
    method = DivPrune(official=True, retention_ratio=params["ratio"])
    reduction = method.decide(tokens, PROJECTOR)
    assert torch.equal(reduction.keep, case["out.index_ascending"])
    assert torch.equal(reduction.notes["order"], case["out.index"])
    assert torch.equal(reduction.apply(features), case["out.tokens_ascending"])
    # Frames change the speed, not the picks.
    frames = VideoTokens(features, (2, 1, len(features) // 2))
    assert torch.equal(method.decide(frames, PROJECTOR).notes["order"], case["out.index"])


def test_rounding() -> None:
    # 90 * .05 = 4.5 is 4, and 10 * .25 = 2.5 is 2, but 10 * .35 = 3.5 is 4; 10 * .29 = 2.9 is 3, by floor 2.
    counts = {(0.05, 90): (4, 4), (0.25, 10): (2, 2), (0.35, 10): (4, 3), (0.29, 10): (3, 2), (0.01, 10): (1, 1)}
    for (ratio, n), want in counts.items():
        budgets = [DivPrune(retention_ratio=ratio, official=official).budget((1, 1, n)) for official in (True, False)]
        assert tuple(budgets) == want


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: "x".join(map(str, grid)))
def test_any_grid_and_ratio(grid: tuple[int, int, int], kind: str) -> None:
    tokens = clip(grid, kind)
    for ratio in RATIOS:
        for official in (False, True):
            method = DivPrune(retention_ratio=ratio, official=official)
            reduction = method.decide(tokens, PROJECTOR)
            n = len(tokens)
            assert method.exact and len(reduction) == max(1, round(ratio * n) if official else floor(ratio * n))
            assert reduction.is_identity == (len(reduction) == n)


def test_the_first_of_copies() -> None:
    tokens = clip((5, 2, 3), "still")
    reduction = DivPrune(retention_ratio=0.2).decide(tokens, PROJECTOR)
    assert reduction.keep.tolist() == [0, 1, 2, 3, 4, 5]  # one frame says it all
    assert reduction.notes["order"][0] == 0
    assert DivPrune(retention_ratio=0.3).decide(tokens, PROJECTOR).keep.tolist() == list(range(9))
    assert DivPrune(retention_ratio=0.2).decide(clip((5, 2, 3), "equal"), PROJECTOR).keep.tolist() == list(range(6))


def test_what_is_new_is_kept() -> None:
    # One token of a still video shows something else: it is the first pick.
    tokens = clip((6, 3, 3), "still", 16)
    features = tokens.features.clone()
    features[31] = torch.randn(16, generator=torch.Generator().manual_seed(4))
    reduction = DivPrune(retention_ratio=0.1).decide(replace(tokens, features=features), PROJECTOR)
    assert reduction.notes["order"][0] == 31 and len(reduction) == 5


def test_bad_settings() -> None:
    with pytest.raises(ValueError, match=r"divprune: retention_ratio must be in \(0, 1\], got 0"):
        DivPrune(retention_ratio=0)
    with pytest.raises(TypeError, match="divprune: official must be of type bool"):
        DivPrune(official=1)
