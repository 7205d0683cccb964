"""Greedy MAP against its definition, and both against column-pivoted QR, which needs no determinant."""

from __future__ import annotations

import functools
import importlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vidcompress import ops

NAIVE, FAST = (importlib.import_module(f"vidcompress.ops.dpp_map.{kind}") for kind in ("naive", "torch"))
both = pytest.mark.parametrize("run", [NAIVE.dpp_map, FAST.dpp_map], ids=["naive", "torch"])
kernels = pytest.mark.parametrize("kernel", ["dot", "cosine"])

WAYS: dict[str, dict[str, Any]] = {
    "together": {"LONGEST": {"cpu": 10**6}},
    "one after the other": {"LONGEST": {"cpu": 10**6}, "KERNEL_ELEMENTS": 1},
    "lazily": {"LONGEST": {"cpu": 0}},
    "lazily, few candidates": {"LONGEST": {"cpu": 0}, "CANDIDATES": (2, 5)},
    "mixed": {"LONGEST": {"cpu": 30}},
}


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The fast implementation has several ways, chosen by size."""
    for name, value in WAYS[request.param].items():
        monkeypatch.setattr(FAST, name, value)
    return request.param


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def logs(relevance: Tensor) -> Tensor:
    return relevance.double().log()


def clusters(n: int, channels: int, spread: float) -> Tensor:
    """Seven centres far from the origin and tokens `spread` away from them."""
    own = (rand(n, seed=8) * 7).long()
    return randn(7, channels, seed=7)[own] + 0.7 * randn(channels, seed=6) + spread * randn(n, channels, seed=9)


def massive(factor: float) -> Tensor:
    """Three channels `factor` times the others, alike in all tokens."""
    x = clusters(90, 64, 0.4)
    x[:, [3, 17, 40]] = factor * (1 + 0.05 * randn(90, 3, seed=4))
    return x


def duplicates() -> Tensor:
    x = clusters(90, 32, 0.4)
    x[5::6] = x[0]
    x[7::9] = x[8]
    return x


def some_zero() -> Tensor:
    x = clusters(90, 32, 0.4)
    x[::4] = 0
    return x


TOKENS = {
    "random": lambda: randn(90, 64),
    "few channels": lambda: randn(90, 7),
    "one channel": lambda: randn(90, 1),
    "clusters 0.5": lambda: clusters(90, 64, 0.5),
    "clusters 0.01": lambda: clusters(90, 64, 0.01),
    "low rank": lambda: randn(90, 6) @ randn(6, 64, seed=1),
    "massive x 30": lambda: massive(30),
    "massive x 1000": lambda: massive(1000),
    "massive x 30000": lambda: massive(30000),
    "duplicates": duplicates,
    "all equal": lambda: randn(1, 16).expand(90, 16),
    "all zero": lambda: torch.zeros(90, 8),
    "orthogonal": lambda: torch.eye(90),
    "some zero": some_zero,
    "x 0.001": lambda: clusters(90, 64, 0.5) * 1e-3,
    "x 1000": lambda: clusters(90, 64, 0.5) * 1e3,
    "float64": lambda: clusters(90, 64, 0.5).double(),
    "bfloat16": lambda: clusters(90, 64, 0.5).bfloat16(),
    "float16": lambda: clusters(90, 64, 0.5).half(),
}
RELEVANCE = {
    "uniform": lambda: rand(90, seed=2),
    "equal": lambda: torch.ones(90),
    "peaked": lambda: rand(90, seed=2) ** 12,
    "some zero": lambda: rand(90, seed=2).sub(0.4).clamp_min(0),
    "all zero": lambda: torch.zeros(90),
}
SPLITS = {
    "one": ([90], [40]),
    "all of one": ([90], [90]),
    "several": ([25, 1, 50, 14], [9, 1, 22, 0]),
    "empty": ([0, 60, 0, 30], [0, 3, 0, 30]),
}


@functools.cache
def defined(tokens: str, relevance: str, split: str, kernel: Any) -> list[int]:
    return NAIVE.dpp_map(TOKENS[tokens](), logs(RELEVANCE[relevance]()), *SPLITS[split], kernel=kernel).tolist()


@kernels
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("relevance", RELEVANCE)
@pytest.mark.parametrize("tokens", TOKENS)
def test_picks_equal_definition(tokens: str, relevance: str, split: str, kernel: str, way: str) -> None:
    got = FAST.dpp_map(TOKENS[tokens](), logs(RELEVANCE[relevance]()), *SPLITS[split], kernel=kernel)
    assert got.dtype == torch.long
    assert got.tolist() == defined(tokens, relevance, split, kernel)


def pivoted_qr(columns: Tensor, count: int) -> list[int]:
    """Pivots of the first `count` steps of QR with column pivoting, fp64: always the column with most length left."""
    left = columns.double().clone()
    pivots: list[int] = []
    for _ in range(count):
        length = left.norm(dim=0)
        length[pivots] = -1
        pivots.append(int(length.argmax()))
        direction = left[:, pivots[-1]] / length[pivots[-1]]
        for _ in range(2):  # once more for what rounding left
            left -= direction[:, None] * (direction @ left)
    return pivots


@kernels
@pytest.mark.parametrize("relevance", ["uniform", "peaked"])
@pytest.mark.parametrize(
    "tokens", ["random", "clusters 0.5", "clusters 0.01", "massive x 30", "massive x 1000", "bfloat16"]
)
def test_greedy_map_is_pivoted_qr(tokens: str, relevance: str, kernel: str, way: str) -> None:
    # The volume of a set is the product of what each pick adds, and that is the length its column has left.
    h, own = TOKENS[tokens](), RELEVANCE[relevance]()
    unit = torch.nn.functional.normalize(h.double(), dim=-1) if kernel == "cosine" else h.double()
    want = pivoted_qr((own.double()[:, None] * unit).T, 60)
    assert FAST.dpp_map(h, logs(own), [90], [60], rank_eps=1e-12, kernel=kernel).tolist() == want
    assert NAIVE.dpp_map(h, logs(own), [90], [60], rank_eps=1e-12, kernel=kernel).tolist() == want


@pytest.mark.parametrize("count", [31, 156])
def test_a_long_segment_is_pivoted_qr(count: int) -> None:
    h, own = clusters(1000, 256, 0.5), rand(1000, seed=2)
    assert len(h) > FAST.LONGEST["cpu"]
    want = pivoted_qr((own.double()[:, None] * h.double()).T, count)
    assert FAST.dpp_map(h, logs(own), [1000], [count]).tolist() == want


@both
def test_picks_by_hand(run: Any, way: str) -> None:
    # Lengths 3, 2.9 and 1; the second lies along the first, the third is orthogonal to it.
    h = torch.tensor([[3.0, 0, 0], [2.9, 0.5, 0], [0, 1, 0], [0, 0, 0.2]])
    one = torch.ones(4)
    # After 0, what is left is 0.5 of the second, all of the third and of the fourth. After 2 nothing of 1 is left.
    assert run(h, logs(one), [4], [3]).tolist() == [0, 2, 3]
    assert run(h, logs(one), [4], [2]).tolist() == [0, 2]
    # Cosine: all lengths are 1, and all tie; then 2 and 3 tie.
    assert run(h, logs(one), [4], [4], kernel="cosine").tolist() == [0, 2, 3, 1]
    # Relevance 0.2 makes the third 0.2 long, as long as the fourth and shorter than what is left of the second.
    assert run(h, torch.tensor([1, 1, 0.2, 1]), [4], [3]).tolist() == [0, 1, 3]


@both
def test_segments_do_not_see_each_other(run: Any, way: str) -> None:
    h, own = clusters(90, 32, 0.4), rand(90, seed=2)
    sizes, counts = [30, 5, 55], [12, 5, 20]
    alone = [
        start + run(h[start : start + size], logs(own[start : start + size]), [size], [count])
        for start, size, count in zip([0, 30, 35], sizes, counts, strict=True)
    ]
    assert run(h, logs(own), sizes, counts).tolist() == torch.cat(alone).tolist()
    assert run(h[:0], own[:0], [], []).tolist() == run(h[:0], own[:0], [0, 0], [0, 0]).tolist() == []


@both
def test_relevance_beyond_the_range_of_floats(run: Any, way: str) -> None:
    # e^-2000 is 0 in fp64, and its logarithm is not: what is left is ranked by relevance, then filled by it.
    h = torch.tensor([[1.0, 0, 0], [0, 1, 0], [1, 1, 0], [0, 0, 1], [0, 0, 2]])
    own = torch.tensor([-2000.0, -900, 0, -3000, -3001])
    assert run(h, own, [5], [5]).tolist() == [2, 1, 3, 0, 4]


@both
def test_what_is_exhausted_is_filled_by_relevance(run: Any, way: str) -> None:
    # Two directions. After the two longest nothing adds anything, and the rest comes by relevance, ties by index.
    h = torch.tensor([[1.0, 0], [5, 0], [0, 4], [2, 2], [0, 1], [1, 1]])
    own = torch.tensor([0.9, 1, 1, 0.3, 0.5, 0.9])
    assert run(h, logs(own), [6], [6]).tolist() == [1, 2, 0, 5, 4, 3]
    # Nothing is relevant at all: the lowest indices.
    assert run(h, torch.zeros(6).log(), [6], [3]).tolist() == [0, 1, 2]


@both
def test_the_irrelevant_is_not_exhausted(run: Any, way: str) -> None:
    # Token 3 adds 1e-12 of what token 0 did, but nothing of it is spanned. Token 2 adds nothing; it is more relevant.
    h, own = torch.eye(3)[[0, 1, 0, 2]], torch.tensor([1, 0.9, 0.8, 1e-6])
    assert run(h, logs(own), [4], [3]).tolist() == [0, 1, 3]


@both
@pytest.mark.parametrize(("eps", "want"), [(1e-4, [0, 2, 1]), (1e-6, [0, 1, 2])])
def test_exhausted_means_relative_to_itself(run: Any, eps: float, want: list[int], way: str) -> None:
    # Of token 1's 1e4 the first pick leaves 1: 1e-4 of it, but more than token 2 has altogether.
    h = torch.tensor([[200.0, 0, 0], [100, 1, 0], [0, 0, 0.5]])
    assert run(h, torch.zeros(3), [3], [3], rank_eps=eps).tolist() == want


@both
@kernels
def test_ties_go_to_the_lowest_index(run: Any, kernel: str, way: str) -> None:
    once = clusters(20, 33, 0.5)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(5)) % 20
    own = rand(20, seed=2)[order]
    got = run(once[order], logs(own), [60], [20], kernel=kernel).tolist()
    first = {int(token): i for i, token in reversed(list(enumerate(order.tolist())))}
    assert sorted(got) == sorted(first.values())


@both
def test_all_tied(run: Any, way: str) -> None:
    assert run(torch.eye(40) * 3, torch.zeros(40), [40], [25]).tolist() == list(range(25))
    assert run(torch.ones(40, 3), torch.zeros(40), [40], [25]).tolist() == list(range(25))


@settings(deadline=None, derandomize=True, max_examples=150)
@given(
    st.lists(st.tuples(st.integers(0, 12), st.floats(0, 1)), max_size=5),
    st.integers(1, 8),
    st.sampled_from(["dot", "cosine"]),
)
def test_what_is_promised(segments: list[tuple[int, float]], channels: int, kernel: Any) -> None:
    sizes = [size for size, _ in segments]
    counts = [int(size * share) for size, share in segments]
    n = sum(sizes)
    h, own = randn(n, channels, seed=n).round(decimals=1), rand(n, seed=n).round(decimals=1)
    got = ops.dpp_map(h, logs(own), sizes, counts, kernel=kernel)
    assert got.dtype == torch.long and len(got) == sum(counts) == len(set(got.tolist()))
    start = 0
    for size, count, picks in zip(sizes, counts, got.split(counts) if counts else (), strict=True):
        assert all(start <= i < start + size for i in picks.tolist()) and len(picks) == count
        start += size
    assert got.tolist() == NAIVE.dpp_map(h, logs(own), sizes, counts, kernel=kernel).tolist()


class Made(TorchDispatchMode):
    """The most elements of any tensor that is made while it is on, and of any in fp64."""

    elements = fp64 = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor):
                self.elements = max(self.elements, x.numel())
                self.fp64 = max(self.fp64, x.numel() if x.dtype == torch.float64 else 0)
        return out


def test_a_long_segment_needs_no_kernel() -> None:
    n, channels = 6000, 32
    with Made() as made:
        FAST.dpp_map(clusters(n, channels, 0.5).bfloat16(), logs(rand(n, seed=2)), [n], [25])
    assert made.elements <= n * channels  # the tokens in fp32
    assert made.fp64 <= max(n, FAST.CANDIDATES[1] * channels, FAST.CANDIDATES[1] ** 2)  # which fp64 sees a few of


def test_fp32_is_left_where_it_cannot_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FAST, "LONGEST", {"cpu": 0})
    used: list[torch.dtype] = []
    measure = FAST._Segment.measure

    def recorded(self: Any, dtype: torch.dtype) -> None:
        used.append(dtype)
        measure(self, dtype)

    monkeypatch.setattr(FAST._Segment, "measure", recorded)
    for tokens, want in (("random", 1), ("massive x 30", 1), ("massive x 30000", 2), ("low rank", 2)):
        used.clear()
        FAST.dpp_map(TOKENS[tokens](), logs(rand(90, seed=2)), [90], [40])
        assert used == [torch.float32, torch.float64][:want], tokens


GOLDEN = Path(os.environ.get("GOLDEN", Path(__file__).parent / "golden")) / "hieravid.safetensors"


@pytest.mark.skipif(not GOLDEN.exists(), reason="no recorded runs of HieraVid in this folder")
@pytest.mark.parametrize("stage", ["stage3", "stage4"])
def test_recorded_picks(stage: str, way: str) -> None:
    with safe_open(GOLDEN, "pt") as file:
        cases = list(json.loads(file.metadata()["cases"]))
        assert cases
        for case in cases:
            hidden, relevance, sizes, budgets, order = (
                file.get_tensor(f"{case}.{stage}.{name}")
                for name in ("hidden", "relevance", "sizes", "budgets", "order")
            )
            for run in (NAIVE.dpp_map, FAST.dpp_map):
                assert run(hidden, logs(relevance), sizes.tolist(), budgets.tolist()).tolist() == order.tolist(), case


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"tokens": torch.zeros(5)}, r"tokens must be \[n, C\].*got \[5\] and \[5\]"),
        ({"log_relevance": torch.zeros(4)}, r"log_relevance \[n\], got \[5, 2\] and \[4\]"),
        ({"sizes": [2, 2]}, r"sum to n = 5, got sizes \[2, 2\]"),
        ({"counts": [1]}, r"one entry a segment .* counts \[1\]"),
        ({"counts": [3, 1]}, r"0 to all of its tokens, got counts \[3, 1\] of sizes \[2, 3\]"),
        ({"counts": [-1, 1]}, r"got counts \[-1, 1\]"),
        ({"rank_eps": -1e-6}, r"rank_eps must be in \[0, 1\), got -1e-06"),
        ({"rank_eps": float("nan")}, r"rank_eps must be in \[0, 1\), got nan"),
        ({"kernel": "gauss"}, "kernel must be 'dot' or 'cosine', got 'gauss'"),
    ],
)
def test_bad_input(change: dict[str, Any], match: str) -> None:
    good: dict[str, Any] = {"tokens": randn(5, 2), "log_relevance": torch.ones(5), "sizes": [2, 3], "counts": [1, 2]}
    ops.dpp_map(**good)
    with pytest.raises(ValueError, match=match):
        ops.dpp_map(**{**good, **change})
