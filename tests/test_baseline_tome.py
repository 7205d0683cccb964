"""ToMe: recorded runs of the official code, exact counts, and which tokens end up in which."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from baseline_cases import GRIDS, KINDS, RATIOS, clip
from recorded import recorded
from reductions import per_frame
from torch import Tensor

from vidcompress import ops
from vidcompress.method import floor
from vidcompress.methods.tome import ToMe
from vidcompress.ops.bipartite_match import naive
from vidcompress.ops.bipartite_match import torch as fast
from vidcompress.tokens import Reduction, Site, VideoTokens

PROJECTOR = Site.projector()
CASES = recorded("tome")


def owners(reduction: Reduction) -> Tensor:
    """[N] the survivor that every token is in; -1 where a token is lost."""
    owner = torch.full((reduction.num_source,), -1)
    owner[reduction.keep] = reduction.keep
    if reduction.slot is not None:
        owner[reduction.source] = reduction.keep[reduction.slot]
    return owner


# -- recorded runs -----------------------------------------------------------------------------------------------------
def test_two_rounds_as_recorded() -> None:
    facts, case = CASES["two_rounds"]
    params = facts["params"]
    features = case["in.features"][0]
    tokens = VideoTokens(features, (1, 10, 10))
    reduction = ToMe(official=True, retention_ratio=0.5, per_round=params["r"][0]).decide(tokens, PROJECTOR)
    group, owner = case["out.group_of_input"][0], owners(reduction)
    place = torch.zeros(50, dtype=torch.long).index_copy_(0, group, owner)  # the survivor at each place of the output
    assert torch.equal(place[group], owner) and len(place.unique()) == 50
    slot = torch.searchsorted(reduction.keep, place)
    torch.testing.assert_close(reduction.apply(features)[slot], case["out.x1"][0], atol=1e-5, rtol=1e-4)
    assert torch.equal(owner.bincount(minlength=100)[place].float(), case["out.size1"][0])
    # In spatial order the second round sees other neighbours.
    other = ToMe(retention_ratio=0.5, per_round=params["r"][0]).decide(tokens, PROJECTOR)
    assert len(other) == 50 and not torch.equal(owners(other), owner)


@pytest.mark.parametrize("implementation", ["torch", "naive"])
@pytest.mark.parametrize("name", CASES)
def test_every_round_as_recorded(name: str, implementation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Whatever the metric, with and without class and distillation token, in batches.
    monkeypatch.setenv("VIDCOMPRESS_OPS", implementation)
    facts, case = CASES[name]
    params = facts["params"]
    protected = params["class_token"] + params["distill_token"]
    for b in range(len(case["in.features"])):
        x, size = case["in.features"][b], torch.ones(case["in.features"].shape[1], 1)
        for number, r in enumerate(params["r"]):
            metric = case[f"in.metric{number}"][b] if f"in.metric{number}" in case else x
            gone, into, left = ops.bipartite_match(metric, r, protected)
            assert torch.equal(gone // 2, case[f"out.src_idx{number}"][b])
            assert torch.equal(into // 2, case[f"out.dst_idx{number}"][b])
            even = torch.cat([torch.arange(0, protected, 2), left])
            even = even.sort().values if params["class_token"] else even
            assert torch.equal(even // 2, case[f"out.unm_idx{number}"][b])
            total = (x * size).index_add(0, into, (x * size)[gone])
            size = size.index_add(0, into, size[gone])
            order = torch.cat([even, torch.arange(1, len(x), 2)])
            if params["distill_token"]:
                order = torch.cat([order[:1], torch.tensor([1]), order[1 : len(even)], order[len(even) + 1 :]])
            x, size = (total / size)[order], size[order]
            torch.testing.assert_close(x, case[f"out.x{number}"][b], atol=1e-5, rtol=1e-4)
            assert torch.equal(size[:, 0], case[f"out.size{number}"][b])


@pytest.mark.parametrize("name", ["r50"])
def test_one_round_of_the_method_is_one_match(name: str) -> None:
    features = CASES[name][1]["in.features"][0]
    gone, into, _ = ops.bipartite_match(features, 50)
    for official in (False, True):
        reduction = ToMe(official=official, retention_ratio=94 / 144).decide(
            VideoTokens(features, (1, 12, 12)), PROJECTOR
        )
        want = torch.arange(144).index_copy(0, gone, into)
        assert torch.equal(owners(reduction), want)


# -- the method --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: "x".join(map(str, grid)))
def test_any_grid_and_ratio(grid: tuple[int, int, int], kind: str) -> None:
    tokens = clip(grid, kind)
    t, n = grid[0], len(tokens)
    for ratio, settings in product(RATIOS, ({}, {"official": True}, {"per_round": 2})):
        reduction = ToMe(retention_ratio=ratio, **settings).decide(tokens, PROJECTOR)
        assert len(reduction) == max(1, floor(ratio * n))
        assert reduction.is_identity == (len(reduction) == n)
        owner = owners(reduction)
        assert (owner >= 0).all() and torch.equal(owner[reduction.keep], reduction.keep)
        size = owner.bincount(minlength=n)[reduction.keep]
        mean = torch.zeros(n, 8).index_add(0, owner, tokens.features)[reduction.keep] / size[:, None]
        torch.testing.assert_close(reduction.apply(tokens.features), mean, atol=1e-5, rtol=1e-5)
        if len(reduction) >= t:
            counts = per_frame(reduction, grid)
            assert max(counts) - min(counts) <= 1
            assert torch.equal(owner // (n // t), torch.arange(n) // (n // t))  # no token leaves its frame


def test_by_hand() -> None:
    # Angles 0, 10, 60, 65, 200, 180 degrees: 0 is most like 10, 60 like 65, 200 like 180. One goes: 60 to 65.
    # Two rounds to 2: first 60 and 0 and 200 go, which leaves the means of (0, 10), (60, 65), (200, 180), all at odd
    # places; then the first and third may go: the first, 5 degrees, to 62.5 rather than the third, 190.
    angle = torch.tensor([0.0, 10, 60, 65, 200, 180]).deg2rad()
    tokens = VideoTokens(torch.stack([angle.cos(), angle.sin()], 1), (1, 2, 3))
    assert owners(ToMe(retention_ratio=5 / 6).decide(tokens, PROJECTOR)).tolist() == [0, 1, 3, 3, 4, 5]
    assert owners(ToMe(retention_ratio=0.5).decide(tokens, PROJECTOR)).tolist() == [1, 1, 3, 3, 5, 5]
    assert owners(ToMe(retention_ratio=2 / 6).decide(tokens, PROJECTOR)).tolist() == [3, 3, 3, 3, 5, 5]


def test_fewer_tokens_than_frames() -> None:
    # Frames 0 and 1 are alike, and 2 and 3.
    picture = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(0))
    tokens = VideoTokens(picture[[0, 0, 1, 1]].flatten(0, 1), (4, 2, 2))
    owner = owners(ToMe(retention_ratio=2 / 16).decide(tokens, PROJECTOR))
    assert (owner[:8] == owner[0]).all() and (owner[8:] == owner[8]).all() and owner[0] < 8 <= owner[8]


def test_bad_settings() -> None:
    with pytest.raises(ValueError, match="tome: per_round must be at least 1, got 0"):
        ToMe(per_round=0)
    with pytest.raises(TypeError, match="tome: per_round must be of type int"):
        ToMe(per_round=1.5)


# -- the op ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", [*KINDS, "zeros", "half precision"])
def test_matches_as_defined(kind: str) -> None:
    for n, channels, protected in [(1, 3, 0), (2, 3, 0), (2, 3, 1), (9, 1, 0), (40, 8, 0), (41, 33, 1), (42, 8, 2)]:
        tokens: Any = clip((1, 1, n), "cuts" if kind in ("zeros", "half precision") else kind, channels).features
        if kind == "still":
            tokens = tokens[torch.arange(n) * 3 % max(1, n // 2)]
        if kind == "zeros":
            tokens = tokens * (torch.arange(n) % 3 > 0)[:, None]
        if kind == "half precision":
            tokens = tokens.bfloat16()
        for count in {0, max(0, n - protected) // 4, max(0, n - protected) // 2}:
            got, want = (module.bipartite_match(tokens, count, protected) for module in (fast, naive))
            assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_matches_too_close_to_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast, "NOISE", 1e-2)
    tokens = clip((1, 1, 60), "cuts", 8).features
    got, want = (module.bipartite_match(tokens, 20) for module in (fast, naive))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize(("n", "count", "protected"), [(4, 3, 0), (4, 2, 1), (4, -1, 0), (1, 1, 2)])
def test_too_many_matches(n: int, count: int, protected: int) -> None:
    with pytest.raises(
        ValueError, match=rf"count must be 0 to half of the {max(0, n - protected)} tokens .* got {count}"
    ):
        ops.bipartite_match(torch.zeros(n, 2), count, protected)
