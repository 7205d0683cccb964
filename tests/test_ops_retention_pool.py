"""The retention pool against its definition, and the definition against pools worked out by hand."""

from __future__ import annotations

import importlib
import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vidcompress import ops

NAIVE, FAST = (importlib.import_module(f"vidcompress.ops.retention_pool.{kind}") for kind in ("naive", "torch"))
both = pytest.mark.parametrize("run", [NAIVE.retention_pool, FAST.retention_pool], ids=["naive", "torch"])


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def shuffled(n: int, seed: int = 1) -> Tensor:
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))


def at(*degrees: float) -> Tensor:
    """Unit vectors in the plane."""
    angle = torch.tensor(degrees, dtype=torch.float64).deg2rad()
    return torch.stack([angle.cos(), angle.sin()], 1)


def clusters(n: int, channels: int, spread: float) -> Tensor:
    """Twelve centres and tokens `spread` away from them."""
    return randn(12, channels, seed=7)[shuffled(n) % 12] + spread * randn(n, channels, seed=9)


def copies() -> Tensor:
    """Ten tokens, again and again, every time of another length."""
    return randn(10, 33).repeat(20, 1) * torch.linspace(0.01, 50, 200)[:, None]


def some_zero() -> Tensor:
    x = clusters(150, 16, 0.5)
    x[::7] = 0
    return x


def chain() -> Tensor:
    """Each token is alike the next one only: whether it is accepted depends on all before it."""
    return at(*(torch.arange(60) * 3.0).tolist())


def massive() -> Tensor:
    """Two channels a thousand times the others."""
    x = clusters(200, 64, 0.5)
    x[:, [3, 40]] *= 1000
    return x


TOKENS = {
    "random": lambda: randn(200, 24),
    "clusters 0.5": lambda: clusters(200, 48, 0.5),
    "clusters 0.05": lambda: clusters(200, 48, 0.05),
    "two channels": lambda: randn(200, 2),
    "one channel": lambda: randn(50, 1),
    "copies": copies,
    "some zero": some_zero,
    "all zero": lambda: torch.zeros(30, 4),
    "all equal": lambda: randn(1, 24).expand(150, 24),
    "orthogonal": lambda: torch.eye(40).repeat(3, 1),
    "chain": chain,
    "massive": massive,
    "x 0.001": lambda: clusters(150, 24, 0.5) * 1e-3,
    "x 1000": lambda: clusters(150, 24, 0.5) * 1e3,
    "float64": lambda: clusters(150, 24, 0.5).double(),
    "bfloat16": lambda: clusters(150, 24, 0.5).bfloat16(),
    "float16": lambda: clusters(150, 24, 0.5).half(),
    "one": lambda: randn(1, 8),
    "none": lambda: randn(0, 8),
}


