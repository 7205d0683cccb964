"""What every method promises, over `list_methods()`; and the papers' algorithms on examples worked out by hand."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from reductions import dense, same
from torch import Tensor

from vidcompress import ops
from vidcompress.config import load
from vidcompress.method import Method, Pipeline, decay_for, floor, list_methods, setting
from vidcompress.methods.fastv import FastV
from vidcompress.methods.fastvid import FastVID
from vidcompress.methods.hieravid import HieraVid
from vidcompress.methods.infomerge import InfoMerge
from vidcompress.methods.pyramiddrop import PyramidDrop
from vidcompress.methods.random import Random
from vidcompress.methods.text_aware_merge import TextAwareMerge
from vidcompress.methods.unified import Unified
from vidcompress.methods.unified_pool import UnifiedPool
from vidcompress.methods.uniform_frames import UniformFrames
from vidcompress.methods.uniform_tokens import UniformTokens
from vidcompress.tokens import CachedTokens, Grid, Reduction, Site, VideoTokens

PROJECTOR = Site.projector()
NAMES = sorted(list_methods())
GRIDS = [(1, 1, 1), (1, 1, 2), (3, 1, 1), (1, 14, 14), (2, 3, 3), (5, 1, 7), (8, 4, 4), (32, 2, 2), (33, 3, 2)]
RATIOS = [0.01, 0.05, 0.1, 0.15, 0.25, 0.5, 0.9, 0.999, 1.0]

every_method = pytest.mark.parametrize("name", NAMES)
every_grid = pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: "x".join(map(str, grid)))


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


WHOLE = ("frame_features", "text_hidden", "last_text_hidden")
"""Signals that are not one number a token."""


def video(features: Tensor, grid: Grid, attention: Tensor | None = None, frames: Tensor | None = None) -> VideoTokens:
    """Tokens with all signals a method may ask for; frame features are mean tokens unless given."""
    n, channels = features.shape
    attention = rand(n, seed=17) if attention is None else attention.flatten()
    frames = features.float().view(grid[0], n // grid[0], -1).mean(1) if frames is None else frames
    kinds = ("saliency.head", "saliency.received", "text_attention", "last_query_attention", "first_look")
    signals = dict.fromkeys((*kinds, "last_query_attention.previous"), attention)
    signals["text_attention.heads"] = attention * torch.tensor([[[0.5]], [[1.0]]], dtype=attention.dtype)  # [2, 1, n]
    signals |= {"frame_features": frames, "text_hidden": randn(5, channels, seed=18).to(features.dtype)}
    signals["last_text_hidden"] = signals["text_hidden"][-1]
    signals["tower_keys"] = randn(n, 6, seed=19).to(features.dtype)
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


def assert_lawful(reduction: Reduction, tokens: VideoTokens, budget: int, exact: bool = True) -> Tensor:
    """The contract of one answer, which keeps `budget` tokens, or at most so many; returns the survivors' vectors."""
    keep = reduction.keep
    assert keep.dtype == torch.long and reduction.num_source == len(tokens)
    assert keep.tolist() == sorted(set(keep.tolist())) and 0 <= keep[0] and keep[-1] < len(tokens)
    assert len(reduction) == budget if exact else len(reduction) <= budget
    out = reduction.apply(tokens.features)
    assert out.shape == (len(reduction), tokens.features.shape[1]) and out.dtype == tokens.features.dtype
    assert out.isfinite().all()
    return out


@dataclass(frozen=True)
class Step:
    """What a method saw at one of its sites, and its answer."""

    method: Method
    site: Site
    seen: VideoTokens
    reduction: Reduction


def ask(method: Method, site: Site, seen: VideoTokens) -> Reduction:
    """Its answer; between decoding steps what stays, with the attention of a token that was decoded."""
    if not site.is_decoding:
        return method.decide(seen, site)
    if method.count(site, seen.grid, seen.entered, len(seen)) == len(seen):
        return Reduction.identity(len(seen), seen.features.device)
    assert seen.index is not None
    cached = CachedTokens(seen.grid, seen.index, seen.signals, seen.notes, seen.entered)
    return Reduction(method.retain(cached, site), len(seen))


def walk(compression: Method | Pipeline, tokens: VideoTokens, depth: int = 28) -> Iterator[Step]:
    """One video at all sites, as the engine leads it there; no decoder layer changes it on its way."""
    features, index, entered = tokens.features, torch.arange(len(tokens), device=tokens.features.device), len(tokens)
    notes: dict[str, dict[str, Any]] = {}
    pipeline = Pipeline.of(compression)
    for site, method in (pipeline.stages(depth) | pipeline.evictions(depth)).items():
        earlier = notes.get(method.name, {})
        signals = {
            key: s if key in WHOLE else s[index] if key == "tower_keys" else s[..., index]
            for key, s in tokens.signals.items()
        }
        seen = VideoTokens(features, tokens.grid, index if site.is_inner else None, signals, earlier, entered)
        reduction = ask(method, site, seen)
        yield Step(method, site, seen, reduction)
        features, index = reduction.apply(features), index[reduction.keep]
        notes[method.name] = {**earlier, **reduction.notes}
        entered = entered if site.is_inner else len(reduction)


def assert_same_walk(got: Method, want: Method, tokens: VideoTokens, others: VideoTokens | None = None) -> None:
    """The same answers at all sites; `others` is what `got` sees."""
    pairs = zip(walk(got, others or tokens), walk(want, tokens), strict=True)
    assert all(same(a.reduction, b.reduction) for a, b in pairs)


def build(name: str, ratio: float) -> Method:
    """The method at a ratio, or at the nearest one that it takes."""
    cls = list_methods()[name]
    least = {f.name: f.metadata["low"] for f in fields(cls)}["retention_ratio"]
    return cls(retention_ratio=max(ratio, least or 0))


def keeping_all(name: str) -> Method:
    method = build(name, 1.0)
    return replace(method, keep_ratio=1.0) if hasattr(method, "keep_ratio") else method


# -- the contract ------------------------------------------------------------------------------------------------------
def test_there_are_methods() -> None:
    outer = {name for name in NAMES if PROJECTOR in list_methods()[name]().sites()}
    inner = {name for name in NAMES if any(site.is_inner for site in list_methods()[name]().sites())}
    plain = {"fastvid", "infomerge", "random", "uniform_frames", "uniform_tokens", "unified_pool"}
    assert outer >= plain | {"unified", "hieravid"}
    assert inner >= {"unified", "hieravid", "text_aware_merge", "fastv", "pyramiddrop"} and not inner & plain


@every_method
def test_sites_are_ordered_and_numbered(name: str) -> None:
    for depth in (4, 24, 28, 32, 64):
        sites = list_methods()[name]().sites(depth)
        layers = [site.layer for site in sites]
        assert layers == sorted(set(layers)) and -1 <= layers[0] and layers[-1] < depth
        assert [s.stage for s in sites] == list(range(len(sites))) or hasattr(list_methods()[name], "keep_ratio")
        pipeline = Pipeline.of(list_methods()[name]())
        assert [*pipeline.stages(depth), *pipeline.evictions(depth)] == sites


