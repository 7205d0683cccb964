"""The Triton kernels against the definitions: on a GPU, or in Triton's interpreter, which conftest.py then turns on.

The interpreter runs a kernel's arithmetic, not its parallelism, and takes a millisecond for each operation on a tile:
sizes are small, a few tiles with ragged ends.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("triton")

import test_ops_density_peaks_tiled as peaks
import test_ops_dpp_map as dpp
import test_ops_nearest as anchors
import test_ops_retention_pool as pools
import test_ops_spectral_entropy as spectra
import torch
from neartie import assert_same_argmax, assert_same_choice
from test_ops import FINGERPRINTS, equal, examples, moved, poisoned_memory, rand, randn, slow
from torch import Tensor

from vidcompress import ops
from vidcompress.ops import dispatch
from vidcompress.ops.density_peaks import torch as fast_peaks

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
EXPONENTIALS = 3e-5 if DEVICE.type == "cuda" else 5e-6
"""Relative error of weights: a GPU's exponentials are good to 22 bits, and those of large logits to fewer."""

KERNELS = [op for op in ops.__all__ if importlib.util.find_spec(f"vidcompress.ops.{op}.kernel")]
every_kernel = pytest.mark.parametrize("op", KERNELS)


def implementation(op: str, kind: str = "kernel") -> Callable[..., Any]:
    """One of an op's; `torch` is the definition where that is fast enough."""
    if kind == "torch" and not importlib.util.find_spec(f"vidcompress.ops.{op}.torch"):
        kind = "naive"
    return getattr(importlib.import_module(f"vidcompress.ops.{op}.{kind}"), op)


def given(op: str) -> tuple[Any, ...]:
    """Arguments of an op."""
    arguments = examples()[op]
    if op == "density_peaks":
        return (*(a[:2] for a in arguments[:2]), *arguments[2:])
    return (*arguments[:3], (4, 9, 6)) if op == "dpp_map" else arguments


def parts(result: Any) -> tuple[Tensor, ...]:
    """What an op returns, triplets in the order of survivors and sources, which no implementation promises."""
    if not isinstance(result, tuple):
        return (result.cpu(),)
    result = tuple(x for x in result if isinstance(x, Tensor))
    if result[-1].is_floating_point():
        order = (result[0] * (1 + result[1].max()) + result[1]).argsort(stable=True)
        result = tuple(x[order] for x in result)
    return tuple(x.cpu() for x in result)


def same(a: Any, b: Any) -> bool:
    if isinstance(a, tuple):
        return all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, Tensor) else a == b


