"""text_attention against torch's own attention, and against numbers worked out by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from test_ops import both, implementations, randn
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vidcompress import ops


def weights_of_torch(query: Tensor, key: Tensor, scale: float, rows: Tensor, columns: Tensor) -> Tensor:
    """[H, Q, n] fp64: attention to a one-hot value is the weight of its key."""
    n = key.shape[1]
    mask = torch.arange(n) <= rows[:, None]
    value = torch.eye(n, dtype=torch.float64).expand(len(key), n, n)
    out = scaled_dot_product_attention(
        query.double()[None], key.double()[None], value[None], attn_mask=mask, scale=scale, enable_gqa=True
    )
    return out[0][..., columns]


def behind(queries: int, n: int) -> Tensor:
    """The last places, as of text behind a video."""
    return torch.arange(n - queries, n)


CASES = {
    "grouped": lambda: (randn(6, 5, 8), randn(2, 23, 8, seed=1), 8**-0.5, behind(5, 23), torch.arange(4, 18)),
    "one key head": lambda: (randn(6, 5, 8), randn(1, 23, 8, seed=1), 8**-0.5, behind(5, 23), torch.arange(23)),
    "as many heads": lambda: (randn(3, 5, 7), randn(3, 23, 7, seed=1), 0.3, behind(5, 23), torch.arange(4, 18)),
    "one query": lambda: (randn(4, 1, 8), randn(2, 23, 8, seed=1), 8**-0.5, behind(1, 23), torch.arange(4, 18)),
    "rows in between": lambda: (
        randn(4, 4, 8),
        randn(2, 23, 8, seed=1),
        8**-0.5,
        torch.tensor([9, 0, 22, 9]),
        torch.arange(23),
    ),
    "columns in any order": lambda: (
        randn(4, 3, 8),
        randn(2, 23, 8, seed=1),
        8**-0.5,
        behind(3, 23),
        torch.tensor([7, 2, 2, 20]),
    ),
    "no column": lambda: (randn(4, 3, 8), randn(2, 9, 8), 0.3, behind(3, 9), torch.arange(0)),
    "one key": lambda: (randn(4, 1, 8), randn(2, 1, 8), 0.3, behind(1, 1), torch.arange(1)),
    "sharp": lambda: (randn(4, 3, 8) * 30, randn(2, 23, 8, seed=1) * 30, 0.3, behind(3, 23), torch.arange(23)),
    "bfloat16": lambda: (
        randn(4, 3, 8).bfloat16(),
        randn(2, 23, 8, seed=1).bfloat16(),
        0.3,
        behind(3, 23),
        torch.arange(23),
    ),
    "float16": lambda: (randn(4, 3, 8).half(), randn(2, 23, 8).half(), 0.3, behind(3, 23), torch.arange(23)),
    "float64": lambda: (randn(4, 3, 8).double(), randn(2, 23, 8).double(), 0.3, behind(3, 23), torch.arange(23)),
    "views": lambda: (
        randn(3, 4, 8).transpose(0, 1),
        randn(23, 2, 16, seed=1).transpose(0, 1)[..., ::2],
        0.3,
        behind(3, 23),
        torch.arange(23)[::2],
    ),
}


@both
@pytest.mark.parametrize("case", CASES)
def test_equals_the_attention_of_torch(case: str, kind: str) -> None:
    run = implementations("text_attention")[kind == "torch"]
    arguments = CASES[case]()
    true = weights_of_torch(*arguments)
    every, greatest = run(*arguments, "none"), run(*arguments)
    assert every.dtype == greatest.dtype == torch.float32
    # Logits of a few hundred leave fp32 about five digits of exp.
    tolerance = 1e-3 if case == "sharp" else 1e-6
    torch.testing.assert_close(every.double(), true, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(greatest.double(), true.mean(0).amax(0), atol=tolerance, rtol=tolerance)


@both
def test_by_hand(kind: str) -> None:
    # Keys 0, log 2, log 3 on a line. Two queries of both heads stand at 1 and 2; head 0 asks with 1, head 1 with 0.
    # Head 0: 1/3, 2/3 and 1/6, 2/6, 3/6. Head 1, indifferent: 1/2, 1/2 and 1/3, 1/3, 1/3.
    run = implementations("text_attention")[kind == "torch"]
    key = torch.tensor([0, math.log(2), math.log(3)]).view(1, 3, 1)
    query = torch.tensor([[1.0, 1], [0, 0]])[..., None]
    rows = torch.tensor([1, 2])
    want = torch.tensor([[[1 / 3, 2 / 3, 0], [1 / 6, 1 / 3, 1 / 2]], [[1 / 2, 1 / 2, 0], [1 / 3, 1 / 3, 1 / 3]]])
    torch.testing.assert_close(run(query, key, 1.0, rows, torch.arange(3), "none"), want)
    # Means over heads: 5/12, 7/12, 0 and 1/4, 1/3, 5/12; the greater of each.
    torch.testing.assert_close(run(query, key, 1.0, rows, torch.arange(3)), torch.tensor([5 / 12, 7 / 12, 5 / 12]))


@both
def test_unseen_is_exactly_zero_whatever_it_holds(kind: str) -> None:
    run = implementations("text_attention")[kind == "torch"]
    query, key, scale, rows, columns = CASES["rows in between"]()
    every = run(query, key, scale, rows, columns, "none")
    assert torch.equal(every == 0, (columns > rows[:, None]).expand_as(every))
    key = torch.cat([key[:, :10], torch.full((2, 13, 8), torch.nan)], 1)
    kept = torch.tensor([0, 1, 3])  # the third query sees what is broken
    again = run(query[:, kept], key, scale, rows[kept], columns, "none")
    torch.testing.assert_close(again, every[:, kept])


@both
def test_query_heads_share_key_heads_in_blocks(kind: str) -> None:
    run = implementations("text_attention")[kind == "torch"]
    query, key, scale, rows, columns = CASES["grouped"]()
    parts = [run(query[3 * g : 3 * g + 3], key[g : g + 1], scale, rows, columns, "none") for g in range(2)]
    torch.testing.assert_close(run(query, key, scale, rows, columns, "none"), torch.cat(parts))


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that is made while it is on."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.elements = max([self.elements, *(x.numel() for x in tree_leaves(out) if isinstance(x, Tensor))])
        return out


def test_memory_does_not_grow_with_the_text(monkeypatch: pytest.MonkeyPatch) -> None:
    from vidcompress.ops.text_attention import torch as fast

    monkeypatch.setattr(fast, "CHUNK_ELEMENTS", 1 << 14)
    monkeypatch.setattr(fast, "TILE_ELEMENTS", 1 << 12)
    key, columns = randn(2, 4000, 16).bfloat16(), torch.arange(3900)
    for queries in (2, 50):
        with Largest() as largest:
            fast.text_attention(randn(4, queries, 16), key, 0.25, behind(queries, 4000), columns)
        # The keys' own elements appear as views; nothing is larger, though 50 x 4 x 4000 weights are computed.
        assert largest.elements <= key.numel()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"query": torch.zeros(4, 0, 8), "rows": torch.arange(0)}, r"query is empty, got shape \[4, 0, 8\]"),
        ({"query": torch.zeros(5, 3, 8)}, r"an H that G divides, got \[5, 3, 8\] and \[2, 23, 8\]"),
        ({"query": torch.zeros(4, 3, 6)}, r"the same D .* got \[4, 3, 6\] and \[2, 23, 8\]"),
        ({"rows": torch.arange(2)}, r"one place for each of 3 queries, got shape \[2\]"),
        ({"rows": torch.tensor([1, 2, 23])}, r"rows must lie in 0\.\.22, got 1\.\.23"),
        ({"rows": torch.tensor([-1, 2, 3])}, r"rows must lie in 0\.\.22, got -1\.\.3"),
        ({"columns": torch.tensor([40])}, r"columns must lie in 0\.\.22, got 40\.\.40"),
        ({"reduce": "mean"}, "reduce must be 'max' or 'none', got 'mean'"),
    ],
)
def test_refusals(change: dict[str, Any], says: str) -> None:
    arguments: dict[str, Any] = {
        "query": torch.zeros(4, 3, 8),
        "key": torch.zeros(2, 23, 8),
        "scale": 0.3,
        "rows": torch.arange(3),
        "columns": torch.arange(9),
    }
    ops.text_attention(**arguments)
    with pytest.raises(ValueError, match=says):
        ops.text_attention(**(arguments | change))