@every_grid
@every_method
def test_lawful_and_exact_at_every_budget(name: str, grid: Grid) -> None:
    kept = []
    for ratio in RATIOS:
        method, tokens = build(name, ratio), scene("random", grid)
        counts = Pipeline.of(method).counts(grid)
        steps, again = list(walk(method, tokens)), list(walk(method, tokens))
        for step, second in zip(steps, again, strict=True):
            budget = method.count(step.site, grid, step.seen.entered, len(step.seen))
            assert isinstance(budget, int) and 1 <= budget <= len(step.seen)
            assert_lawful(step.reduction, step.seen, budget, method.exact)
            assert counts[step.site] == budget if method.exact else counts[step.site] >= budget
            assert same(step.reduction, second.reduction)
        assert counts.get(PROJECTOR, count(grid)) == method.budget(grid)
        kept.append(sum(Pipeline.of(method).lengths(grid)))
    assert kept == sorted(kept)
    assert set(Pipeline.of(keeping_all(name)).lengths(grid)) == {count(grid)}


@pytest.mark.parametrize("kind", [kind for kind in SCENES if kind != "random"])
@every_method
def test_lawful_and_exact_on_every_scene(name: str, kind: str) -> None:
    for grid in [(1, 5, 5), (5, 1, 7), (8, 4, 4), (17, 2, 1)]:
        for ratio in (0.05, 0.1, 0.25, 0.5, 0.9, 0.97):
            tokens = scene(kind, grid)
            counts = Pipeline.of(build(name, ratio)).counts(grid)
            for step in walk(build(name, ratio), tokens):
                assert_lawful(step.reduction, step.seen, counts[step.site], step.method.exact)


@pytest.mark.parametrize("attention", ["constant", "zero", "one peak"])
@every_method
def test_lawful_whatever_the_attention(name: str, attention: str) -> None:
    grid = (9, 4, 3)
    value = {"constant": torch.ones(108), "zero": torch.zeros(108), "one peak": torch.eye(108)[50]}[attention]
    for ratio in (0.05, 0.3, 0.9):
        for kind in ("random", "one colour", "all zero"):
            counts = Pipeline.of(build(name, ratio)).counts(grid)
            for step in walk(build(name, ratio), scene(kind, grid, attention=value)):
                assert_lawful(step.reduction, step.seen, counts[step.site], step.method.exact)


ADDING = {"dytok", "visionzip", "prumerge", "prumerge_plus"}
"""Methods that add to a survivor what joins it, as their papers do."""


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ADDING])
def test_a_survivor_is_a_mean(name: str) -> None:
    for kind in SCENES:
        for grid in [(1, 5, 5), (5, 1, 7), (8, 4, 4)]:
            for ratio in (0.05, 0.1, 0.25, 0.5, 0.9):
                for step in walk(build(name, ratio), scene(kind, grid)):
                    share = dense(step.reduction).sum(1)
                    torch.testing.assert_close(share, torch.ones_like(share), atol=1e-5, rtol=0)


@every_grid
@every_method
def test_everything_kept_is_the_identity(name: str, grid: Grid) -> None:
    tokens = scene("random", grid)
    for step in walk(keeping_all(name), tokens):
        assert step.reduction.is_identity
        assert torch.equal(step.reduction.apply(step.seen.features), tokens.features)