def there(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments on the device of the kernels."""

    def one(a: Any) -> Any:
        return tuple(map(one, a)) if isinstance(a, tuple) else a.to(DEVICE) if isinstance(a, Tensor) else a

    return tuple(map(one, arguments))


# -- which implementation runs -----------------------------------------------------------------------------------------
def test_the_device_chooses(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    monkeypatch.delenv("VIDCOMPRESS_OPS", raising=False)
    for op in KERNELS:
        assert dispatch.implementation(op, cpu) is implementation(op, "torch")
        assert dispatch.implementation(op, cuda) is implementation(op)
    assert dispatch.implementation("components", cuda) is implementation("components", "torch")
    monkeypatch.setenv("VIDCOMPRESS_OPS", "kernel")
    assert dispatch.implementation(KERNELS[0], cpu) is implementation(KERNELS[0])
    assert dispatch.implementation("components", cpu) is implementation("components", "torch")
    monkeypatch.setenv("VIDCOMPRESS_OPS", "torch")
    assert dispatch.implementation(KERNELS[0], cuda) is implementation(KERNELS[0], "torch")


def test_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_has_triton", lambda: False)
    monkeypatch.delenv("VIDCOMPRESS_OPS", raising=False)
    assert dispatch.implementation(KERNELS[0], torch.device("cuda")) is implementation(KERNELS[0], "torch")
    monkeypatch.setenv("VIDCOMPRESS_OPS", "kernel")
    with pytest.raises(ImportError, match=r"VIDCOMPRESS_OPS=kernel needs Triton.*vidcompress-transformers\[triton\]"):
        dispatch.implementation("merge", torch.device("cpu"))


# -- what all kernels promise ------------------------------------------------------------------------------------------
@every_kernel
def test_as_defined_twice_and_from_memory_that_holds_nan(op: str) -> None:
    run, arguments = implementation(op), there(given(op))
    with poisoned_memory():
        once, again = run(*arguments), run(*arguments)
    assert equal(once, again) and all(map(same, arguments, there(given(op))))
    want = implementation(op, "naive")(*given(op))
    for a, b in zip(parts(once), parts(want), strict=True):
        torch.testing.assert_close(a, b, atol=2e-6, rtol=2e-6)


@every_kernel
def test_memory_layout_does_not_matter(op: str) -> None:
    def strided(x: Tensor) -> Tensor:
        wide = torch.full((*x.shape[:-1], 2 * x.shape[-1]), torch.nan, device=x.device)
        wide[..., ::2] = x
        return wide[..., ::2] if x.dim() == 1 else wide[..., ::2].transpose(0, 1).contiguous().transpose(0, 1)

    def apart(x: Tensor) -> Tensor:
        return torch.cat([x, torch.full_like(x, torch.nan)], -1)[..., : x.shape[-1]]

    run, arguments = implementation(op), there(given(op))
    want = run(*arguments)
    for change in (strided, apart):
        got = run(*moved(arguments, change))
        for a, b in zip(parts(got), parts(want), strict=True):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)


# -- density_peaks -----------------------------------------------------------------------------------------------------
@pytest.fixture
def many(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels for many tokens run for few."""
    monkeypatch.setattr(fast_peaks, "TILED_ABOVE", 0)


def assert_same_peaks(x: Tensor, neighbours: int, ties: Any = "index", tolerance: float = 2e-6) -> None:
    tokens, candidates = peaks.one(x)
    got = implementation("density_peaks")(tokens.to(DEVICE), candidates.to(DEVICE), neighbours, ties)[0].cpu()
    want = implementation("density_peaks", "naive")(tokens, candidates, neighbours, ties)[0]
    torch.testing.assert_close(got, want, atol=tolerance, rtol=tolerance)
    true = peaks.true_scores(x, neighbours, ties).clamp_min(torch.finfo(torch.float32).min)
    for m in (1, len(x) // 10, len(x) // 3):
        mine, right, best = (ops.top_tokens(s[None], m)[0] for s in (got, want, true))
        assert torch.equal(mine, right) or assert_same_choice(mine, best, true, logarithmic=True)


@pytest.mark.parametrize(
    "case",
    [
        "random", "clustered", "copies", "many copies", "all equal", "still 0.001", "still + 100", "still, bfloat16",
        "still, float16", "still, float64", "whole numbers", "views",
    ],
)  # fmt: skip
def test_peaks_are_those_of_the_definition(case: str, many: None) -> None:
    assert_same_peaks(peaks.TOKENS[case]()[:141], 7)


def test_what_fp32_cannot_tell_is_left_to_another_search(many: None) -> None:
    from vidcompress.ops.density_peaks.kernel import row_scores

    # Of 22 tokens a cluster a list has room for 15, whose distances are far below the rounding of their lengths.
    hard = (randn(5, 32)[torch.arange(110) % 5] + 0.001 * randn(110, 32, seed=3)).to(DEVICE)
    easy, every = peaks.TOKENS["still 0.001"]()[:100].to(DEVICE), torch.ones(110, dtype=torch.bool, device=DEVICE)
    assert row_scores(hard, every, 7, "index") is None
    assert row_scores(easy, every[:100], 7, "index") is not None
    assert_same_peaks(hard.cpu(), 7)


def test_peaks_of_a_row_without_candidates(many: None) -> None:
    got = implementation("density_peaks")(*there((randn(1, 60, 8), torch.zeros(1, 60, dtype=torch.bool), 7)))
    assert got.eq(-torch.inf).all() and got.shape == (1, 60)


@pytest.mark.parametrize("case", ["random", "many copies", "all equal", "still, bfloat16"])
def test_clusters_are_those_of_the_definition(case: str, many: None) -> None:
    x = peaks.TOKENS[case]()[:141]
    candidates = rand(141, seed=9) > 0.2
    members = int(candidates.sum())
    some = (x, 12, 7, "index", candidates)
    for arguments in (some, (*some, members), (x, members, 7, "strict", candidates, members), (x, 1, 7)):
        with poisoned_memory():
            got = implementation("density_clusters")(*there(arguments))
        want = implementation("density_clusters", "naive")(*arguments)
        assert all(torch.equal(a.cpu(), b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize(
    "case",
    ["random", "clustered", "copies", "many copies", "all equal", "still 0.001", "still + 100", "still, bfloat16",
     "still, float16", "views"],
)  # fmt: skip
def test_peaks_of_frames_are_those_of_the_definition(case: str) -> None:
    # As in torch.py what is not close is fp32.
    assert_same_peaks(peaks.TOKENS[case]()[:141], 7, tolerance=2e-5)


def test_peaks_of_frames_in_chunks_with_noise_and_few_candidates(monkeypatch: pytest.MonkeyPatch) -> None:
    from vidcompress.ops.density_peaks import kernel_frames

    monkeypatch.setattr(kernel_frames, "CHUNK_FRAMES", 2)
    x = torch.stack([randn(40, 24), peaks.with_copies(randn(40, 24, seed=3)), randn(40, 24, seed=4)])
    candidates, noise = rand(3, 40, seed=1) < 0.8, 1e-4 * rand(3, 40, seed=5)
    candidates[1, 3:], candidates[2] = False, False
    for ties in ("index", "strict"):
        arguments = (x, candidates, 7, ties, noise)
        with poisoned_memory():
            got = implementation("density_peaks")(*there(arguments)).cpu()
        torch.testing.assert_close(got, implementation("density_peaks", "naive")(*arguments), atol=2e-6, rtol=2e-6)
    empty = implementation("density_peaks")(*there((x[:0], candidates[:0], 7)))
    assert empty.shape == (0, 40) and empty.dtype == torch.float32


@pytest.mark.parametrize(("dtype", "offset"), [(torch.bfloat16, 0), (torch.float16, 0), (torch.bfloat16, 5)])
def test_peaks_of_half_precision_tokens_near_the_origin_and_far_from_it(
    offset: float, dtype: torch.dtype, many: None
) -> None:
    from vidcompress.ops.density_peaks.kernel import Points

    x = (randn(150, 70) + offset).to(dtype)
    assert (Points(x, torch.arange(150)).middle() is None) == (offset == 0)
    assert_same_peaks(x, 4, "strict")


def test_peaks_with_many_neighbours_or_more_than_tokens(many: None) -> None:
    x = randn(50, 20)
    for neighbours in (1, 20, 30, 60):
        assert_same_peaks(x, neighbours)


def test_peaks_of_candidates_with_noise(many: None) -> None:
    x = torch.stack([randn(90, 32), peaks.with_copies(randn(90, 32, seed=3))])
    candidates, noise = rand(2, 90, seed=1) < 0.8, 1e-6 * rand(2, 90, seed=5)
    candidates[1, 5:] = False
    got = implementation("density_peaks")(*there((x, candidates, 7, "index", noise))).cpu()
    assert torch.equal(got.isfinite(), candidates)
    want = implementation("density_peaks", "naive")(x, candidates, 7, "index", noise)
    torch.testing.assert_close(got, want, atol=2e-6, rtol=2e-6)
    none = implementation("density_peaks")(*there((x[:0], candidates[:0], 7)))
    assert none.shape == (0, 90) and none.dtype == torch.float32


def test_lists_of_the_nearest_are_exact() -> None:
    from vidcompress.ops.density_peaks.kernel import Points

    x = randn(300, 40, seed=8).to(DEVICE)
    every = torch.arange(300, device=DEVICE)
    below = every.flip(0)
    points = Points(x, every, below)
    rows, columns = every[10:200:3], every[5:]
    with poisoned_memory():
        near = points.scan(rows, columns, points.middle(), 5)
    true = (x.double()[rows, None] - x.double()[columns]).square().sum(-1)
    true = true.masked_fill(columns >= below[rows, None], torch.inf)
    best = true.sort(1)
    torch.testing.assert_close(near.distance.double(), best.values[:, :5], atol=1e-4, rtol=0)
    assert torch.equal(near.point, columns[best.indices[:, :5]])
    assert (near.reach <= best.values[:, 5]).all()


@pytest.mark.parametrize(("channels", "dtype"), [(64, torch.float32), (896, torch.bfloat16)])
def test_rounding_stays_below_its_bound(channels: int, dtype: torch.dtype) -> None:
    # The search is exact as long as this holds.
    from vidcompress.ops.density_peaks.kernel import MOST_KEPT, Points

    x = torch.cat([randn(60, channels), randn(1, channels) + 1e-3 * randn(60, channels, seed=1)]).to(DEVICE, dtype)
    every = torch.arange(120, device=DEVICE)
    points = Points(x, every)
    for origin in (points.middle(), x[99].double()):
        near = points.scan(every, every, origin, MOST_KEPT)
        true = (x.double()[:, None] - x.double()[near.point]).square().sum(-1)
        assert ((near.distance - true).abs() <= 0.5 * points.noise(near.square[:, None], near.distance)).all()


# -- column_mean_attention ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("shape", [(1, 2, 150, 72), (2, 1, 130, 16), (1, 1, 1, 5), (1, 1, 20, 120)])
def test_received_attention_is_that_of_the_definition(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    query, key, scale = 3 * randn(*shape).to(dtype), randn(*shape, seed=1).to(dtype), shape[-1] ** -0.5
    got = implementation("column_mean_attention")(query.to(DEVICE), key.to(DEVICE), scale).cpu()
    want = implementation("column_mean_attention", "naive")(query, key, scale)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, want, atol=0, rtol=EXPONENTIALS)
    logits = query.double() @ key.double().transpose(-1, -2) * scale
    for mine, right, true in zip(got, want, logits.softmax(-1).mean((1, 2)), strict=True):
        for m in (len(true) // 10, len(true) // 2):
            chosen, best = ops.top_tokens(mine[None], m)[0], ops.top_tokens(right[None], m)[0]
            assert torch.equal(chosen, best) or assert_same_choice(
                chosen, ops.top_tokens(true[None], m)[0], true, tolerance=EXPONENTIALS
            )


def test_received_attention_of_heads_between_others_and_of_large_logits() -> None:
    # As a projection leaves them: [B, N, 3 * H * d], of which queries and keys are views.
    wide = randn(2, 40, 3, 3, 24).to(DEVICE)
    query, key = (wide[:, :, i].transpose(1, 2) for i in (0, 2))
    want = implementation("column_mean_attention", "naive")
    for scale in (0.2, 10.0):
        got = implementation("column_mean_attention")(query, key, scale)
        torch.testing.assert_close(got.cpu(), want(query.cpu(), key.cpu(), scale), atol=1e-7, rtol=1e-4)
    empty = implementation("column_mean_attention")(query[:0], key[:0], 1.0)
    assert empty.shape == (0, 40) and empty.dtype == torch.float32


# -- dpp_map -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("tokens", "relevance", "split", "kernel"),
    [
        ("random", "uniform", "one", "dot"),
        ("clusters 0.5", "peaked", "several", "cosine"),
        ("clusters 0.01", "equal", "several", "dot"),
        ("few channels", "some zero", "empty", "dot"),
        ("duplicates", "equal", "several", "cosine"),
        ("massive x 30000", "uniform", "several", "dot"),
        ("all equal", "equal", "several", "dot"),
        ("some zero", "uniform", "several", "dot"),
        ("bfloat16", "all zero", "several", "dot"),
        ("bfloat16", "uniform", "one", "dot"),
        ("float16", "uniform", "several", "cosine"),
    ],
)
def test_picks_are_those_of_the_definition(
    tokens: str, relevance: str, split: str, kernel: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vidcompress.ops.dpp_map import kernel as module

    monkeypatch.setattr(module, "PANEL", 16)
    h, own = dpp.TOKENS[tokens](), dpp.logs(dpp.RELEVANCE[relevance]())
    with poisoned_memory():
        got = module.dpp_map(*there((h, own)), *dpp.SPLITS[split], kernel=kernel)
    assert got.dtype == torch.long
    assert got.tolist() == dpp.defined(tokens, relevance, split, kernel)


def test_picks_go_on_over_launches_and_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    from vidcompress.ops.dpp_map import kernel as module

    h, own = dpp.clusters(130, 96, 0.5), dpp.logs(rand(130, seed=2))
    want = implementation("dpp_map", "naive")(h, own, [70, 60], [40, 7]).tolist()
    assert implementation("dpp_map")(*there((h, own)), [70, 60], [40, 7]).tolist() == want
    monkeypatch.setattr(module, "KERNEL_ELEMENTS", 1)
    monkeypatch.setattr(module, "PANEL", 8)
    assert implementation("dpp_map")(*there((h, own)), [70, 60], [40, 7]).tolist() == want
    assert implementation("dpp_map")(*there((h[:0], own[:0])), [], []).tolist() == []


# -- nearest, retention_pool, through_means, breaches, places ----------------------------------------------------------
@anchors.measures
@pytest.mark.parametrize("case", anchors.CASES)
def test_the_nearest_anchor_is_that_of_the_definition(case: str, measure: str) -> None:
    tokens, others = anchors.CASES[case]()
    got = implementation("nearest")(tokens.to(DEVICE), others.to(DEVICE), measure).cpu()
    want = implementation("nearest", "naive")(tokens, others, measure)
    if not torch.equal(got, want):  # sums of fp64 in another order
        assert_same_argmax(got, want, anchors.scores(tokens, others, measure), tolerance=1e-12)


def test_the_nearest_anchor_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    from vidcompress.ops.nearest import kernel

    monkeypatch.setattr(kernel, "CHUNK_ELEMENTS", 37 * 50)
    test_the_nearest_anchor_is_that_of_the_definition("still 0.000001", "euclidean")


@pytest.mark.parametrize("block", [70, 4096])
@pytest.mark.parametrize("threshold", [0.5, 0.95, 1.0])
@pytest.mark.parametrize("case", pools.TOKENS)
def test_the_pool_is_that_of_the_definition(
    case: str, threshold: float, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.import_module("vidcompress.ops.retention_pool.kernel"), "BLOCK_TOKENS", block)
    tokens = pools.TOKENS[case]()
    order = pools.shuffled(len(tokens))
    want = pools.NAIVE.retention_pool(tokens, order, threshold, len(tokens)).tolist()
    size = len(tokens) if block > 1000 else len(want) // 2 + 1  # a smaller pool is the beginning of a larger one
    with poisoned_memory():
        got = implementation("retention_pool")(tokens.to(DEVICE), order.to(DEVICE), threshold, size)
    assert got.tolist() == want[:size]


def test_a_pool_of_hard_questions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pools.FAST, "retention_pool", implementation("retention_pool"))
    pools.test_a_chain_takes_as_many_rounds_as_it_has_links()
    pools.test_fp32_does_not_decide_what_is_close("in one block", monkeypatch)


def with_means_case(segments: list[tuple[int, int]], seed: int) -> tuple[Any, ...]:
    """Triplets over 9 frames of 7 tokens, some of them replaced, the same pair several times among them."""
    replaced = rand(9, 7, seed=seed) > 0.6
    replaced[4] = False
    alone = (rand(63, seed=seed + 1) > 0.8).nonzero().squeeze(1)
    slot, source = ((rand(90, seed=seed + i) * n).long() for i, n in ((2, 12), (3, 63)))
    weight = torch.cat([torch.ones(len(alone)), rand(90, seed=seed + 4)])
    slot = torch.cat([12 + torch.arange(len(alone)), slot])
    return slot, torch.cat([alone, source]), weight, len(alone), replaced, segments, torch.tensor(5)


@pytest.mark.parametrize("segments", [[(0, 3), (3, 4), (4, 9)], [(0, 9)], [(f, f + 1) for f in range(9)]], ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_maps_through_means_are_those_of_the_definition(segments: list[tuple[int, int]], seed: int) -> None:
    case = with_means_case(segments, seed)
    none = (*(x[:0] for x in case[:3]), 0, *case[4:])
    still = (*case[:4], torch.zeros_like(case[4]), *case[5:])
    for given in (case, none, still, (*case[:4], torch.ones_like(case[4]), *case[5:])):
        with poisoned_memory():
            *got, answer = implementation("through_means")(*there(given))
        *want, _ = implementation("through_means", "naive")(*given)
        slot, source, weight = (x.cpu() for x in got)
        order = (slot * 63 + source).argsort()
        for a, b in zip((slot[order], source[order], weight[order]), want, strict=True):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)
        assert answer == 5 and (slot.diff() >= 0).all()
        *fast, _ = implementation("through_means", "torch")(*given)
        for a, b in zip(fast, want, strict=True):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)


def test_maps_through_means_do_what_the_means_would() -> None:
    slot, source, weight, alone, replaced, segments, ask = with_means_case([(0, 4), (4, 9)], 7)
    tokens = randn(9, 7, 5)
    seen = implementation("with_means")(tokens.to(DEVICE), replaced.to(DEVICE), segments).cpu().flatten(0, 1)
    mixed = torch.cat([slot[:alone][replaced.flatten()[source[:alone]]], slot[alone:]]).unique()
    want = torch.zeros(int(slot.max()) + 1, 5).index_add_(0, slot, weight[:, None] * seen[source])[mixed]
    to, token, share, _ = implementation("through_means")(
        *there((slot, source, weight)), alone, replaced.to(DEVICE), segments, ask.to(DEVICE)
    )
    rows = share.cpu()[:, None] * tokens.flatten(0, 1)[token.cpu()]
    got = torch.zeros(int(slot.max()) + 1, 5).index_add_(0, to.cpu(), rows)
    torch.testing.assert_close(got[mixed], want)
    assert to.cpu().unique().tolist() == mixed.tolist()


def test_an_unlawful_map_is_refused_and_not_followed() -> None:
    from vidcompress.tokens import Reduction

    replaced, slot = rand(4, 5) > 0.5, torch.tensor([0, 1])
    for source in ([3, 10**9], [-7, 3]):
        wrong = Reduction(torch.tensor([2, 4]), 20, slot, torch.tensor(source), torch.ones(2))
        triplets = there((slot, wrong.source, wrong.weight))
        to, *_, asked = implementation("through_means")(*triplets, 0, *there((replaced,)), [(0, 4)], torch.tensor(1))
        assert asked == 1 and set(to.tolist()) <= {source.index(3)}
        with pytest.raises(RuntimeError, match="unlawful reduction"):
            wrong.check()


BREACHES = {
    "none": ([0, 3, 5], [2, 0], [5, 0], [0.5, 1.0]),
    "an index beyond": ([0, 3, 6], [], [], []),
    "an index below": ([-1, 3, 5], [], [], []),
    "twice the same": ([0, 3, 3], [], [], []),
    "no slot": ([0, 3, 5], [3, -1], [0, 0], [1.0, 1.0]),
    "no source": ([0, 3, 5], [0, 0], [6, -1], [1.0, 1.0]),
    "no number": ([0, 3, 5], [0, 1, 2], [1, 2, 3], [float("nan"), float("inf"), 1.0]),
}


@pytest.mark.parametrize("case", BREACHES)
def test_breaches_are_counted(case: str) -> None:
    keep, slot, source, weight = (torch.tensor(x) for x in BREACHES[case])
    given = (keep, slot.long(), source.long(), weight.float(), 6)
    want = implementation("breaches", "naive")(*given)
    assert int(implementation("breaches")(*there(given))) == int(want) == {"none": 0}.get(case, int(want) or -1)


def test_breaches_of_many() -> None:
    keep = torch.arange(200_000)
    slot, weight = keep // 2, torch.ones(200_000)
    weight[[0, 70_000, 199_999]] = torch.nan
    given = there((keep, slot, keep.flip(0), weight))
    assert int(implementation("breaches")(*given, 200_000)) == 3
    # Half of the indices, half of the sources, and the one number of the three whose source is lawful.
    assert int(implementation("breaches")(*given, 100_000)) == 100_000 + 100_000 + 1


def test_marks_of_long_rows_and_of_none() -> None:
    marks = rand(3, 2500, seed=4) > 0.6
    marks[1] = False
    got = implementation("places")(marks.to(DEVICE), marks.sum(1).tolist())
    assert got.tolist() == marks.flatten().nonzero().squeeze(1).tolist()
    assert implementation("places")(marks[1:2].to(DEVICE), [0]).tolist() == []


# -- spectral_entropies ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("case", spectra.SPECTRA)
def test_entropies_are_those_of_the_definition(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spectra.determinants, "CHUNK_ELEMENTS", {DEVICE.type: 5 * 150**2})  # five places at a time
    tokens = spectra.SPECTRA[case]()
    with poisoned_memory():
        got = implementation("spectral_entropies")(tokens[:, None].to(DEVICE), [(0, len(tokens))]).cpu()
    want = implementation("spectral_entropy", "naive")(tokens)
    torch.testing.assert_close(got, want[None], atol=3e-6, rtol=0)


@pytest.mark.parametrize(("elements", "small"), [(32 << 20, 1024), (1, 0)])
@pytest.mark.parametrize("channels", [200, 24])
def test_entropies_of_all_segments(channels: int, elements: int, small: int, monkeypatch: pytest.MonkeyPatch) -> None:
    run = implementation("spectral_entropies")
    spectra.check_all_segments(lambda x, spans: run(x.to(DEVICE), spans), channels, elements, small, monkeypatch)


# -- cosine_fingerprint ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("case", FINGERPRINTS)
def test_fingerprints_are_those_of_the_definition(case: str) -> None:
    tokens = FINGERPRINTS[case]()[:, :12]
    got = implementation("cosine_fingerprint")(tokens.to(DEVICE)).cpu()
    want = implementation("cosine_fingerprint", "naive")(tokens)
    assert got.dtype == torch.float32 and got.shape == want.shape
    torch.testing.assert_close(got, want, atol=2e-7, rtol=1e-5)
    unit = torch.nn.functional.normalize(tokens.double(), dim=-1, eps=1e-30).transpose(0, 1)  # [P, L, C]
    true = (unit @ unit.transpose(1, 2)).diff(dim=1).abs().mean((1, 2))  # [P] fp64
    for count in (1, len(true) // 2):
        chosen = ops.top_tokens(-got[None], count)[0]
        assert_same_choice(chosen, ops.top_tokens(-true[None], count)[0], -true)


def test_fingerprints_of_what_hardly_moves() -> None:
    # The differences of cosines rounded to fp32 would be wrong in the second digit.
    tokens = slow(5, 8, 24, 0.001)
    got = implementation("cosine_fingerprint")(tokens.to(DEVICE)).cpu()
    torch.testing.assert_close(got, implementation("cosine_fingerprint", "naive")(tokens), atol=0, rtol=1e-4)


def test_fingerprints_of_many_channels_and_frozen_frames() -> None:
    x = randn(18, 4, 200)
    x[3:11, 1] = x[2, 1]
    x[:, 2] = x[0, 2]
    got = implementation("cosine_fingerprint")(x.to(DEVICE)).cpu()
    torch.testing.assert_close(got, implementation("cosine_fingerprint", "naive")(x), atol=2e-7, rtol=1e-5)
    assert got[2] == 0
    for tokens in (x[:1], x[:, :0]):
        assert torch.equal(implementation("cosine_fingerprint")(tokens.to(DEVICE)).cpu(), torch.zeros(tokens.shape[1]))


# -- select_in_turn -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("has_scores", [True, False], ids=["scores", "none"])
@pytest.mark.parametrize(("lengths", "positions"), [([3, 1, 2], 40), ([4], 33), ([1, 1], 1), ([2], 100), ([], 7)])
def test_selections_are_those_of_the_definition(lengths: list[int], positions: int, has_scores: bool) -> None:
    ends = torch.tensor(lengths).cumsum(0).tolist()
    segments = list(zip([0, *ends[:-1]], ends, strict=False))
    frames = sum(lengths)
    scores, again = rand(frames, positions, seed=1).double().round(decimals=1), (0.5, 0.05)
    scores.flatten()[::7] = torch.nan
    if not has_scores:  # negative ones, zeros of both signs, and what is out of the question
        scores, again = (scores.float() - 0.5).masked_fill_(scores > 0.7, -torch.inf), None
        scores[scores == 0.1] = -0.0
    static, counts = rand(len(lengths), positions) < 0.6, (rand(frames, seed=3) * (positions + 1)).long()
    arguments = (scores, again, segments, static, counts)
    with poisoned_memory():
        got = implementation("select_in_turn")(*there(arguments))
    assert equal(tuple(x.cpu() for x in got), implementation("select_in_turn", "naive")(*arguments))


# -- top_tokens --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("lowest", [False, True])
def test_top_tokens_are_those_of_the_definition(lowest: bool) -> None:
    scores, counts = rand(9, 37, seed=2).round(decimals=1), torch.tensor([0, 1, 5, 9, 17, 36, 37, 3, 40])
    scores[:, ::7], scores[3, 1::3], scores[4, 2::4], scores[5] = torch.nan, torch.inf, -torch.inf, -0.0
    for given in (scores, (scores * 10).nan_to_num(5, 1000, -1000).long()):
        got = implementation("top_tokens")(*there((given, counts)), lowest).cpu()
        assert torch.equal(got, implementation("top_tokens", "naive")(given, counts, lowest))


# -- on a GPU, at the sizes of real videos -----------------------------------------------------------------------------
def gpu(test: Callable[..., None]) -> Callable[..., None]:
    """Marks a test that needs a GPU."""
    return pytest.mark.gpu(pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a CUDA device")(test))


def drawn(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Normal numbers on the GPU."""
    return torch.randn(*shape, device=DEVICE, dtype=dtype, generator=torch.Generator(DEVICE).manual_seed(0))


@gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", ["random", "clustered"])
def test_peaks_at_size(kind: str, dtype: torch.dtype) -> None:
    x = drawn(20000, 896, dtype=dtype)
    if kind == "clustered":
        x = x[torch.arange(20000, device=DEVICE) % 300] + 0.5 * x
    every = torch.ones(1, 20000, dtype=torch.bool, device=DEVICE)
    got, want = (implementation("density_peaks", k)(x[None], every, 7)[0].cpu() for k in ("kernel", "torch"))
    torch.testing.assert_close(got, want, atol=2e-6, rtol=2e-6)
    mine, right = (ops.top_tokens(scores[None], 400)[0] for scores in (got, want))
    assert_same_choice(mine, right, want.double(), logarithmic=True)


@gpu
def test_rounding_at_size() -> None:
    from vidcompress.ops.density_peaks.kernel import Points

    for channels, dtype in ((3584, torch.bfloat16), (3584, torch.float32), (8192, torch.float16)):
        x = 1 + drawn(512, channels, dtype=dtype)
        every = torch.arange(512, device=DEVICE)
        points = Points(x, every)
        for origin in (None, x[0].double()) if dtype != torch.float32 else (x[0].double(), points.middle()):
            near = points.scan(every, every, origin, 15)
            true = (x.double()[:, None] - x.double()[near.point]).square().sum(-1)
            assert ((near.distance - true).abs() <= 0.5 * points.noise(near.square[:, None], near.distance)).all()


@gpu
def test_received_attention_at_size() -> None:
    query, key = drawn(32, 16, 729, 72), drawn(32, 16, 729, 72).flip(0)
    got, want = (implementation("column_mean_attention", k)(query, key, 72**-0.5) for k in ("kernel", "torch"))
    torch.testing.assert_close(got, want, atol=0, rtol=EXPONENTIALS)


@gpu
def test_picks_at_size() -> None:
    h, own = drawn(4 * 1568, 3584), drawn(4 * 1568, dtype=torch.float32)
    for count in (31, 470):
        arguments = (h, own, [1568] * 4, [count] * 4)
        got, want = (implementation("dpp_map", k)(*arguments) for k in ("kernel", "torch"))
        assert torch.equal(got, want)


@gpu
def test_fingerprints_at_size() -> None:
    x = drawn(32, 196, 3584)
    x[8:] = x[:1] + 0.01 * x[8:]
    want = implementation("cosine_fingerprint", "naive")(x.cpu())
    torch.testing.assert_close(implementation("cosine_fingerprint")(x).cpu(), want, atol=2e-7, rtol=1e-5)


@gpu
def test_peaks_of_frames_at_size() -> None:
    x = drawn(32, 196, 3584)
    x[8:, :50] = x[:1, :50] + 0.01 * x[8:, :50]
    every = torch.ones(32, 196, dtype=torch.bool, device=DEVICE)
    got, want = (implementation("density_peaks", k)(x, every, 4).cpu() for k in ("kernel", "torch"))
    torch.testing.assert_close(got, want, atol=2e-5, rtol=2e-5)
    for mine, right in zip(ops.top_tokens(got, 30), ops.top_tokens(want, 30), strict=True):
        assert (mine != right).sum() <= 2  # near-ties of fp32


@gpu
def test_merging_at_size() -> None:
    x, draw = drawn(32, 196, 3584), torch.Generator(DEVICE).manual_seed(1)
    score = torch.rand(32, 196, device=DEVICE, generator=draw)
    salient, anchors = ops.top_tokens(score, 12), torch.zeros(32, 196, dtype=torch.bool, device=DEVICE)
    anchors[3::4] = ops.top_tokens(-score[3::4], 30)
    counts, reach = [30 * (f % 4 == 3) for f in range(32)], [(f // 8 * 8, f // 8 * 8 + 8) for f in range(32)]
    arguments = (x, ~salient, anchors, counts, reach, 0.6)
    got, want = (parts(implementation("anchor_merge", k)(*arguments)) for k in ("kernel", "torch"))
    # A token joins one anchor of every frame that has some: hardly any is as near to two.
    first, other = (anchor[(source * 32 + anchor // 196).argsort(stable=True)] for anchor, source, _ in (got, want))
    assert (first != other).float().mean() < 1e-3
    keep = torch.cat([salient.flatten().nonzero(), anchors.flatten().nonzero()]).squeeze(1).unique()
    slot = torch.searchsorted(keep, want[0].to(DEVICE))
    merged = (keep, slot, want[1].to(DEVICE), want[2].to(DEVICE))
    a, b = (implementation("merge", k)(x.flatten(0, 1), *merged) for k in ("kernel", "torch"))
    torch.testing.assert_close(a, b, atol=1e-2, rtol=1e-2)


@gpu
def test_selections_at_size() -> None:
    scores, segments = drawn(512, 729, dtype=torch.float64), [(0, 128), (128, 136), (136, 512)]
    static, counts = torch.rand(3, 729, device=DEVICE) < 0.1, torch.arange(512) % 700
    got = implementation("select_in_turn")(scores, (1.0, 1.0), segments, static, counts)
    want = implementation("select_in_turn", "torch")(scores, (1.0, 1.0), segments, static, counts)
    assert equal(got, want)


@gpu
def test_beyond_two_to_the_31_elements() -> None:
    x = drawn(620_000, 3584)
    assert x.numel() > 2**31
    last = torch.arange(620_000, device=DEVICE) >= 617_000
    got = implementation("density_peaks")(x[None], last[None], 7)[:, last]
    assert torch.equal(got, implementation("density_peaks")(x[None, last], last[None, last], 7))
    frames = x.view(31, 20_000, 3584)
    assert torch.equal(ops.cosine_fingerprint(frames)[-9:], ops.cosine_fingerprint(frames[:, -9:]))
    heads = x.flatten()[: 2600 * 16 * 729 * 72].view(2600, 16, 729, 72)
    assert heads.numel() > 2**31
    got = implementation("column_mean_attention")(heads, heads, 0.1)[-2:]
    assert torch.equal(got, implementation("column_mean_attention")(heads[-2:], heads[-2:], 0.1))


@gpu
@pytest.mark.parametrize("op", ["column_mean_attention", "cosine_fingerprint", "density_peaks", "dpp_map", "merge"])
def test_the_host_does_not_wait(op: str) -> None:
    arguments = there(given(op))
    implementation(op)(*arguments)
    torch.cuda.set_sync_debug_mode("error")
    try:
        implementation(op)(*arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")
