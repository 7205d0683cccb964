"""HoliTom's two halves against recorded runs of its official code, and what the library promises beyond it."""

from __future__ import annotations

import itertools
from dataclasses import replace
from math import isqrt
from typing import Any

import pytest
import torch
from recorded import recorded
from reductions import dense
from tiny import ONE, compress, generate, llava, llava_inputs, video_grid
from torch import Tensor

import vidcompress
from vidcompress import ops
from vidcompress.method import Pipeline, floor
from vidcompress.methods.holitom import HoliTom
from vidcompress.methods.holitom_inner import HoliTomInner
from vidcompress.methods.holitom_outer import HoliTomOuter
from vidcompress.tokens import Grid, Site, VideoTokens

PROJECTOR = Site.projector()
GRIDS = [(1, 1, 1), (1, 3, 3), (2, 1, 5), (3, 2, 2), (7, 3, 3), (12, 4, 4), (20, 1, 2)]
both_implementations = pytest.mark.parametrize("implementation", ["torch", "naive"])


OUTER, INNER = recorded("holitom_outer"), recorded("holitom_inner")


def clip(grid: Grid, kind: str = "slow", seed: int = 0) -> VideoTokens:
    """Sixteen channels; "slow" moves more at some positions than at others, and differs between its halves."""
    t, h, w = grid
    draw = torch.Generator().manual_seed(seed)
    scenes = torch.randn(2, h * w, 16, generator=draw)[torch.arange(t) * 2 // t]
    noise = torch.randn(t, h * w, 16, generator=draw)
    much = torch.rand(h * w, 1, generator=draw)
    features = {
        "slow": scenes + much * noise,
        "still": scenes[:1].expand(t, -1, -1),
        "cuts": noise,
        "one token": torch.ones(t, h * w, 16),
        "zero": torch.zeros(t, h * w, 16),
    }[kind]
    attention = torch.rand(t * h * w, generator=draw)
    signals = dict.fromkeys(("saliency.received", "last_query_attention.previous"), attention)
    return VideoTokens(features.flatten(0, 1), grid, signals=signals)


# -- recorded runs: before the LLM -------------------------------------------------------------------------------------
def recorded_tokens(case: dict[str, Tensor]) -> VideoTokens:
    t, p, _ = case["in.features"].shape
    signals = {"saliency.received": case["in.attention"].flatten()}
    return VideoTokens(case["in.features"].flatten(0, 1), (t, isqrt(p), isqrt(p)), signals=signals)


def as_recorded(cls: type[HoliTomOuter], params: dict[str, Any]) -> HoliTomOuter:
    assert params["D"] == 0 and not params["no_beta"]
    return cls(
        retention_ratio=params["retain_ratio"],
        tau=params["tau"],
        beta=params["beta"],
        neighbours=params["K"],
        longest_window=params["max_window_size"],
        official=True,
    )


@both_implementations
@pytest.mark.parametrize("cls", [HoliTomOuter, HoliTom], ids=["holitom_outer", "holitom"])
@pytest.mark.parametrize("name", OUTER)
def test_outer_as_recorded(name: str, cls: Any, implementation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VIDCOMPRESS_OPS", implementation)
    facts, case = OUTER[name]
    tokens = recorded_tokens(case)
    method = as_recorded(cls, facts["params"])
    reduction = method.decide(tokens, PROJECTOR)
    index, is_token = case["out.index"].long(), case["out.kind"] != 2
    assert torch.equal(reduction.keep, case["out.index_ascending"].long())
    assert [[start, end - 1] for start, end in reduction.notes["windows"]] == case["out.windows"].tolist()
    # The vectors, in the order of their places: on LLaVA-Video the code has them so, on LLaVA-OneVision it has not.
    out, order = reduction.apply(tokens.features), index[is_token].argsort()
    torch.testing.assert_close(out, case["out.tokens"][is_token][order], rtol=1e-4, atol=1e-5)
    if facts["params"]["newline_mode"] == "grid":
        assert torch.equal(order, torch.arange(len(order)))
    copied = (case["out.kind"] == 0)[is_token][order]
    assert torch.equal(out[copied], tokens.features[reduction.keep[copied]])
    assert len(reduction) == facts["facts"]["n_tokens"] <= method.budget(tokens.grid) and not method.exact


@pytest.mark.parametrize("name", OUTER)
def test_outer_windows_and_clusters_as_recorded(name: str) -> None:
    facts, case = OUTER[name]
    tokens = recorded_tokens(case)
    reduction = as_recorded(HoliTomOuter, facts["params"]).decide(tokens, PROJECTOR)
    mixed, p = dense(reduction), tokens.grid[1] * tokens.grid[2]
    for (start, end), static, assign in zip(
        reduction.notes["windows"], case["out.static_mask"], case["out.static_assign"].long(), strict=True
    ):
        assert static.sum() * bool(end - start > 1) == (assign != -1).sum()
        for position in (assign >= 0).nonzero().squeeze(1).tolist():
            row = mixed[torch.searchsorted(reduction.keep, start * p + assign[position])]
            own = row[torch.arange(start, end) * p + position]
            assert (own > 0).all() and own.allclose(own[:1])


@pytest.mark.parametrize("name", [name for name, (facts, _) in OUTER.items() if "grid" in name])
def test_a_row_that_keeps_a_token_keeps_its_newline(name: str) -> None:
    # So has the code on LLaVA-Video, and so has the engine (docs/decisions.md, D5).
    _, case = OUTER[name]
    side = isqrt(case["in.features"].shape[1])
    index = case["out.index"].tolist()
    rows = [before // side for before, this in itertools.pairwise(index) if this == -1]
    assert rows == (case["out.index_ascending"] // side).unique().tolist()


def test_the_exact_budget_differs_from_the_official_count_by_rounding_alone() -> None:
    for facts, case in OUTER.values():
        tokens, official = recorded_tokens(case), as_recorded(HoliTomOuter, facts["params"])
        exact = replace(official, official=False)
        want, got = official.decide(tokens, PROJECTOR), exact.decide(tokens, PROJECTOR)
        assert got.notes["windows"] == want.notes["windows"]
        for key in ("static", "moving"):
            assert all(abs(a - b) <= 1 for a, b in zip(got.notes[key], want.notes[key], strict=True))
        assert len(got) == floor(exact.retention_ratio * len(tokens))


# -- recorded runs: inside the LLM -------------------------------------------------------------------------------------
@both_implementations
@pytest.mark.parametrize("cls", [HoliTomInner, HoliTom], ids=["holitom_inner", "holitom"])
@pytest.mark.parametrize("name", INNER)
def test_inner_as_recorded(name: str, cls: Any, implementation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VIDCOMPRESS_OPS", implementation)
    facts, case = INNER[name]
    params = facts["params"]
    start, n = params["start"], params["length"]
    video = slice(start, start + n)
    signals = {"last_query_attention.previous": case["in.attention_rows"].mean(0)[video]}
    tokens = VideoTokens(case["in.hidden"][video], (1, 1, n), torch.arange(n), signals)
    ratio = "retention_ratio" if cls is HoliTomInner else "keep_ratio"
    method = cls(**{ratio: 1 - params["merge_ratio"]}, layer=params["layer_k"])
    site = Site.decoder(params["layer_k"])
    assert method.sites()[-1] == site
    reduction = method.decide(tokens, site)
    keep = case["out.keep"].long()
    inside = (keep >= start) & (keep < start + n)
    assert torch.equal(reduction.keep, keep[inside] - start)
    assert method.exact and len(reduction) == facts["facts"]["n_image_kept"]
    out = reduction.apply(tokens.features)
    torch.testing.assert_close(out, case["out.hidden_out"][inside], rtol=1e-4, atol=1e-5)
    # Which kept token every other one is merged into.
    into = case["out.merged_into"].long()
    want = {(int(i) - start, j) for j, i in enumerate(into) if i >= 0}
    assert {(int(reduction.keep[s]), int(j)) for s, j in zip(reduction.slot, reduction.source, strict=True)} >= want
    assert len(reduction.slot) == len(want) + len({i for i, _ in want})


# -- by hand -----------------------------------------------------------------------------------------------------------
def test_outer_by_hand() -> None:
    # Position 0 stands still in frames 0 to 2, position 1 in 1 to 3, position 2 in all but from 1 to 2. One window of
    # all four frames would save nothing, 0-2 saves 2 (position 0), 1-3 saves 2, and 0-1 with 2-3 saves 2 + 2 = 4:
    # positions 0 and 2, then 1 and 2. N = 12; two moving tokens a window are left, and two static means: M = 8.
    a, b, c, d = torch.eye(4)
    frames = [[a, b, c], [a, c, c], [a, c, d], [b, c, d]]
    attention = torch.tensor([[9, 1, 9], [9, 2, 9], [4, 9, 9], [3, 9, 9.0]])
    tokens = VideoTokens(
        torch.stack([torch.stack(f) for f in frames]).flatten(0, 1), (4, 1, 3),
        signals={"saliency.received": attention.flatten()},
    )  # fmt: skip
    reduction = HoliTomOuter(retention_ratio=8 / 12, tau=0.5).decide(tokens, PROJECTOR)
    assert reduction.notes == {"windows": [(0, 2), (2, 4)], "static": [2, 2], "moving": [1, 1, 1, 1]}
    assert reduction.keep.tolist() == [0, 1, 2, 4, 6, 7, 8, 9]
    share = dense(reduction)
    assert share[0].nonzero().squeeze(1).tolist() == [0, 3] and share[5].nonzero().squeeze(1).tolist() == [7, 10]
    assert share[[0, 2, 5, 6]].amax(1).eq(0.5).all() and share[[1, 3, 4, 7]].amax(1).eq(1).all()
    # Of six, one of every group but for the window means, which are as many as there are tokens to spare: 4 + 2.
    six = HoliTomOuter(retention_ratio=0.5, tau=0.5).decide(tokens, PROJECTOR)
    assert six.notes["static"] == [1, 1] and six.notes["moving"] == [1, 1, 1, 1]
    # Two static tokens in one cluster: .6 of its centre and .4 of the other; a plain mean without beta.
    assert sorted(dense(six)[0][dense(six)[0] > 0].tolist()) == pytest.approx([0.2, 0.2, 0.3, 0.3])
    plain = HoliTomOuter(retention_ratio=0.5, tau=0.5, beta=None).decide(tokens, PROJECTOR)
    assert sorted(dense(plain)[0][dense(plain)[0] > 0].tolist()) == pytest.approx([0.25] * 4)
    # Fewer than the groups: static tokens are counted like all others.
    assert len(HoliTomOuter(retention_ratio=0.25, tau=0.5).decide(tokens, PROJECTOR)) == 3


def saved(windows: list[tuple[int, int]], still: Tensor) -> int:
    return sum((e - s - 1) * int(still[s : e - 1].all(0).sum()) for s, e in windows if e - s > 1)


def test_windows_save_most() -> None:
    # Against all ways to cut eight frames. The attention does not matter, and the room is enough.
    draw = torch.Generator().manual_seed(3)
    for longest in (1024, 3):
        for _ in range(10):
            still = torch.rand(7, 5, generator=draw) < 0.6
            turned = torch.cat([torch.zeros(1, 5), (~still).cumsum(0) * torch.pi / 2])
            features = torch.stack([turned.cos(), turned.sin()], -1).flatten(0, 1)
            tokens = VideoTokens(features, (8, 1, 5), signals={"saliency.received": torch.rand(40, generator=draw)})
            method = HoliTomOuter(retention_ratio=0.1, tau=0.5, longest_window=longest)
            windows = method.decide(tokens, PROJECTOR).notes["windows"]
            assert [s for s, _ in windows[1:]] == [e for _, e in windows[:-1]] and windows[-1][1] == 8
            assert max(e - s for s, e in windows) <= longest
            every = (
                list(itertools.pairwise((0, *cuts, 8)))
                for count in range(8)
                for cuts in itertools.combinations(range(1, 8), count)
            )
            most = max(saved(w, still) for w in every if max(e - s for s, e in w) <= longest)
            assert saved(windows, still) == most


def test_inner_by_hand() -> None:
    # Kept by attention: tokens 1 and 3, (1, 0) and (0, 1). Tokens 0 (2, 0), 2 (4, 1) and 4 (6, 0) join token 1 in this
    # order: (1, 0) -> (1.5, 0) -> (2.75, .5) -> (4.375, .25). Token 3 is joined by none.
    features = torch.tensor([[2.0, 0], [1, 0], [4, 1], [0, 1], [6, 0]])
    signals = {"last_query_attention.previous": torch.tensor([0.1, 0.3, 0.1, 0.4, 0.2])}
    tokens = VideoTokens(features, (1, 1, 5), torch.arange(5), signals)
    reduction = HoliTomInner(retention_ratio=0.5).decide(tokens, Site.decoder(18))
    assert reduction.keep.tolist() == [1, 3]
    assert reduction.apply(features).tolist() == [[4.375, 0.25], [0.0, 1.0]]


def test_inner_with_more_members_than_a_float_has_bits() -> None:
    features = torch.cat([torch.ones(1, 4), torch.arange(1.0, 400)[:, None].expand(-1, 4)])
    signals = {"last_query_attention.previous": torch.arange(400.0).flip(0)}
    tokens = VideoTokens(features, (1, 1, 400), torch.arange(400), signals)
    reduction = HoliTomInner(retention_ratio=1e-9).decide(tokens, Site.decoder(18))
    want = features[0]
    for token in features[1:]:
        want = (want + token) / 2
    torch.testing.assert_close(reduction.apply(features), want[None])


def test_layers_follow_the_depth() -> None:
    assert [HoliTomInner().sites(depth)[0].layer for depth in (4, 24, 28, 80)] == [3, 15, 18, 51]
    assert HoliTom().sites(28) == [PROJECTOR, Site.decoder(18)] and HoliTom(layer=3).sites(28)[1] == Site.decoder(3)
    assert Pipeline.of(HoliTom()).counts((32, 14, 14)) == {PROJECTOR: 627, Site.decoder(18): 314}


# -- the op ------------------------------------------------------------------------------------------------------------
def test_steady_positions() -> None:
    change = torch.tensor([[0.1, 0.3, 0.2, 0.6], [0.0, 0.0, 0.0, 0.0], [0.2, 0.4, 0.9, 0.05]])
    lengths = torch.tensor([3, 1, 2])
    every = [[True, True, True, False], [False] * 4, [True, True, False, True]]
    assert ops.steady_positions(change, 0.5, lengths, 100).tolist() == every
    # From the steadiest on they remove 1, 2, 2, 1, 2 and 1 tokens; of two equal ones the first counts as steadier.
    removes = [
        int((ops.steady_positions(change, 0.5, lengths, room) * (lengths[:, None] - 1)).sum()) for room in range(10)
    ]
    assert removes == [0, 1, 1, 3, 3, 5, 6, 6, 8, 9]
    assert not ops.steady_positions(change, 0.0, lengths, 100).any()


# -- what the library promises -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: "x".join(map(str, grid)))
def test_counts_are_exact_and_weights_sum_to_one(grid: Grid) -> None:
    for kind in ("slow", "still", "cuts", "one token", "zero"):
        tokens = clip(grid, kind)
        for ratio in (0.01, 0.1, 0.3, 0.6, 0.95, 1.0):
            method = HoliTomOuter(retention_ratio=ratio)
            reduction = method.decide(tokens, PROJECTOR)
            assert len(reduction) == method.budget(grid) == max(1, floor(ratio * len(tokens)))
            share = dense(reduction)
            torch.testing.assert_close(share.sum(1), torch.ones(len(reduction), dtype=torch.float64))
            assert ((share > 0).sum(0) <= 1).all()
            official = HoliTomOuter(retention_ratio=ratio, official=True)
            assert 0 < len(official.decide(tokens, PROJECTOR)) <= official.budget(grid)
        assert HoliTomOuter(retention_ratio=1.0).decide(tokens, PROJECTOR).is_identity


def test_what_is_static_keeps_a_token_while_the_budget_lasts() -> None:
    # One position of sixteen stands still in six frames. Its share, .1 * 96 / 91, is rounded down to nothing by the
    # code, and nothing of the position is left.
    tokens = clip((6, 4, 4), "cuts")
    features = tokens.features.clone()
    features[3::16] = 1.0
    tokens = replace(tokens, features=features)
    want, got = (HoliTomOuter(official=official).decide(tokens, PROJECTOR) for official in (True, False))
    assert want.notes["windows"] == got.notes["windows"] == [(0, 6)]
    assert want.notes["static"] == [0] and not (want.keep % 16 == 3).any()
    assert got.notes["static"] == [1] and (got.keep % 16 == 3).sum() == 1
    assert dense(got)[got.keep == 3].nonzero()[:, 1].tolist() == list(range(3, 96, 16))


def test_a_budget_beyond_what_merging_leaves() -> None:
    # Two halves of six equal frames are 2 * 4 means of 48 tokens, and the code then keeps no more whatever the ratio.
    # Of 24 tokens to be removed each position takes 5: four positions of eight do so, the fifth would be too many.
    features = torch.cat([half.repeat(6, 1) for half in torch.eye(8).split(4)])
    tokens = VideoTokens(features, (12, 2, 2), signals={"saliency.received": torch.arange(48.0)})
    assert len(HoliTomOuter(retention_ratio=0.5, official=True).decide(tokens, PROJECTOR)) == 8
    reduction = HoliTomOuter(retention_ratio=0.5).decide(tokens, PROJECTOR)
    assert reduction.notes["windows"] == [(0, 6), (6, 12)] and len(reduction) == 24
    assert reduction.notes["static"] == [4, 0]
    assert ((dense(reduction) > 0).sum(1) > 1).tolist() == [True] * 4 + [False] * 20


def test_where_the_code_keeps_nothing_one_token_stays() -> None:
    tokens = clip((4, 1, 2), "still")
    method = HoliTomOuter(retention_ratio=0.05, official=True)  # .4 tokens
    assert len(method.decide(tokens, PROJECTOR)) == 1


@pytest.mark.parametrize(
    ("name", "settings", "says"),
    [
        ("holitom_outer", {"tau": 1.5}, r"tau must be in \[-1, 1\], got 1.5"),
        ("holitom_outer", {"beta": -0.1}, r"beta must be in \[0, 1\], got -0.1"),
        ("holitom_outer", {"neighbours": 0}, "neighbours must be at least 1, got 0"),
        ("holitom_outer", {"longest_window": 0}, "longest_window must be at least 1, got 0"),
        ("holitom_inner", {"layer": 0}, "layer must be at least 1, got 0"),
        ("holitom_inner", {"retention_ratio": 0}, r"retention_ratio must be in \(0, 1\], got 0"),
        ("holitom", {"keep_ratio": 1.5}, r"keep_ratio must be in \(0, 1\], got 1.5"),
    ],
)
def test_bad_settings(name: str, settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        vidcompress.load(name, **settings)


def test_the_scripts_settings() -> None:
    for name in ("holitom_outer", "holitom"):
        for ratio, tau in {0.10: 0.65, 0.15: 0.8, 0.20: 0.8, 0.25: 0.8}.items():
            assert vidcompress.load(name, retention_ratio=ratio).tau == tau


def test_official_on_a_model() -> None:
    model, inputs = llava(), llava_inputs([ONE])
    with compress(model, "holitom", retention_ratio=0.25, official=True) as handle:
        generate(model, inputs, 3)
        outer, inner = handle.trace.last.steps
    assert 0 < outer.after <= vidcompress.load("holitom", retention_ratio=0.25, official=True).budget(video_grid(6))
    assert inner.after == max(1, round(0.5 * outer.after))
