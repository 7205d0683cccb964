"""What every method promises, over `list_methods()`; the floors; and pipelines of several."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from reductions import dense, same
from scenes import (
    GRIDS,
    PROJECTOR,
    RATIOS,
    SCENES,
    WHOLE,
    ask,
    assert_lawful,
    assert_same_walk,
    build,
    count,
    keeping_all,
    rand,
    randn,
    scene,
    video,
    walk,
)
from torch import Tensor

from vidcompress.config import load
from vidcompress.method import Method, Pipeline, floor, list_methods, setting
from vidcompress.methods.fastv import FastV
from vidcompress.methods.fastvid import FastVID
from vidcompress.methods.random import Random
from vidcompress.methods.text_aware_merge import TextAwareMerge
from vidcompress.methods.uniform_frames import UniformFrames
from vidcompress.methods.uniform_tokens import UniformTokens
from vidcompress.tokens import Grid, Reduction, Site, VideoTokens

NAMES = sorted(list_methods())

every_method = pytest.mark.parametrize("name", NAMES)
every_grid = pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: "x".join(map(str, grid)))


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
