"""nearest against its definition, which it must equal exactly, and against numbers worked out by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from neartie import assert_same_argmax
from test_ops import both, implementations, rand, randn
from test_ops_text_attention import Largest
from torch import Tensor

from vidcompress import ops

measures = pytest.mark.parametrize("measure", ["euclidean", "cosine"])


def still(noise: float, frames: int = 8, positions: int = 20, channels: int = 24) -> Tensor:
    """Frames that are the same but for noise."""
    return (randn(1, positions, channels) + noise * randn(frames, positions, channels, seed=1)).flatten(0, 1)


def some_of(tokens: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Tokens, and anchors taken from them."""
    return tokens, tokens[torch.randperm(len(tokens), generator=torch.Generator().manual_seed(2))[:count]]


CASES = {
    "random": lambda: (randn(161, 24), randn(37, 24, seed=1)),
    "from the tokens": lambda: some_of(randn(161, 24), 37),
    "one anchor": lambda: (randn(9, 24), randn(1, 24, seed=1)),
    "one channel": lambda: (randn(40, 1), randn(7, 1, seed=1)),
    "no token": lambda: (randn(0, 24), randn(7, 24)),
    "x 0.001": lambda: some_of(randn(161, 24) * 1e-3, 37),
    "x 10": lambda: some_of(randn(161, 24) * 10, 37),
    "+ 100": lambda: some_of(randn(161, 24) + 100, 37),
    "still 0.01": lambda: some_of(still(1e-2), 60),
    "still 0.001": lambda: some_of(still(1e-3), 60),
    "still 0.000001": lambda: some_of(still(1e-6), 60),
    "still 0.001 + 100": lambda: some_of(still(1e-3) + 100, 60),
    "float64, still 1e-9": lambda: some_of(still(1).double() + 1e-9 * randn(160, 24, seed=3).double(), 60),
    "frozen": lambda: some_of(still(0), 60),
    "flat": lambda: some_of(still(1e-3, 160, 1), 37),
    "all equal": lambda: some_of(torch.ones(50, 8), 9),
    "all zero": lambda: some_of(torch.zeros(50, 8), 9),
    "some zero": lambda: some_of(randn(161, 24) * (rand(161, 1) > 0.4), 37),
    "zero tokens, other anchors": lambda: (torch.zeros(50, 8), randn(9, 8)),
    "one-hot": lambda: (torch.eye(30), torch.eye(30).flip(0)[3:]),
    "whole numbers": lambda: (
        torch.cartesian_prod(*[torch.arange(3.0)] * 3),
        2 * torch.cartesian_prod(*[torch.arange(2.0)] * 3),
    ),
    "opposite anchors": lambda: (torch.zeros(3, 8), torch.cat([randn(4, 8), -randn(4, 8)])),
    "an anchor far away": lambda: (still(1e-3), torch.cat([1e3 * randn(1, 24), still(1e-3)[::9]])),
    "bfloat16": lambda: some_of(randn(161, 24).bfloat16(), 37),
    "float16 + 100": lambda: some_of((randn(161, 24) + 100).half(), 37),
    "views": lambda: (randn(24, 161).T, randn(74, 48, seed=1)[::2, ::2]),
}


def scores(tokens: Tensor, anchors: Tensor, measure: str) -> Tensor:
    """[N, K] fp64, highest is nearest, in words that neither implementation uses."""
    x, y = tokens.double()[:, None], anchors.double()[None]
    if measure == "euclidean":
        return -(x - y).norm(dim=-1)
    return torch.nn.functional.cosine_similarity(x, y, dim=-1, eps=1e-300)


@measures
@pytest.mark.parametrize("case", CASES)
def test_decides_as_the_definition(case: str, measure: str) -> None:
    naive, fast = implementations("nearest")
    tokens, anchors = CASES[case]()
    got = fast(tokens, anchors, measure)
    assert got.dtype == torch.long
    assert torch.equal(got, naive(tokens, anchors, measure))


@pytest.mark.parametrize("case", ["random", "+ 100", "still 0.01", "x 0.001", "bfloat16"])
@measures
def test_the_definition_is_the_nearest(case: str, measure: str) -> None:
    naive, _ = implementations("nearest")
    true = scores(*CASES[case](), measure)
    assert_same_argmax(naive(*CASES[case](), measure), true.argmax(1), true)


@both
def test_by_hand(kind: str) -> None:
    # (3, 1) is 1 from (3, 2) and 2 from (1, 1); its direction is nearer to that of (3, 0.5).
    run = implementations("nearest")[kind == "torch"]
    token, anchors = torch.tensor([[3.0, 1]]), torch.tensor([[1.0, 1], [3, 2], [30, 5]])
    assert run(token, anchors, "euclidean").tolist() == [1]
    assert run(token, anchors, "cosine").tolist() == [2]


@both
@measures
def test_equals_go_to_the_lowest(kind: str, measure: str) -> None:
    run = implementations("nearest")[kind == "torch"]
    anchors = randn(5, 77)[[3, 1, 3, 0, 1, 2]]
    assert run(randn(5, 77), anchors, measure).tolist() == [3, 1, 5, 0, run(randn(5, 77)[4:], anchors, measure).item()]
    assert run(torch.zeros(2, 77), anchors, "cosine").tolist() == [0, 0]
    assert run(torch.zeros(2, 1), torch.tensor([[2.0], [-1], [1]]), "euclidean").tolist() == [1, 1]


@measures
def test_the_fp32_product_alone_would_be_wrong(measure: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from vidcompress.ops.nearest import torch as fast

    tokens, anchors = CASES["still 0.000001"]()
    right = implementations("nearest")[0](tokens, anchors, measure)
    monkeypatch.setattr(fast, "NOISE", {torch.float32: 0.0})
    assert not torch.equal(fast.nearest(tokens, anchors, measure), right)


@measures
def test_memory_is_that_of_a_chunk(measure: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from vidcompress.ops.nearest import torch as fast

    monkeypatch.setattr(fast, "CHUNK_ELEMENTS", 4000)
    tokens, anchors = some_of(still(1e-3, 40, 20, 16), 200)
    with Largest() as largest:
        fast.nearest(tokens, anchors, measure)
    assert largest.elements <= tokens.numel()  # the tokens themselves, as views; 800 x 200 distances are not there


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"anchors": torch.zeros(0, 4)}, r"anchors is empty, got shape \[0, 4\]"),
        ({"anchors": torch.zeros(2, 5)}, "the same number of channels, got 4 and 5"),
        ({"measure": "manhattan"}, "measure must be 'euclidean' or 'cosine', got 'manhattan'"),
    ],
)
def test_refusals(change: dict[str, Any], says: str) -> None:
    arguments: dict[str, Any] = {"tokens": torch.zeros(3, 4), "anchors": torch.zeros(2, 4), "measure": "cosine"}
    ops.nearest(**arguments)
    with pytest.raises(ValueError, match=says):
        ops.nearest(**(arguments | change))
