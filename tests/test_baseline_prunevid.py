"""PruneVid's two halves against recorded runs of its official code, and what the library promises beyond it."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from recorded import recorded
from reductions import dense
from torch import Tensor

import vidcompress
from vidcompress import ops
from vidcompress.method import Pipeline, floor
from vidcompress.methods.prunevid import PruneVid
from vidcompress.methods.prunevid_inner import PruneVidInner
from vidcompress.methods.prunevid_outer import PruneVidOuter, _scenes
from vidcompress.tokens import Grid, Site, VideoTokens

PROJECTOR = Site.projector()
GRIDS = [(1, 1, 1), (1, 4, 5), (2, 1, 5), (3, 2, 2), (7, 3, 3), (12, 4, 4), (20, 1, 2)]
both_implementations = pytest.mark.parametrize("implementation", ["torch", "naive"])

CASES = recorded("prunevid")


def named(prefix: str) -> list[str]:
    return [name for name in CASES if name.startswith(prefix)]


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
    signals = {"text_attention.heads": torch.rand(4, 3, t * h * w, generator=draw)}
    return VideoTokens(features.flatten(0, 1), grid, signals=signals)


# -- recorded runs: before the LLM -------------------------------------------------------------------------------------
@both_implementations
@pytest.mark.parametrize("cls", [PruneVidOuter, PruneVid], ids=["prunevid_outer", "prunevid"])
@pytest.mark.parametrize("name", named("merge"))
def test_outer_as_recorded(name: str, cls: Any, implementation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VIDCOMPRESS_OPS", implementation)
    facts, t = CASES[name]
    features, group = t["features"], t["group"].flatten()
    method = cls(
        tau=facts["tau"],
        segment_ratio=facts["temporal_segment_ratio"],
        cluster_ratio=facts["cluster_ratio"],
        official=True,
    )
    tokens = VideoTokens(features.flatten(0, 1), (len(features), *facts["grid"]))
    reduction = method.decide(tokens, PROJECTOR)
    notes = reduction.notes
    assert [end - start for start, end in notes["scenes"]] == t["window_sizes"].tolist()
    counts, scenes = notes["counts"], len(notes["scenes"])
    assert counts[:scenes] == t["static_sizes"].tolist()
    frames = [sum(counts[scenes + f] for f in range(start, end)) for start, end in notes["scenes"]]
    assert frames == t["dynamic_sizes"].tolist()
    assert len(reduction) == facts["n_out"] <= method.budget(tokens.grid) < len(tokens) and not method.exact
    # A survivor takes in the tokens of one recorded group, all of them and in equal parts.
    row = group[reduction.keep]
    torch.testing.assert_close(reduction.apply(tokens.features), t["tokens"][row], rtol=1e-4, atol=1e-5)
    share = dense(reduction)
    assert torch.equal(share > 0, row[:, None] == group)
    torch.testing.assert_close(share.amax(1), 1 / group.bincount()[row].double())
    # The groups that the inner half goes by: the static ones of a scene together, the others by frame.
    of_scene = t["static_mask"].bool().repeat_interleave(t["window_sizes"], 0).flatten()
    assert torch.equal(notes["group"] < scenes, of_scene)
    frame = torch.arange(len(tokens)) // features.shape[1]
    assert torch.equal(notes["group"][~of_scene], frame[~of_scene] + scenes)


def test_frame_clusters_as_recorded() -> None:
    for name in named("merge"):
        facts, t = CASES[name]
        method = PruneVidOuter(segment_ratio=facts["temporal_segment_ratio"])
        centres = t["frame_centers"][t["frame_clusters"]]
        assert method._frame_clusters(t["features"].mean(1)) == centres.tolist()


def test_scenes_as_recorded() -> None:
    _, t = CASES["refine"]
    for labels, refined, lengths in zip(t["labels"], t["refined"], t["segment_lengths"], strict=True):
        scenes = _scenes(labels.tolist())
        assert [end - start for start, end in scenes] == [n for n in lengths.tolist() if n]
        assert all(len(refined[start:end].unique()) == 1 for start, end in scenes)


def test_scenes_by_hand() -> None:
    for labels, want in {
        "0": [(0, 1)],
        "0123": [(0, 4)],  # no run of two
        "0011": [(0, 2), (2, 4)],
        "00211": [(0, 3), (3, 5)],  # the run before is as long
        "002111": [(0, 2), (2, 6)],  # the run behind is longer
        "2001": [(0, 4)],
        "00001001111": [(0, 7), (7, 11)],  # of each cluster only the longest run counts
        "001100": [(0, 2), (2, 4), (4, 6)],  # and all of the longest
        "00200": [(0, 5)],  # between two of one cluster
        "0021131111": [(0, 2), (2, 10)],
    }.items():
        assert _scenes([int(label) for label in labels]) == want, labels


# -- recorded runs: inside the LLM -------------------------------------------------------------------------------------
def recorded_groups(t: dict[str, Tensor]) -> Tensor:
    """[n] the group of every token, in the order of the code: of each window static, then frame after frame."""
    sizes = []
    for frames, static, moving in zip(
        *(t[f"{k}_sizes"].tolist() for k in ("window", "static", "dynamic")), strict=True
    ):
        sizes += [static, *[moving // frames] * frames]
    return torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))


@both_implementations
@pytest.mark.parametrize("cls", [PruneVidInner, PruneVid], ids=["prunevid_inner", "prunevid"])
@pytest.mark.parametrize("name", named("inner"))
def test_inner_as_recorded(name: str, cls: Any, implementation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VIDCOMPRESS_OPS", implementation)
    facts, t = CASES[name]
    attention, group = t["attention"][0], recorded_groups(t)
    n, site = attention.shape[-1], Site.decoder(facts["selected_layer"])
    signals = {"text_attention.heads": attention}
    tokens = VideoTokens(torch.zeros(n, 4), (1, 1, n), torch.arange(n), signals, {"group": group})
    ratio = "retention_ratio" if cls is PruneVidInner else "keep_ratio"
    method = cls(**{ratio: facts["alpha"]}, layer=site.layer, official=True)
    assert method.sites()[-1] == site
    reduction = method.decide(tokens, site)
    assert torch.equal(reduction.keep, t["keep"]) and reduction.slot is None
    assert len(reduction) <= method.count(site, tokens.grid, n, n) == floor(facts["alpha"] * n)
    before, after = torch.arange(facts["n_prefix"]), torch.arange(facts["n_text"]) + facts["n_prefix"] + n
    assert torch.equal(torch.cat([before, reduction.keep + facts["n_prefix"], after]), t["keep_sequence"])
    # The exact budget gives the groups what rounding down takes from them.
    exact = replace(method, official=False).decide(tokens, site)
    assert len(exact) == floor(facts["alpha"] * n)
    extra = group[exact.keep].bincount(minlength=int(group.max()) + 1)
    extra -= group[reduction.keep].bincount(minlength=len(extra))
    assert extra.min() >= 0 and extra.max() <= 1


# -- by hand -----------------------------------------------------------------------------------------------------------
def test_outer_by_hand() -> None:
    # Two scenes of four and two frames; position 0 stands still in both, position 1 in the second alone. Groups: a
    # static token, four frames of two others, two static tokens, two frames of one other: 1 + 4 * 2 + 2 + 2 = 13 of 18.
    a, b, c = 10 * torch.eye(8)[:3]
    e = torch.eye(8)[4:]
    first = [torch.stack([a, e[f % 4], 2 * e[(f + 1) % 4]]) for f in range(4)]
    second = [torch.stack([b, c, e[3] * (-1) ** f]) for f in range(2)]
    tokens = VideoTokens(torch.cat([*first, *second]), (6, 1, 3))
    method = PruneVidOuter(retention_ratio=13 / 18, segment_ratio=0.34, tau=0.6)
    reduction = method.decide(tokens, PROJECTOR)
    assert reduction.notes["scenes"] == [(0, 4), (4, 6)]
    assert reduction.notes["counts"] == [1, 2, 2, 2, 2, 2, 1, 1]
    assert reduction.keep.tolist() == [0, 1, 2, 4, 5, 7, 8, 10, 11, 12, 13, 14, 17]
    share = dense(reduction)
    assert share[0].nonzero().squeeze(1).tolist() == [0, 3, 6, 9] and share[9].nonzero().squeeze(1).tolist() == [12, 15]
    assert (share > 0).sum(1).tolist() == [4] + [1] * 8 + [2, 2, 1, 1]
    # Of eight, one of every group: then the two others of a frame are one mean.
    eight = replace(method, retention_ratio=8 / 18).decide(tokens, PROJECTOR)
    assert eight.notes["counts"] == [1] * 8 and (dense(eight) > 0).sum(1).tolist() == [4, 2, 2, 2, 2, 4, 1, 1]
    # Of sixteen two tokens are to be merged over time. All that is static has not changed at all, so the first would
    # go first; but it would remove three, and those that remove one come after it.
    sixteen = replace(method, retention_ratio=16 / 18).decide(tokens, PROJECTOR)
    assert len(sixteen) == 16 and sixteen.notes["group"].lt(2).sum() == 0


def test_inner_by_hand() -> None:
    # Two frames of four: half of eight is two a frame. The best of any head and any text token count, not their mean.
    first = torch.tensor([[0.9, 0.0, 0.1, 0.3, 0.2, 0.2, 0.2, 0.2], [0.0, 0.0, 0.1, 0.3, 0.3, 0.4, 0.2, 0.2]])
    second = torch.tensor([[0.0, 0.2, 0.1, 0.3, 0.2, 0.2, 0.5, 0.2], [0.0, 0.2, 0.1, 0.3, 0.2, 0.2, 0.2, 0.2]])
    signals = {"text_attention.heads": torch.stack([first, second])}
    tokens = VideoTokens(torch.zeros(8, 2), (2, 2, 2), torch.arange(8), signals)
    site = Site.decoder(10)
    assert PruneVidInner(retention_ratio=0.5).decide(tokens, site).keep.tolist() == [0, 3, 5, 6]
    # In three groups, of which one has a single token: it stays, or by the code's rounding it goes.
    group = torch.tensor([0, 0, 0, 1, 2, 2, 2, 2])
    tokens = replace(tokens, notes={"group": group})
    assert PruneVidInner(retention_ratio=0.5).decide(tokens, site).keep.tolist() == [0, 3, 5, 6]
    assert PruneVidInner(retention_ratio=0.5, official=True).decide(tokens, site).keep.tolist() == [0, 5, 6]
    # Where the code would keep nothing, the best stays.
    assert PruneVidInner(retention_ratio=0.2, official=True).decide(tokens, site).keep.tolist() == [0]


def test_the_inner_half_goes_by_the_groups_of_the_outer() -> None:
    tokens = clip((12, 4, 4))
    method = PruneVid(retention_ratio=0.5, keep_ratio=0.5)
    outer = method.decide(tokens, PROJECTOR)
    signals = {"text_attention.heads": tokens.signal("text_attention.heads")[..., outer.keep]}
    seen = VideoTokens(outer.apply(tokens.features), tokens.grid, outer.keep, signals, outer.notes)
    inner = method.decide(seen, Site.decoder(9))
    counts = torch.tensor(outer.notes["counts"])
    group = outer.notes["group"][outer.keep]
    assert torch.equal(group.bincount(minlength=len(counts)), counts)
    kept = group[inner.keep].bincount(minlength=len(counts))
    assert ((kept - counts / 2).abs() <= 1).all() and (kept[counts > 0] > 0).all()
    # They are those of the survivors whatever another method removed in between.
    left = torch.arange(0, len(outer), 3)
    signals = {"text_attention.heads": signals["text_attention.heads"][..., left]}
    thinned = VideoTokens(seen.features[left], seen.grid, outer.keep[left], signals, outer.notes)
    of_left = group[left].bincount(minlength=len(counts))
    kept = group[left][method.decide(thinned, Site.decoder(9)).keep].bincount(minlength=len(counts))
    assert (kept <= of_left).all() and kept.sum() == len(left) // 2


def test_layers_follow_the_depth() -> None:
    assert [PruneVidInner().sites(depth)[0].layer for depth in (4, 24, 28, 32, 80)] == [1, 8, 9, 10, 25]
    assert PruneVid(layer=3).sites(28) == [PROJECTOR, Site.decoder(3)]
    assert Pipeline.of(PruneVid()).counts((32, 14, 14)) == {PROJECTOR: 627, Site.decoder(9): 250}


# -- the ops -----------------------------------------------------------------------------------------------------------
@both_implementations
def test_window_change(implementation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VIDCOMPRESS_OPS", implementation)
    # Turned by 0, 60 and 90 degrees: cosines .5, 0 and cos 30; equal up to the length; all zero; zero once, so that two
    # of three pairs have cosine 0; opposite in one frame: 1, -1, -1; zero twice: one pair of zeros, two cosines of 0.
    turned = torch.deg2rad(torch.tensor([0.0, 60.0, 90.0]))
    one, none = torch.tensor([3.0, 4.0]), torch.zeros(2)
    tokens = torch.stack([
        torch.stack([turned.cos(), turned.sin()], -1), torch.stack([one, 2 * one, 3 * one]), torch.zeros(3, 2),
        torch.stack([one, none, one]), torch.stack([one, -one, one]), torch.stack([none, one, none]),
    ], 1)  # fmt: skip
    want = [1 - (0.5 + 0.75**0.5) / 3, 0, 0, 2 / 3, 4 / 3, 2 / 3]
    got = ops.window_change(tokens)
    assert got.dtype == torch.float64 and got.tolist() == pytest.approx(want, abs=2e-6) and got[1] == got[2] == 0
    assert ops.window_change(tokens[:1]).tolist() == [0.0] * 6
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(5, 7, 12, generator=draw).to(torch.bfloat16)
    unit = torch.nn.functional.normalize(x.double(), dim=-1)
    pairs = [(unit[i] * unit[j]).sum(-1) for i, j in itertools.combinations(range(5), 2)]
    torch.testing.assert_close(ops.window_change(x), 1 - torch.stack(pairs).mean(0), atol=1e-6, rtol=0)


def test_fair_shares() -> None:
    assert ops.fair_shares(10, [50, 30, 20]) == [5, 3, 2]
    assert ops.fair_shares(10, [97, 0, 1, 2]) == [8, 0, 1, 1]  # one each at least
    assert ops.fair_shares(2, [97, 1, 1]) == [2, 0, 0]  # too few for that
    assert ops.fair_shares(5, [3, 2]) == [3, 2]
    with pytest.raises(ValueError, match="do not fit"):
        ops.fair_shares(6, [3, 2])


# -- what the library promises -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: "x".join(map(str, grid)))
def test_counts_are_exact_and_nothing_is_lost(grid: Grid) -> None:
    for kind in ("slow", "still", "cuts", "one token", "zero"):
        tokens = clip(grid, kind)
        for ratio in (0.01, 0.1, 0.3, 0.6, 0.95, 1.0):
            method = PruneVidOuter(retention_ratio=ratio)
            reduction = method.decide(tokens, PROJECTOR)
            assert len(reduction) == method.budget(grid) == max(1, floor(ratio * len(tokens)))
            share = dense(reduction)
            torch.testing.assert_close(share.sum(1), torch.ones(len(reduction), dtype=torch.float64))
            every = all(c for c, n in zip(reduction.notes["counts"], reduction.notes["group"].bincount().tolist()) if n)
            assert ((share > 0).sum(0) == 1).all() if every else ((share > 0).sum(0) <= 1).all()
        assert PruneVidOuter(retention_ratio=1.0).decide(tokens, PROJECTOR).is_identity
        official = PruneVidOuter(official=True)
        kept = official.decide(tokens, PROJECTOR)
        assert 0 < len(kept) <= official.budget(grid) and ((dense(kept) > 0).sum(0) == 1).all()


def test_official_keeps_one_cluster_at_least() -> None:
    tokens = clip((4, 4, 4), "cuts")
    assert len(PruneVidOuter(official=True, cluster_ratio=0.0).decide(tokens, PROJECTOR)) == 4


@pytest.mark.parametrize(
    ("name", "settings", "says"),
    [
        ("prunevid_outer", {"tau": 1.5}, r"tau must be in \[-1, 1\], got 1.5"),
        ("prunevid_outer", {"segment_ratio": -0.1}, r"segment_ratio must be in \[0, 1\], got -0.1"),
        ("prunevid_outer", {"cluster_ratio": 2}, r"cluster_ratio must be in \[0, 1\], got 2"),
        ("prunevid_outer", {"neighbours": 0}, "neighbours must be at least 1, got 0"),
        ("prunevid_inner", {"layer": -1}, "layer must be at least 0, got -1"),
        ("prunevid_inner", {"retention_ratio": 0}, r"retention_ratio must be in \(0, 1\], got 0"),
        ("prunevid", {"keep_ratio": 1.5}, r"keep_ratio must be in \(0, 1\], got 1.5"),
    ],
)
def test_bad_settings(name: str, settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        vidcompress.load(name, **settings)