@every_method
def test_one_token_is_left_at_least(name: str) -> None:
    tiny = {"hieravid": {"first": 1e-9}, "pyramiddrop": {"ratios": (1e-9,) * 3}}
    method = build(name, 1e-9)
    both = {"keep_ratio": 1e-9} if hasattr(method, "keep_ratio") else {}
    method = replace(method, **tiny.get(name, both))
    for grid in [(1, 1, 1), (1, 3, 3), (4, 2, 2)]:
        steps = list(walk(method, scene("slow", grid)))
        for step in steps:
            assert_lawful(step.reduction, step.seen, Pipeline.of(method).counts(grid)[step.site], method.exact)
        # Before the LLM a token a frame, or of HieraVid what has nothing before it to be merged into.
        outer = {"fastvid": grid[0], "unified_pool": grid[0], "unified": grid[0], "hieravid": grid[1] * grid[2]}
        outer |= dict.fromkeys(("dycoke", "dycoke_outer"), grid[1] * grid[2])  # the first frame of a window stays whole
        assert len(steps[0].reduction) == outer.get(name, 1) or not method.exact
        assert len(steps[-1].reduction) == (1 if steps[-1].site.is_inner else outer.get(name, 1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
@every_method
def test_decisions_are_those_of_the_same_numbers_in_fp32(name: str, dtype: torch.dtype) -> None:
    grid, method = (10, 4, 5), build(name, 0.2)
    for step in walk(method, video(randn(200, 24).to(dtype), grid, rand(200).to(dtype))):
        half = step.seen
        signals = {key: value.float() for key, value in half.signals.items()}
        want = ask(method, step.site, replace(half, features=half.features.float(), signals=signals))
        assert same(step.reduction, want)
        out = assert_lawful(step.reduction, half, len(want))
        assert torch.equal(out, want.apply(half.features.float()).to(dtype))


@every_method
def test_only_the_input_decides(name: str) -> None:
    # Not the default dtype, autocast, the global random state or gradients; and nothing of that is changed.
    method, tokens = build(name, 0.2), scene("random", (8, 4, 4))
    for step in walk(method, tokens):
        seen, want = step.seen, step.reduction
        torch.manual_seed(5)
        state = torch.get_rng_state()
        torch.set_default_dtype(torch.bfloat16)
        try:
            got = ask(method, step.site, seen)
        finally:
            torch.set_default_dtype(torch.float32)
        assert same(got, want)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got = ask(method, step.site, seen)
            out = got.apply(seen.features)
        assert same(got, want) and torch.equal(out, want.apply(seen.features))
        assert torch.equal(torch.get_rng_state(), state)
        with_grad = replace(seen, features=seen.features.clone().requires_grad_())
        got = ask(method, step.site, with_grad)
        assert same(got, want) and (got.weight is None or not got.weight.requires_grad)
        noted = [note for note in got.notes.values() if isinstance(note, Tensor)]
        assert not any(note.requires_grad for note in noted)


@every_method
def test_the_input_stays_as_it_was(name: str) -> None:
    for step in walk(build(name, 0.2), scene("slow", (8, 4, 4))):
        features = step.seen.features.clone()
        signals = {key: value.clone() for key, value in step.seen.signals.items()}
        ask(step.method, step.site, step.seen)
        assert torch.equal(step.seen.features, features)
        assert all(torch.equal(step.seen.signals[key], value) for key, value in signals.items())


@every_method
def test_the_definitions_decide_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Two frames nearly alike, two segments, duplicated tokens: fast and naive ops give one answer.
    grid = (9, 3, 5)
    features = scene("slow", grid, 16).frames.clone()
    features[5:] += 0.7
    features[:, 3] = features[:, 7]
    tokens = video(features.flatten(0, 1), grid)
    for ratio in (0.1, 0.4):
        fast = list(walk(build(name, ratio), tokens))
        monkeypatch.setenv("VIDCOMPRESS_OPS", "naive")
        slow = list(walk(build(name, ratio), tokens))
        monkeypatch.delenv("VIDCOMPRESS_OPS")
        for a, b in zip(fast, slow, strict=True):
            assert torch.equal(a.reduction.keep, b.reduction.keep)
            torch.testing.assert_close(dense(a.reduction), dense(b.reduction), atol=1e-5, rtol=0)


@every_method
def test_the_order_of_channels_does_not_matter(name: str) -> None:
    method, tokens = build(name, 0.2), scene("slow", (9, 4, 5), 24)
    order = torch.randperm(24, generator=torch.Generator().manual_seed(3))
    signals = {k: s[..., order] if k in WHOLE else s for k, s in tokens.signals.items()}
    moved = replace(tokens, features=tokens.features[:, order], signals=signals)
    for a, b in zip(walk(method, tokens), walk(method, moved), strict=True):
        assert torch.equal(a.reduction.keep, b.reduction.keep)
        torch.testing.assert_close(dense(a.reduction), dense(b.reduction), atol=1e-6, rtol=0)


@every_method
def test_memory_layout_does_not_matter(name: str) -> None:
    method, tokens = build(name, 0.2), scene("slow", (8, 4, 4), 24)
    strided = torch.zeros(128, 48)[:, ::2].copy_(tokens.features)
    assert_same_walk(method, method, tokens, replace(tokens, features=strided))


@every_method
def test_needs_are_complete(name: str) -> None:
    # A method gets by with the signals it lists.
    method = build(name, 0.3)
    for step in walk(method, scene("random", (6, 3, 3))):
        listed = replace(step.seen, signals={key: step.seen.signal(key) for key in method.needs})
        assert same(ask(method, step.site, listed), step.reduction)


@pytest.mark.parametrize("name", ["hieravid", "text_aware_merge", "unified", "unified_pool"])
def test_merging_loses_nothing(name: str) -> None:
    # Where a token is merged, it is in one survivor, and a survivor is the plain mean of what is in it. Tokens of the
    # pool stay as they are; only HieraVid's later stages drop any.
    for kind in ("random", "slow", "copies", "all zero"):
        for step in walk(build(name, 0.3), scene(kind, (6, 4, 4))):
            if name == "hieravid" and step.site.is_inner:
                assert step.reduction.slot is None
                continue
            share = dense(step.reduction)
            assert (share > 0).sum(0).eq(1).all()
            size = (share > 0).sum(1, keepdim=True)
            torch.testing.assert_close(share, (share > 0) / size.double(), atol=1e-6, rtol=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@every_method
def test_every_device_decides_the_same(name: str) -> None:
    for grid in [(1, 4, 4), (12, 4, 5), (33, 3, 2)]:
        for ratio in (0.05, 0.2, 0.6, 0.97):
            for step in walk(build(name, ratio), scene("random", grid, 32)):
                seen, want = step.seen, step.reduction
                signals = {key: value.cuda() for key, value in seen.signals.items()}
                notes = {key: n.cuda() if isinstance(n, Tensor) else n for key, n in seen.notes.items()}
                index = None if seen.index is None else seen.index.cuda()
                there = replace(seen, features=seen.features.cuda(), signals=signals, notes=notes, index=index)
                got = ask(step.method, step.site, there)
                assert got.keep.is_cuda and torch.equal(got.keep.cpu(), want.keep)
                out = got.apply(there.features)
                assert out.is_cuda
                torch.testing.assert_close(out.cpu(), want.apply(seen.features), atol=1e-5, rtol=1e-5)


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
    with pytest.raises(RuntimeError, match=rf"First kept {9 + wrong} tokens of 18 at projector, not 9"):
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
    assert pipeline.name == "fastvid" and [*pipeline] == [pipeline.stages()[PROJECTOR]]
    assert pipeline.needs == FastVID.needs
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
    def refuse(tokens: Tensor, segments: object) -> Tensor:
        raise AssertionError("computed")

    monkeypatch.setattr(ops, "spectral_entropies", refuse)
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


# -- Unified, its outer half -------------------------------------------------------------------------------------------
def test_unified_pool_by_hand() -> None:
    # r P = 4 tokens, half of them clusters: two for the pool. Attention visits 2, then 0, which is at a right angle to
    # it: the pool is full, although only at 0.7 and beyond would 1 have been turned away.
    # Recycled: 1 and 3 to 7, at 2, 3, 4 and 10, 11, 13 on a line. k = 2: the mean squared distance to oneself and the
    # nearest other is 1/4 (d^2 / 2 / 2), of token 7 it is 1. Of equals the first is the densest: token 1, delta 11;
    # then 5, whose nearest denser one is 4: delta 6. All others have delta 1 or 2. Centres: 1 and 5.
    # Clusters: 2, 3, 4 and 10, 11, 13, with means 3 and 34/3.
    x = torch.tensor([[1.0, 0], [2, 0], [0, 1], [3, 0], [4, 0], [10, 0], [11, 0], [13, 0]])
    attention = torch.tensor([0.8, 0.7, 0.9, 0.1, 0.2, 0.3, 0.4, 0.5])
    method = UnifiedPool(retention_ratio=0.5, cluster_share=0.5, neighbours=2)
    reduction = method.decide(video(x, (1, 2, 4), attention), PROJECTOR)
    assert reduction.notes["pool"].tolist() == [2, 0] and reduction.notes["centres"].tolist() == [1, 5]
    assert reduction.keep.tolist() == [0, 1, 2, 5]
    want = torch.tensor([[1.0, 0], [3, 0], [0, 1], [34 / 3, 0]])
    torch.testing.assert_close(reduction.apply(x), want, atol=1e-5, rtol=0)
    # Were no equal the denser one, all five would stand at the largest distance, and the first two be centres.
    strict = replace(method, density_ties="strict").decide(video(x, (1, 2, 4), attention), PROJECTOR)
    assert strict.notes["centres"].tolist() == [1, 3]


def test_unified_pool_turns_away_what_it_has() -> None:
    # Cosines 0.6 and 0.8 to the first: at tau 0.7 the second of attention is turned away, the third taken; at 0.9 the
    # second is taken, at 0.5 neither.
    x = torch.tensor([[1.0, 0, 0], [0.8, 0.6, 0], [0.6, 0, 0.8], [0, 0, -1.0], [0, 0, -2.0], [0, 0, -3.0]])
    attention = torch.tensor([0.9, 0.8, 0.7, 0.3, 0.2, 0.1])
    pools = {
        tau: UnifiedPool(retention_ratio=0.5, cluster_share=1 / 3, tau=tau)
        .decide(video(x, (1, 1, 6), attention), PROJECTOR)
        .notes["pool"]
        .tolist()
        for tau in (0.5, 0.7, 0.9)
    }
    assert pools == {0.5: [0, 3], 0.7: [0, 2], 0.9: [0, 1]}


def test_unified_pool_visits_equal_attention_by_index() -> None:
    x = torch.eye(8)
    notes = UnifiedPool(retention_ratio=0.5).decide(video(x, (1, 2, 4), torch.ones(8)), PROJECTOR).notes
    assert notes["pool"].tolist() == [0, 1, 2]


def test_unified_pool_above_one_is_attention_alone() -> None:
    tokens = scene("copies", (8, 4, 4))
    for tau in (1.01, 5.0):
        method = UnifiedPool(retention_ratio=0.25, tau=tau)
        notes = method.decide(tokens, PROJECTOR).notes
        best = tokens.signal("saliency.received").topk(round(0.7 * method.budget(tokens.grid))).indices
        assert torch.equal(notes["pool"], best)


@pytest.mark.parametrize("tau", [0.0, 0.2, 0.5, 0.7, 0.9])
def test_unified_pool_is_unlike_itself(tau: float) -> None:
    tokens = scene("slow", (8, 4, 4))
    method = UnifiedPool(retention_ratio=0.3, tau=tau)
    reduction = method.decide(tokens, PROJECTOR)
    pool, attention = reduction.notes["pool"], tokens.signal("saliency.received")
    unit = torch.nn.functional.normalize(tokens.features.double(), dim=-1)
    likeness = unit[pool] @ unit[pool].T
    assert likeness[~torch.eye(len(pool), dtype=torch.bool)].max() < tau
    assert (attention[pool].diff() < 0).all()
    # Who was visited before the last and is not in it is like one that was visited earlier.
    for i in (attention > attention[pool[-1]]).nonzero().squeeze(1).tolist():
        assert i in pool or (unit[i] @ unit[pool[attention[pool] > attention[i]]].T).max() >= tau - 1e-9


def test_a_pool_that_cannot_fill_leaves_its_part_to_the_clusters() -> None:
    # A still video of five positions at right angles: 16 tokens, 11 for the pool, but five are all there is. The
    # other 11 are clusters, every position has some, and each is the mean of copies.
    x = torch.eye(5)[None].expand(4, -1, -1).flatten(0, 1)
    tokens = video(x, (4, 1, 5))
    reduction = UnifiedPool(retention_ratio=0.8).decide(tokens, PROJECTOR)
    pool, centres = reduction.notes["pool"], reduction.notes["centres"]
    assert (len(pool), len(centres)) == (5, 11) and sorted((pool % 5).tolist()) == [0, 1, 2, 3, 4]
    assert set((centres % 5).tolist()) == {0, 1, 2, 3, 4}
    torch.testing.assert_close(reduction.apply(x), x[reduction.keep], atol=1e-6, rtol=0)
    # One colour: one token in the pool, and all the rest of the budget clusters.
    colour = UnifiedPool(retention_ratio=0.5).decide(scene("one colour", (4, 2, 5)), PROJECTOR)
    assert len(colour.notes["pool"]) == 1 and len(colour.notes["centres"]) == 19
    # A black video: nothing is like anything, so that all fill the pool.
    black = UnifiedPool(retention_ratio=0.5).decide(scene("all zero", (4, 2, 5)), PROJECTOR)
    assert len(black.notes["pool"]) == 14


def test_a_long_video_is_clustered_in_windows() -> None:
    # As many clusters a window as its recycled tokens deserve, each window's those of its tokens alone.
    tokens = scene("slow", (11, 4, 5), 24)
    method = UnifiedPool(retention_ratio=0.3, exact_up_to=219, window_frames=4)
    whole, parts = replace(method, exact_up_to=220), method.decide(tokens, PROJECTOR)
    assert_lawful(parts, tokens, method.budget(tokens.grid))
    pool, centres = parts.notes["pool"], parts.notes["centres"]
    assert torch.equal(pool, whole.decide(tokens, PROJECTOR).notes["pool"])
    exact = replace(method, exact_up_to=None).decide(tokens, PROJECTOR).notes["centres"]
    assert torch.equal(whole.decide(tokens, PROJECTOR).notes["centres"], exact) and not torch.equal(centres, exact)
    recycled = torch.ones(220, dtype=torch.bool)
    recycled[pool] = False
    spans = [(0, 80), (80, 160), (160, 220)]
    counts = ops.fair_shares(method.budget(tokens.grid) - len(pool), [int(recycled[a:b].sum()) for a, b in spans])
    for (a, b), count in zip(spans, counts, strict=True):
        want = ops.density_clusters(tokens.features[a:b], count, method.neighbours, "index", recycled[a:b])
        mine = (parts.source >= a) & (parts.source < b)
        assert torch.equal(centres[(centres >= a) & (centres < b)], want.centre + a)
        order = parts.source[mine].argsort()
        assert torch.equal(parts.keep[parts.slot[mine]][order], want.joined + a)


def test_windows_are_no_more_than_clusters_and_may_be_empty() -> None:
    tokens = scene("slow", (11, 4, 5), 24)
    method = UnifiedPool(
        retention_ratio=0.1, cluster_share=0.15, exact_up_to=1, window_frames=1
    )  # 22 tokens, 3 clusters
    reduction = method.decide(tokens, PROJECTOR)
    assert_lawful(reduction, tokens, 22)
    assert (reduction.notes["centres"] // 80).tolist() == [0, 1, 2]
    # Attention falls: the first of three windows is in the pool, all of it, and one token of the second.
    method = UnifiedPool(retention_ratio=0.5, cluster_share=0.25, exact_up_to=1, window_frames=1)
    reduction = method.decide(video(torch.eye(24), (12, 1, 2), torch.arange(24.0).flip(0)), PROJECTOR)
    assert reduction.notes["pool"].tolist() == [*range(9)]
    assert [int(c) // 8 for c in reduction.notes["centres"]] == [1, 2, 2]


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_cluster_share(share: float) -> None:
    tokens = video(torch.eye(64), (4, 4, 4))
    reduction = UnifiedPool(retention_ratio=0.5, cluster_share=share).decide(tokens, PROJECTOR)
    centres = round(share * 32)
    assert len(reduction.notes["centres"]) == centres and len(reduction.notes["pool"]) == 32 - centres
    assert (reduction.slot is None) == (share == 0)  # without clusters nothing is merged, what is turned away is gone


def test_clusters_join_the_nearest_centre() -> None:
    tokens = scene("slow", (9, 4, 5), 24)
    x = tokens.features.double()
    for ties in ("index", "strict"):
        reduction = UnifiedPool(retention_ratio=0.2, density_ties=ties).decide(tokens, PROJECTOR)
        centres = reduction.notes["centres"]
        nearest = centres[
            torch.cdist(x[reduction.source], x[centres], compute_mode="donot_use_mm_for_euclid_dist").argmin(1)
        ]
        assert torch.equal(reduction.keep[reduction.slot], nearest)
        for centre in centres.tolist():
            members = x[reduction.source[nearest == centre]]
            out = reduction.apply(tokens.features)[reduction.keep == centre][0]
            torch.testing.assert_close(out.double(), members.mean(0), atol=1e-5, rtol=1e-5)


# -- Unified, its inner half -------------------------------------------------------------------------------------------
def inner(x: Tensor, attention: list[float], text: list[list[float]]) -> VideoTokens:
    signals = {"text_attention": torch.tensor(attention), "text_hidden": torch.tensor(text)}
    return VideoTokens(x, (1, 1, len(x)), torch.arange(len(x)), signals)


@pytest.mark.parametrize(
    ("weight", "keep", "want"),
    [
        # Attention alone: 0 and 3. 1 is at a right angle to 0 and almost parallel to 3; 2 is almost parallel to 0.
        (0.0, [0, 3], [[1.5, 0.1], [0.05, 2.0]]),
        # Likeness to the text alone, the better of two text tokens: 0, 1, .0995, .9994. So 1 and 3; 0 is like 3 (.033)
        # rather than 1 (0), and so is 2 (.133 against .0995).
        (1.0, [1, 3], [[0.0, 1.0], [3.1 / 3, 3.2 / 3]]),
        # Half each: attention scaled to 1, 0, 1/8, 7/8. 0 and 1 both have 1/2, 3 has .937: the lowest of the equals.
        (0.5, [0, 3], [[1.5, 0.1], [0.05, 2.0]]),
    ],
)
def test_text_aware_merge_by_hand(weight: float, keep: list[int], want: list[list[float]]) -> None:
    x = torch.tensor([[1.0, 0], [0, 1], [2, 0.2], [0.1, 3]])
    tokens = inner(x, [0.9, 0.1, 0.2, 0.8], [[0.0, 5], [-1, 0]])
    reduction = TextAwareMerge(text_weight=weight).decide(tokens, Site.decoder(18))
    assert reduction.keep.tolist() == keep
    torch.testing.assert_close(reduction.apply(x), torch.tensor(want), atol=1e-5, rtol=0)


def test_scores_that_are_all_equal_do_not_count() -> None:
    # One of the two scores is flat: the other decides alone, whatever the weight.
    x = torch.eye(6)
    flat = inner(x, [0.3] * 6, [[1.0, 5, 2, 4, 3, 0]])
    for weight in (0.1, 0.5, 1.0):
        assert TextAwareMerge(text_weight=weight).decide(flat, Site.decoder(18)).keep.tolist() == [1, 3, 4]
    # Both are: the first tokens stay, and those without likeness join the first of them.
    tokens = inner(x, [0.3] * 6, [[0.0] * 6])
    reduction = TextAwareMerge().decide(tokens, Site.decoder(18))
    assert reduction.keep.tolist() == [0, 1, 2]
    assert reduction.apply(x)[0].tolist() == pytest.approx([0.25, 0, 0, 0.25, 0.25, 0.25])


@pytest.mark.parametrize(("depth", "layer"), [(28, 18), (24, 15), (32, 21), (14, 9), (4, 3)])
def test_merging_layer_is_in_proportion(depth: int, layer: int) -> None:
    assert TextAwareMerge().sites(depth) == [Site.decoder(layer)]
    assert Unified().sites(depth) == [PROJECTOR, Site.decoder(layer)]
    assert TextAwareMerge(layer=2).sites(depth) == [Site.decoder(2)]


@pytest.mark.parametrize(
    ("ratio", "before", "want"), [(0.5, 627, 314), (0.5, 5, 2), (0.5, 7, 4), (0.01, 9, 1), (1.0, 9, 9)]
)
def test_text_aware_merge_rounds(ratio: float, before: int, want: int) -> None:
    method = TextAwareMerge(retention_ratio=ratio)
    assert method.count(Site.decoder(18), (32, 14, 14), 6272, before) == want


def test_unified_is_its_halves() -> None:
    tokens = scene("slow", (8, 4, 4), 24)
    common = {"tau": 0.6, "cluster_share": 0.4, "neighbours": 3, "density_ties": "strict"}
    whole = Unified(retention_ratio=0.3, keep_ratio=0.4, text_weight=0.7, layer=5, **common)
    pool = UnifiedPool(retention_ratio=0.3, **common)
    merge = TextAwareMerge(retention_ratio=0.4, text_weight=0.7, layer=5)
    pairs = list(zip(walk(whole, tokens), walk(Pipeline([pool, merge]), tokens), strict=True))
    assert [a.site for a, _ in pairs] == [b.site for _, b in pairs] == [PROJECTOR, Site.decoder(5)]
    assert all(same(a.reduction, b.reduction) for a, b in pairs)
    for grid in GRIDS:
        assert Pipeline.of(whole).counts(grid) == Pipeline([pool, merge]).counts(grid)
    assert whole.needs == pool.needs | merge.needs


# -- HieraVid ----------------------------------------------------------------------------------------------------------
def mean(values: list[float]) -> float:
    return sum(values) / len(values)


@pytest.mark.parametrize("ratio", [0.01, 0.05, 0.1, 0.13, 0.2, 0.25, 0.3, 0.5, 0.552, 0.6, 0.9, 1.0])
@pytest.mark.parametrize("q", [None, 0.1, 0.5, 1.0])
def test_hieravid_keeps_the_ratio_on_average(ratio: float, q: float | None) -> None:
    fractions = HieraVid(retention_ratio=ratio, q=q).fractions()
    assert mean(fractions) == pytest.approx(ratio) and len(fractions) == 4
    assert 1 >= fractions[0] >= fractions[1] >= fractions[2] >= fractions[3] > 0
    assert fractions[2] / fractions[1] == pytest.approx(fractions[1] / fractions[0])


@pytest.mark.parametrize(
    ("ratio", "q"),
    [(0.01, 0.23), (0.1, 0.23), (0.15, 0.2925), (0.2, 0.355), (0.25, 0.4825), (0.3, 0.61), (0.31, 0.61), (0.5, 0.61)],
)
def test_hieravid_interpolates_the_decay(ratio: float, q: float) -> None:
    fractions = HieraVid(retention_ratio=ratio).fractions()
    assert fractions[1] / fractions[0] == pytest.approx(q)


def test_hieravid_schedule_by_hand() -> None:
    # q = 1/2: x (1 + 1/2 + 1/4 + 1/8) / 4 = r, so that r = 15/32 is x = 1, and r = 15/64 is x = 1/2.
    assert HieraVid(retention_ratio=15 / 64, q=0.5).fractions() == pytest.approx([1 / 2, 1 / 4, 1 / 8, 1 / 16])
    assert HieraVid(retention_ratio=15 / 32, q=0.5).fractions() == pytest.approx([1, 1 / 2, 1 / 4, 1 / 8])
    # Beyond that all tokens stay at first, and q grows: 1 + .8 + .64 + .512 = 4 * .738.
    assert HieraVid(retention_ratio=0.738, q=0.5).fractions() == pytest.approx([1, 0.8, 0.64, 0.512])
    assert HieraVid(retention_ratio=1.0).fractions() == [1, 1, 1, 1]
    # A first fraction of one's own decides, and the ratio only gives q.
    assert HieraVid(retention_ratio=0.2, first=0.6).fractions() == pytest.approx([0.6, 0.213, 0.075615, 0.026843325])
    counts = Pipeline.of(HieraVid(retention_ratio=15 / 64, q=0.5)).counts((8, 5, 5))
    assert counts == {PROJECTOR: 100, Site.decoder(7): 50, Site.decoder(14): 25, Site.decoder(21): 12}


def test_hieravid_cannot_merge_the_first_frame() -> None:
    # 36 tokens a frame: two frames keep 36 of 72 at 10 %, later stages go on with their own shares.
    method = HieraVid(retention_ratio=0.1)
    x, q = 0.4 / (1 + 0.23 + 0.23**2 + 0.23**3), 0.23
    for t, first in {1: 36, 2: 36, 3: 36, 4: 44}.items():
        n = t * 36
        counts = list(Pipeline.of(method).counts((t, 6, 6)).values())
        assert counts == [first, *(max(1, math.floor(x * q**i * n)) for i in (1, 2, 3))]
        reduction = method.decide(scene("slow", (t, 6, 6)), PROJECTOR)
        assert len(reduction) == first
        if first == 36:
            assert reduction.keep.tolist() == list(range(36))
            segments = [(0, t)]
            assert reduction.notes["segments"] == segments  # every position of every frame is merged


@pytest.mark.parametrize(
    ("name", "x", "q", "counts"),
    [
        ("hieravid-30", 0.54, 0.61, [3386, 2065, 1260, 768]),
        ("hieravid-20", 0.545, 0.355, [3418, 1213, 430, 152]),
        ("hieravid-10", 0.335, 0.23, [2101, 483, 111, 25]),
    ],
)
def test_hieravid_presets(name: str, x: float, q: float, counts: list[int]) -> None:
    method = load(name)
    assert type(method) is HieraVid
    assert method.retention_ratio == pytest.approx(x * (1 + q + q**2 + q**3) / 4)  # near the ratio that it is called by
    assert method.retention_ratio == pytest.approx(int(name[-2:]) / 100, rel=0.1)
    assert method.fractions() == pytest.approx([x, x * q, x * q**2, x * q**3])
    assert list(Pipeline.of(method).counts((32, 14, 14)).values()) == counts
    with pytest.raises(ValueError, match=r"retention_ratio=0\.25 contradicts other settings, which fix it at"):
        load(method, retention_ratio=0.25)


def drifting() -> Tensor:
    """[4, 2, 2]: position 0 keeps its direction for three frames, position 1 in frames 1 and 2; then both turn."""
    return torch.tensor([[[1.0, 0], [1, 0]], [[2, 0], [0, 1]], [[3, 0], [0, 2]], [[0, 1], [-1, 0]]])


def test_hieravid_merges_runs_by_hand() -> None:
    # Three tokens go: the ones that have not turned. Position 0 of frames 1 and 2 joins frame 0, mean (2, 0); position
    # 1 of frame 2 joins frame 1, mean (0, 1.5). Overlaps 1/2, 1 and 0: frame 3 begins a segment.
    # Segments: means of (2, 0), (1, 0), (0, 1.5) and of (0, 1), (-1, 0), with cosine -.25 / sqrt(1.25 * .5) = -.31623.
    #   b_1 = .5 * -.31623 + .5 * (1 - 0) = .34189, b_2 = .5 * 0 + .5 * (1 + .31623) = .65811; z = -1 and 1.
    x = drifting()
    tokens = VideoTokens(x.flatten(0, 1), (4, 1, 2))
    reduction = HieraVid(first=5 / 8).decide(tokens, PROJECTOR)
    assert reduction.keep.tolist() == [0, 1, 3, 6, 7]
    want = torch.tensor([[2.0, 0], [1, 0], [0, 1.5], [0, 1], [-1, 0]])
    torch.testing.assert_close(reduction.apply(tokens.features), want, atol=1e-5, rtol=0)
    assert reduction.notes["segments"] == [(0, 3), (3, 4)]
    assert reduction.notes["b"].tolist() == pytest.approx([0.341886, 0.658114], abs=1e-5)
    assert reduction.notes["z"].tolist() == pytest.approx([-1, 1])
    novelty = HieraVid(first=5 / 8, lam=0.0).decide(tokens, PROJECTOR).notes["b"].tolist()
    stands_for = HieraVid(first=5 / 8, lam=1.0).decide(tokens, PROJECTOR).notes["b"].tolist()
    assert novelty == pytest.approx([1, 1.316228], abs=1e-5)
    assert stands_for == pytest.approx([-0.316228, 0], abs=1e-5)


@pytest.mark.parametrize(
    ("beta", "segments"),
    [
        (0.0, [(0, 4)]),
        (0.5, [(0, 3), (3, 4)]),  # an overlap of exactly beta is no boundary
        (0.51, [(0, 1), (1, 3), (3, 4)]),
        (1.0, [(0, 1), (1, 3), (3, 4)]),
    ],
)
def test_hieravid_segments(beta: float, segments: list[tuple[int, int]]) -> None:
    tokens = VideoTokens(drifting().flatten(0, 1), (4, 1, 2))
    reduction = HieraVid(first=5 / 8, beta=beta).decide(tokens, PROJECTOR)
    assert reduction.notes["segments"] == segments
    # Runs do not stop at a boundary: frame 1's position 0 is in frame 0's token all the same.
    assert reduction.keep.tolist() == [0, 1, 3, 6, 7]
    if len(segments) == 1:
        assert reduction.notes["z"].tolist() == [0]


def test_hieravid_segments_that_score_alike() -> None:
    # Two segments at a right angle but for rounding: both score 1/2, and a difference of 1e-9 is none.
    x = torch.tensor([[1.0, 0.0], [2e-9, 1.0]]).repeat_interleave(6, 0)
    notes = HieraVid(first=1.0).decide(VideoTokens(x, (2, 2, 3)), PROJECTOR).notes
    assert notes["segments"] == [(0, 1), (1, 2)] and notes["z"].tolist() == [0, 0]
    assert notes["b"].tolist() == pytest.approx([0.5, 0.5])
    assert HieraVid(first=1.0, eps=0.0).decide(VideoTokens(x, (2, 2, 3)), PROJECTOR).notes["z"].abs().tolist() == (
        pytest.approx([1, 1])
    )


def test_hieravid_marks_equals_by_index() -> None:
    # A still video: every token is as like the one before as any other; the earliest go first.
    x = randn(1, 6, 8).expand(5, -1, -1).flatten(0, 1)
    reduction = HieraVid(first=20 / 30).decide(VideoTokens(x, (5, 2, 3)), PROJECTOR)
    assert reduction.keep.tolist() == [*range(6), *range(16, 30)]
    assert reduction.notes["z"].eq(0).all() or len(reduction.notes["segments"]) > 1


def test_hieravid_notes_segments_even_if_nothing_is_merged() -> None:
    tokens = scene("slow", (6, 3, 3), 24)
    method = HieraVid(first=1.0, q=0.5, beta=0.4)
    steps = list(walk(method, tokens))
    assert steps[0].reduction.is_identity and steps[0].reduction.notes["segments"] == [(f, f + 1) for f in range(6)]
    assert [len(s.reduction) for s in steps] == [54, 27, 13, 6]
    assert sum(steps[2].reduction.notes["budgets"]) == 13 and sum(steps[2].reduction.notes["sizes"]) == 27


def staged(x: Tensor, index: list[int], grid: Grid, z: list[float], ends: list[int], last: Tensor) -> VideoTokens:
    """Tokens at one of HieraVid's later stages."""
    segments = list(zip([0, *ends[:-1]], ends, strict=True))
    notes = {"segments": segments, "z": torch.tensor(z, dtype=torch.float64)}
    return VideoTokens(x, grid, torch.tensor(index), {"last_text_hidden": last}, notes, math.prod(grid))


@pytest.mark.parametrize(
    ("r_var", "sizes", "z", "budgets"),
    [
        # Half of 20 stays: a_3 / a_2 = 1/2.
        (0.0, [10, 10], [-1.0, 1.0], [5, 5]),
        (0.1, [10, 10], [-1.0, 1.0], [4, 6]),
        (0.1, [15, 5], [-1.0, 1.0], [7, 3]),  # 6 and 3, times 10/9: 6.67 and 3.33
        (0.1, [20, 0], [-1.0, 1.0], [10, 0]),  # an emptied segment
        (1.0, [10, 10], [-1.0, 1.0], [1, 9]),  # shares 0 and 1: one token is left to a segment that has any
        (1.0, [14, 6], [-1.0, 1.0], [4, 6]),  # no more than there are
        (1.0, [10, 10], [0.1, 1.0], [4, 6]),  # shares .6 and 1, not 1.5: 3.75 and 6.25
        (0.1, [8, 8, 4], [-1.0, 0.0, 1.0], [3, 4, 3]),  # 3.2, 4, 2.4 times 10/9.6: 3.33, 4.17, 2.5
    ],
)
def test_hieravid_budgets_by_hand(r_var: float, sizes: list[int], z: list[float], budgets: list[int]) -> None:
    grid = (4, 1, 10)  # 40 tokens, so that the third stage keeps a quarter
    ends = {2: [2, 4], 3: [1, 2, 4]}[len(sizes)]
    starts = [0, *(10 * end for end in ends[:-1])]
    index = [start + i for start, size in zip(starts, sizes, strict=True) for i in range(size)]
    x = randn(20, 24)
    tokens = staged(x, index, grid, z, ends, randn(24, seed=3))
    method = HieraVid(first=1.0, q=0.5, r_var=r_var)
    reduction = method.decide(tokens, Site.decoder(14, 2))
    assert reduction.notes["sizes"] == sizes
    assert reduction.notes["budgets"] == budgets
    segment = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    assert segment[reduction.keep].bincount(minlength=len(sizes)).tolist() == budgets


def test_hieravid_has_fewer_tokens_than_segments() -> None:
    # Four segments, two tokens: no segment is sure of one.
    x = torch.eye(8)[:4] + 0.1
    tokens = staged(x, [0, 1, 2, 3], (4, 1, 1), [0.0] * 4, [1, 2, 3, 4], torch.ones(8))
    reduction = HieraVid(first=1.0, q=0.5**0.5, r_var=0.0).decide(tokens, Site.decoder(14, 2))
    assert reduction.notes["budgets"] == [1, 1, 0, 0] and reduction.keep.tolist() == [0, 1]


def test_hieravid_relevance_by_hand() -> None:
    # Dot products with the last instruction token: 1, -3, 2, 2, 0. Of the equals the lower index; order restored.
    x = torch.tensor([[1.0, 9], [-3, 0], [2, 5], [2, -5], [0, 7]])
    signals = {"last_text_hidden": torch.tensor([1.0, 0])}
    tokens = VideoTokens(x, (1, 1, 5), torch.arange(5), signals)
    for keep, want in {0.2: [2], 0.4: [2, 3], 0.6: [0, 2, 3], 0.8: [0, 2, 3, 4]}.items():
        method = HieraVid(first=1.0, q=keep)
        assert method.decide(tokens, Site.decoder(7, 1)).keep.tolist() == want


def test_hieravid_prefers_another_view_to_a_copy() -> None:
    # 0 and 1 are copies and the most relevant. Relevance alone takes both; the DPP one of them, and then 2, which is
    # less relevant but new. Logits 2, 2, 1.9 and 0, over the root of 2.
    x = torch.tensor([[2.0, 0], [2, 0], [0, 1.9], [0, 0]])
    tokens = staged(x, [0, 1, 2, 3], (4, 1, 1), [0.0], [4], torch.ones(2))
    assert HieraVid(first=1.0, q=0.5).decide(tokens, Site.decoder(7, 1)).keep.tolist() == [0, 1]
    assert HieraVid(first=1.0, q=0.5**0.5).decide(tokens, Site.decoder(14, 2)).keep.tolist() == [0, 2]


def test_hieravid_kernels() -> None:
    # Relevance is nearly equal, so that the dot product prefers the long tokens, and the cosine what is most relevant.
    x = torch.tensor([[0.0, 0, 9, 0], [0, 0, 0, 8], [1.01, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0], [-9, -9, 0, 0]])
    tokens = staged(x, list(range(6)), (6, 1, 1), [0.0], [6], torch.tensor([0.1, 0.1, 0, 0]))
    kept = {
        kernel: HieraVid(first=1.0, q=(2 / 6) ** 0.5 + 1e-9, kernel=kernel).decide(tokens, Site.decoder(14, 2)).keep
        for kernel in ("dot", "cosine")
    }
    assert kept["dot"].tolist() == [0, 1] and kept["cosine"].tolist() == [2, 3]


@pytest.mark.parametrize(
    ("depth", "layers"), [(28, [7, 14, 21]), (32, [8, 16, 24]), (24, [6, 12, 18]), (30, [7, 15, 22])]
)
def test_stages_are_quarters(depth: int, layers: list[int]) -> None:
    assert HieraVid().sites(depth) == [PROJECTOR, *map(Site.decoder, layers)]
    assert PyramidDrop().sites(depth) == [Site.decoder(layer) for layer in layers]
    assert [site.stage for site in HieraVid().sites(depth)] == [0, 1, 2, 3]


@pytest.mark.parametrize("ratio", [0.25, 0.3, 0.46875, 0.738, 0.99, 1.0])
def test_decay(ratio: float) -> None:
    q = decay_for(ratio)
    assert 0 <= q <= 1 and 1 + q + q**2 + q**3 == pytest.approx(4 * ratio)


# -- FastV and PyramidDrop ---------------------------------------------------------------------------------------------
def attended(*attention: float, entered: int | None = None, index: list[int] | None = None) -> VideoTokens:
    row = torch.tensor(attention)
    signals = {"last_query_attention": row, "last_query_attention.previous": row}
    places = torch.arange(len(row)) if index is None else torch.tensor(index)
    return VideoTokens(randn(len(row), 4), (1, 1, int(places[-1]) + 1), places, signals, entered=entered or len(row))


def test_fastv_by_hand() -> None:
    tokens = attended(0.1, 0.5, 0.2, 0.2, 0.05)
    assert FastV().decide(tokens, Site.decoder(2)).keep.tolist() == [1, 2]  # floor(2.5), the lower of two equals
    assert FastV(retention_ratio=0.6).decide(tokens, Site.decoder(2)).keep.tolist() == [1, 2, 3]
    assert FastV(retention_ratio=0.1).decide(tokens, Site.decoder(2)).keep.tolist() == [1]
    assert FastV().sites(28) == [Site.decoder(2)] and FastV(layer=3).sites(28) == [Site.decoder(3)]
    assert FastV().positions == "keep" and FastV().budget((32, 14, 14)) == 6272
    assert Pipeline.of(FastV()).counts((4, 12, 12)) == {Site.decoder(2): 288}


def test_which_layer_pays_the_attention() -> None:
    # FastV goes by the layer before, PyramidDrop by the layer's own projections.
    tokens = attended(0.1, 0.2, 0.3, 0.4)
    tokens = replace(tokens, signals=tokens.signals | {"last_query_attention.previous": torch.tensor([4.0, 3, 2, 1])})
    assert FastV().decide(tokens, Site.decoder(2)).keep.tolist() == [0, 1]
    assert PyramidDrop().decide(tokens, Site.decoder(7, 0)).keep.tolist() == [2, 3]


def test_fastv_needs_a_layer_before() -> None:
    with pytest.raises(ValueError, match="fastv: layer must be at least 1, got 0"):
        FastV(layer=0)
    with pytest.raises(ValueError, match=r"fastv acts at the input of layer 28; this decoder has 28 layers, 0 to 27"):
        Pipeline.of(FastV(layer=28)).stages(28)
    assert Pipeline.of(FastV(layer=27)).lengths((1, 2, 2)) == [4] * 27 + [2]


def test_pyramiddrop_by_hand() -> None:
    method = PyramidDrop()
    assert method.positions == "renumber"
    assert list(Pipeline.of(method).counts((1, 1, 12)).values()) == [6, 3, 1]  # of what entered: 6, 3, 1.5
    assert Pipeline.of(method).lengths((1, 1, 16)) == [16] * 7 + [8] * 7 + [4] * 7 + [2] * 7
    tokens = attended(0.3, 0.1, 0.3, 0.3, entered=6, index=[0, 2, 3, 5])
    assert method.decide(tokens, Site.decoder(14, 1)).keep.tolist() == [0]  # floor(6 / 4)
    assert method.decide(tokens, Site.decoder(7, 0)).keep.tolist() == [0, 2, 3]
    # Four of twelve are left, and half of those that entered would be more: nothing goes.
    assert method.decide(attended(0.3, 0.1, 0.3, 0.3, entered=12), Site.decoder(7, 0)).is_identity


@pytest.mark.parametrize("ratio", [0.25, 0.3, 0.46875, 0.7, 1.0])
def test_pyramiddrop_keeps_the_ratio_on_average(ratio: float) -> None:
    lengths = Pipeline.of(PyramidDrop(retention_ratio=ratio)).lengths((10, 100, 100))
    assert mean(lengths) / 100_000 == pytest.approx(ratio, abs=1e-4)


def test_pyramiddrop_at_layers_of_ones_own() -> None:
    method = PyramidDrop(layers=[3, 20], ratios=[0.5, 0.1])
    assert method.sites(24) == [Site.decoder(3), Site.decoder(20)] and [s.stage for s in method.sites(24)] == [0, 1]
    assert method.layers == (3, 20) and method.settings()["layers"] == [3, 20]
    assert Pipeline.of(method).lengths((1, 10, 10), 24) == [100] * 3 + [50] * 17 + [10] * 4
    only_layers = PyramidDrop(layers=[1, 2, 3])
    assert list(Pipeline.of(only_layers).counts((1, 1, 16))) == [Site.decoder(layer) for layer in (1, 2, 3)]


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"layers": [5, 2], "ratios": [0.5, 0.2]}, r"layers must be ascending, got \[5, 2\]"),
        ({"layers": [5, 5], "ratios": [0.5, 0.2]}, r"layers must be ascending, got \[5, 5\]"),
        ({"layers": [5, 9], "ratios": [0.2, 0.5]}, r"ratios are of the tokens that entered, .*got \[0\.2, 0\.5\]"),
        ({"layers": [5, 9]}, "2 layers need as many ratios, got 3"),
        ({"layers": [5, 9], "ratios": [0.5]}, "2 layers need as many ratios, got 1"),
        ({"ratios": [0.5, 0.2]}, "3 layers need as many ratios, got 2"),
        ({"ratios": [0.5, 0.2, 0.0]}, r"ratios must be in \(0, 1\], got 0\.0"),
        ({"ratios": [1.5, 0.2, 0.1]}, r"ratios must be in \(0, 1\], got 1\.5"),
        ({"layers": [-1, 2, 3]}, "layers must be at least 0, got -1"),
        ({"retention_ratio": 0.2}, r"retention_ratio must be in \[0\.25, 1\.?0?\], got 0\.2"),
    ],
)
def test_pyramiddrop_refuses(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=f"pyramiddrop: {says}"):
        PyramidDrop(**settings)
    with pytest.raises(ValueError, match=f"pyramiddrop: {says}"):
        load("pyramiddrop", **settings)


@pytest.mark.parametrize("layers", [7, "7", [], [7.5, 8, 9], [True, 8, 9], {"a": 1}, ["7", "8", "9"]])
def test_pyramiddrop_refuses_other_types(layers: Any) -> None:
    with pytest.raises(TypeError, match=r"pyramiddrop: layers must be (a list of int|of type int), got "):
        PyramidDrop(layers=layers)


def test_pyramiddrop_beyond_the_depth() -> None:
    method = PyramidDrop(layers=[8, 16, 24])
    with pytest.raises(ValueError, match=r"pyramiddrop acts at the input of layer 24; this decoder has 24 layers"):
        Pipeline.of(method).stages(24)
    assert len(Pipeline.of(method).stages(25)) == 3


# -- pipelines ---------------------------------------------------------------------------------------------------------
COMBINED = {
    "infomerge, text_aware_merge": [40, 20],  # 40 of 400 before the LLM; half of these at layer 18
    "fastvid, fastv": [40, 20],
    "unified_pool, pyramiddrop": [40, 20, 10, 5],
    "uniform_frames, text_aware_merge": [40, 20],
    "random, fastv, pyramiddrop": [40, 20, 20, 10, 5],
    "fastv, text_aware_merge": [200, 100],
    "unified, fastv": [40, 20, 10],
}


@pytest.mark.parametrize("names", COMBINED)
def test_any_outer_with_any_inner(names: str, tmp_path: Path) -> None:
    grid = (10, 5, 8)
    path = tmp_path / "mine.yaml"
    path.write_text("".join(f"- method: {name}\n" for name in names.split(", ")))
    pipeline = load(path)
    assert isinstance(pipeline, Pipeline) and pipeline.name == names.replace(", ", "+")
    assert list(pipeline.counts(grid).values()) == COMBINED[names]
    steps = list(walk(pipeline, scene("slow", grid, 24)))
    assert [len(s.reduction) for s in steps] == COMBINED[names]
    assert [s.site for s in steps] == list(pipeline.stages())
    for step in steps:
        assert_lawful(step.reduction, step.seen, len(step.reduction))
    alone = next(walk(load(names.split(", ")[0]), scene("slow", grid, 24)))
    assert same(steps[0].reduction, alone.reduction)  # the first does not see that others follow


@pytest.mark.parametrize(
    "outer", ["infomerge", "fastvid", "random", "uniform_frames", "uniform_tokens", "unified_pool"]
)
@pytest.mark.parametrize("within", ["text_aware_merge", "fastv", "pyramiddrop"])
def test_a_pipeline_counts_what_it_keeps(outer: str, within: str) -> None:
    for grid in [(1, 1, 1), (3, 1, 2), (6, 3, 3)]:
        pipeline = load([{"method": outer, "retention_ratio": 0.4}, within])
        steps = list(walk(pipeline, scene("random", grid)))
        assert [len(s.reduction) for s in steps] == list(pipeline.counts(grid).values())
        lengths = pipeline.lengths(grid)
        assert lengths[0] == len(steps[0].reduction) and lengths[-1] == len(steps[-1].reduction) and len(lengths) == 28
        assert lengths == sorted(lengths, reverse=True)


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (["unified_pool", "infomerge"], "unified_pool and infomerge both act at projector; one is allowed"),
        (["hieravid", "unified_pool"], "hieravid and unified_pool both act at projector"),
        (["unified", "text_aware_merge"], r"unified and text_aware_merge both act at decoder\[18\]"),
        (["hieravid", "pyramiddrop"], r"hieravid and pyramiddrop both act at decoder\[7\]"),
        (
            ["text_aware_merge", "infomerge"],
            r"infomerge acts at projector, before text_aware_merge at decoder\[18\]; list",
        ),
        (["text_aware_merge", "fastv"], r"fastv acts at decoder\[2\], before text_aware_merge at decoder\[18\]; list"),
    ],
)
def test_pipelines_that_are_refused(names: list[str], says: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("".join(f"- method: {name}\n" for name in names))
    for given in (names, path, str(path)):
        with pytest.raises(ValueError, match=says):
            load(given)


def test_methods_may_interleave() -> None:
    # Unified acts before FastV and after it.
    pipeline = load(["unified", "fastv"])
    assert [(m.name, site) for site, m in pipeline.stages().items()] == [
        ("unified", PROJECTOR),
        ("fastv", Site.decoder(2)),
        ("unified", Site.decoder(18)),
    ]


def test_a_pipeline_may_meet_at_one_depth_only() -> None:
    # 18 / 28 of the depth is layer 18, 16 or 15.
    pipeline = Pipeline([FastV(layer=16), TextAwareMerge()])
    assert len(pipeline.stages(28)) == 2
    with pytest.raises(ValueError, match=r"fastv and text_aware_merge both act at decoder\[16\]"):
        pipeline.stages(25)
    with pytest.raises(ValueError, match=r"text_aware_merge acts at decoder\[15\], before fastv at decoder\[16\]"):
        pipeline.stages(24)