@pytest.mark.parametrize("block", [3, 256])
@pytest.mark.parametrize("threshold", [-1.0, 0.0, 0.5, 0.8, 0.95, 1.0, 1.1])
@pytest.mark.parametrize("case", TOKENS)
def test_pool_equals_definition(case: str, threshold: float, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FAST, "BLOCK_TOKENS", {"cpu": block})
    monkeypatch.setattr(FAST, "POOL_TOKENS", 2 * block + 1)
    tokens = TOKENS[case]()
    order = shuffled(len(tokens))
    pool = NAIVE.retention_pool(tokens, order, threshold, len(tokens))
    for size in {0, 1, len(pool) // 2, len(pool), len(tokens)}:
        got = FAST.retention_pool(tokens, order, threshold, size)
        assert got.dtype == torch.long
        assert got.tolist() == pool[:size].tolist()  # a smaller pool is the beginning of a larger one


@both
def test_pool_by_hand(run: Any) -> None:
    # cos 30 = .866, cos 60 = .5. From 0: 30 is too like it, 60 is not, 80 is too like 60, 120 is not.
    tokens, order = at(0, 30, 60, 80, 120), torch.arange(5)
    assert run(tokens, order, 0.8, 5).tolist() == [0, 2, 4]
    assert run(tokens, order, 0.8, 2).tolist() == [0, 2]
    # From 80: 60 and then 0 (cos 80 = .17); 30 is 30 from 0; 120 is 40 from 80 (.766).
    assert run(tokens, torch.tensor([3, 2, 0, 1, 4]), 0.8, 5).tolist() == [3, 0, 4]
    # Only who is in the pool keeps others out: 30 is not, so 45 only has to be unlike 0.
    assert run(at(0, 30, 45), torch.arange(3), 0.75, 3).tolist() == [0, 2]
    # Candidates may be left out, and are never accepted.
    assert run(tokens, torch.tensor([4, 1]), 0.8, 5).tolist() == [4, 1]
    assert run(tokens, torch.tensor([], dtype=torch.long), 0.8, 5).tolist() == []
    assert run(tokens, order, 0.8, 0).tolist() == []


@both
def test_the_first_is_always_accepted(run: Any) -> None:
    assert run(randn(20, 5), torch.arange(7, 20), -1.5, 20).tolist() == [7]


@both
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_copies_have_cosine_one(run: Any, dtype: torch.dtype) -> None:
    # The computed cosine of many of these with their copies is 1 - ulp. Lengths are powers of 2, so that they are
    # copies in every dtype.
    once = randn(30, 77).to(dtype)
    tokens = torch.cat([once, once * 4, once, once / 8])
    assert run(tokens, torch.arange(120), 1.0, 120).tolist() == list(range(30))
    assert run(tokens, torch.arange(120), 1.0 + 1e-9, 120).tolist() == list(range(120))


@both
def test_zero_tokens_are_unlike_everything_above_zero(run: Any) -> None:
    tokens = torch.tensor([[1.0, 0], [0, 0], [0, 0], [1, 0]])
    assert run(tokens, torch.arange(4), 0.5, 4).tolist() == [0, 1, 2]
    assert run(tokens, torch.arange(4), 0.0, 4).tolist() == [0]  # cosine 0 reaches a threshold of 0
    assert run(tokens, torch.tensor([1, 2, 0, 3]), 0.5, 4).tolist() == [1, 2, 0]


@both
def test_the_threshold_is_strict(run: Any) -> None:
    # (3, 4) and (4, 3): 24 / 25 exactly; (1, 0) and (3, 4): 3 / 5.
    tokens = torch.tensor([[3.0, 4], [4, 3]])
    assert run(tokens, torch.arange(2), 0.96, 2).tolist() == [0]
    assert run(tokens, torch.arange(2), 0.96 + 1e-9, 2).tolist() == [0, 1]
    assert run(torch.tensor([[1.0, 0], [3, 4]]), torch.arange(2), 0.6, 2).tolist() == [0]


@pytest.mark.parametrize("seen", ["in one block", "from the pool"])
def test_fp32_does_not_decide_what_is_close(seen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Thresholds 1e-9 above and below the cosine of two tokens: less than an ulp of fp32 apart.
    monkeypatch.setattr(FAST, "BLOCK_TOKENS", {"cpu": 1 if seen == "from the pool" else 256})
    wrong = 0
    for seed in range(40):
        tokens = clusters(24, 96, 0.1)[[0, 12]] + 0.1 * randn(2, 96, seed=seed)
        unit = torch.nn.functional.normalize(tokens.double(), dim=-1)
        cosine = float(unit[0] @ unit[1])
        fp32 = float(torch.nn.functional.cosine_similarity(tokens[0], tokens[1], dim=0))
        for threshold, want in ((cosine + 1e-9, [0, 1]), (cosine - 1e-9, [0])):
            wrong += ([0, 1] if fp32 < threshold else [0]) != want
            assert FAST.retention_pool(tokens, torch.arange(2), threshold, 2).tolist() == want
            assert NAIVE.retention_pool(tokens, torch.arange(2), threshold, 2).tolist() == want
    assert wrong > 10  # these are hard questions for fp32


def test_a_chain_takes_as_many_rounds_as_it_has_links() -> None:
    # 3 degrees apart, alike below 3.5: every other one is accepted, and each depends on the one before.
    assert FAST.retention_pool(chain(), torch.arange(60), 0.9982, 60).tolist() == list(range(0, 60, 2))


@settings(deadline=None, derandomize=True, max_examples=100)
@given(st.integers(1, 40), st.floats(-1, 1.05), st.integers(0, 40), st.integers(1, 9))
def test_what_a_pool_is(n: int, threshold: float, size: int, channels: int) -> None:
    tokens, order = randn(n, channels, seed=n).round(decimals=1), shuffled(n, seed=size)
    pool = ops.retention_pool(tokens, order, threshold, size).tolist()
    unit = torch.nn.functional.normalize(tokens.double(), dim=-1)
    cosine = unit @ unit.T
    assert len(pool) == len(set(pool)) <= size
    place = {token: i for i, token in enumerate(order.tolist())}
    assert all(place[a] < place[b] for a, b in itertools.pairwise(pool))
    assert all(cosine[a, b] < threshold for a, b in itertools.combinations(pool, 2))
    if len(pool) < size:  # everybody else had a reason
        for token in set(range(n)) - set(pool):
            earlier = [p for p in pool if place[p] < place[token]]
            assert earlier and float(cosine[token, earlier].max()) >= threshold - 2e-12


class Largest(TorchDispatchMode):
    """The most elements of any tensor that is made while it is on."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.elements = max(self.elements, *(x.numel() for x in tree_leaves(out) if isinstance(x, Tensor)), 0)
        return out


def test_memory_does_not_grow_with_the_square_of_the_tokens() -> None:
    n, channels = 100_000, 16
    tokens, order = randn(n, channels), torch.arange(n)
    for threshold, size in ((0.7, 300), (0.9, 2000)):
        with Largest() as largest:
            pool = FAST.retention_pool(tokens, order, threshold, size)
        assert 100 < len(pool) <= size
        # The order itself in blocks, the pool (twice what it holds, at most), a block against the pool.
        assert largest.elements <= max(n, 2 * size * channels, 256 * size)


def test_all_duplicates_cost_no_pairs() -> None:
    # At threshold 1 every token is a close call against its original: measured again, but against that one only.
    tokens = randn(4, 64).repeat(2000, 1)
    with Largest() as largest:
        assert FAST.retention_pool(tokens, torch.arange(8000), 1.0, 8000).tolist() == [0, 1, 2, 3]
    assert largest.elements <= 256 * 256


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"size": -1}, ValueError, "size must be at least 0, got -1"),
        ({"threshold": float("nan")}, ValueError, "threshold must be a cosine, got nan"),
        ({"tokens": torch.zeros(2, 3, 4)}, ValueError, r"tokens must be \[N, C\].*\[2, 3, 4\]"),
        ({"order": torch.zeros(2, 3).long()}, ValueError, r"order \[M\], got \[4, 2\] and \[2, 3\]"),
        ({"order": torch.arange(4.0)}, TypeError, r"torch\.long\), got torch\.float32"),
    ],
)
def test_bad_input(change: dict[str, Any], error: type[Exception], match: str) -> None:
    good: dict[str, Any] = {"tokens": torch.zeros(4, 2), "order": torch.arange(4), "threshold": 0.7, "size": 2}
    ops.retention_pool(**good)
    with pytest.raises(error, match=match):
        ops.retention_pool(**{**good, **change})
