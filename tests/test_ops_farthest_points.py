"""`farthest_points`: the fast form against the definition, also where its shortcuts fail."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor

from vidcompress import ops
from vidcompress.ops.farthest_points import naive
from vidcompress.ops.farthest_points import torch as fast


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


KINDS = {
    "random": lambda n, c: randn(n, c),
    "copies": lambda n, c: randn(n, c)[torch.arange(n) * 7 % max(1, n // 3)],
    "all equal": lambda n, c: randn(1, c).expand(n, -1),
    "nearly equal": lambda n, c: randn(1, c) + 1e-4 * randn(n, c, seed=1),
    "zeros among others": lambda n, c: randn(n, c) * (torch.arange(n) % 3 == 1)[:, None],
    "all zero": lambda n, c: torch.zeros(n, c),
    "all at one distance": lambda n, c: torch.eye(n)[:, :c] if n <= c else torch.eye(n),
    "opposite": lambda n, c: randn(n, c)[torch.arange(n) // 2] * (1 - 2 * (torch.arange(n) % 2))[:, None],
    "half precision": lambda n, c: randn(n, c).bfloat16(),
    "double": lambda n, c: randn(n, c).double(),
    "frames": lambda n, c: randn(max(1, n // 5), c).repeat(6, 1)[:n] + 0.05 * randn(n, c, seed=1),
    "large": lambda n, c: 1e4 * randn(n, c),
    "small": lambda n, c: 1e-6 * randn(n, c),
}


def same(tokens: Tensor, count: int, period: int = 1) -> None:
    got = fast.farthest_points(tokens, count, period)
    assert got.dtype == torch.long and torch.equal(got, naive.farthest_points(tokens, count))


@pytest.mark.parametrize("kind", KINDS)
def test_as_defined(kind: str) -> None:
    for n, c in [(1, 3), (2, 2), (5, 1), (40, 4), (70, 33)]:
        tokens = KINDS[kind](n, c)
        n = len(tokens)
        for count, period in product({0, 1, min(2, n), n // 2, n}, {1, max(1, n // 5), n + 3}):
            same(tokens, count, period)


@pytest.mark.parametrize("kind", KINDS)
def test_few_candidates_and_fp64(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # So few that all ways are taken: several rounds, too many candidates, several blocks and windows.
    for name, value in {"CANDIDATES": 4, "MOST": 8, "BLOCK": 3, "ROWS": 16, "WINDOW": 3}.items():
        monkeypatch.setattr(fast, name, value)
    tokens = KINDS[kind](90, 12)
    for count in (30, 90):
        same(tokens, count, 18)


def test_many_candidates_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast, "CANDIDATES", 16)
    tokens = randn(1500, 24)
    same(tokens, 200, 100)
    monkeypatch.setattr(fast, "NOISE", {torch.float32: 1e-3, torch.float64: 2.0**-51})  # everything is close
    same(tokens, 60, 100)


def test_by_hand() -> None:
    # Angles 0, 10, 60, 100, 180 degrees. Distances to the nearest other: 10, 10, 40, 40, 80: first 180. Then 0, the
    # farthest; then 100 (80 from 180) and 60 (60 from 0): 100; then 60 (40 from 100), then 10.
    angle = torch.tensor([0.0, 10, 60, 100, 180]).deg2rad()
    tokens = torch.stack([angle.cos(), angle.sin()], 1) * torch.tensor([1, 5, 0.2, 3, 1])[:, None]
    assert ops.farthest_points(tokens, 5).tolist() == [4, 0, 3, 2, 1]


def test_not_contiguous() -> None:
    tokens = randn(80, 40)
    same(tokens[:, ::2], 20, 8)
    same(tokens[::2].T, 10)


@pytest.mark.parametrize(
    ("shape", "count", "period", "says"),
    [
        ((3, 2, 1), 1, 1, r"tokens must be \[N, C\], got shape \[3, 2, 1\]"),
        ((3, 2), 4, 1, "count must be 0 to all 3 tokens, got 4"),
        ((3, 2), -1, 1, "count must be 0 to all 3 tokens, got -1"),
        ((3, 2), 1, 0, "period must be at least 1 token, got 0"),
    ],
)
def test_refused(shape: tuple[int, ...], count: int, period: int, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        ops.farthest_points(torch.zeros(shape), count, period)
