"""Every op against its definition (naive.py), and the definitions against numbers worked out by hand."""

from __future__ import annotations

import importlib
import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from neartie import assert_same_argmax, assert_same_choice, gap
from torch import Tensor
from torch.utils._pytree import tree_leaves

from vidcompress import ops

quick = settings(deadline=None, derandomize=True, max_examples=300)


def implementations(op: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """(definition, fast one)."""
    return tuple(getattr(importlib.import_module(f"vidcompress.ops.{op}.{kind}"), op) for kind in ("naive", "torch"))


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def at(*degrees: float) -> Tensor:
    """Unit vectors in the plane."""
    angle = torch.tensor(degrees, dtype=torch.float64).deg2rad()
    return torch.stack([angle.cos(), angle.sin()], 1)


# -- the checker itself ------------------------------------------------------------------------------------------------
def test_checker_excuses_a_near_tie_only() -> None:
    scores = torch.tensor([3.0, 2.0, 2.0 * (1 - 5e-6), 1.0], dtype=torch.float64)
    assert assert_same_choice([0, 1], [1, 0], scores) == 0
    assert assert_same_choice([0, 2], [0, 1], scores) == 1
    with pytest.raises(AssertionError, match=r"chose 3 .* instead of 1 .* no near-tie"):
        assert_same_choice([0, 3], [0, 1], scores)


def test_checker_catches_a_gap_of_1e_minus_4() -> None:
    scores = torch.tensor([3.0, 2.0, 2.0 * (1 - 1e-4)], dtype=torch.float64)
    with pytest.raises(AssertionError, match=r"their gap 0\.0001 is no near-tie"):
        assert_same_choice([0, 2], [0, 1], scores)
    with pytest.raises(AssertionError, match=r"their gap 0\.0001 is no near-tie"):
        assert_same_choice([0, 2], [0, 1], scores.log(), logarithmic=True)
    rows = torch.stack([scores, scores - torch.tensor([9.0, 0, 0])])
    assert assert_same_argmax(torch.tensor([0, 1]), torch.tensor([0, 1]), rows) == 0
    with pytest.raises(AssertionError, match=r"chose 2 .* instead of 1 .* no near-tie"):
        assert_same_argmax(torch.tensor([0, 2]), torch.tensor([0, 1]), rows)


def test_checker_wants_the_lowest_index_of_equal_scores() -> None:
    scores = torch.tensor([1.0, 2.0, 2.0], dtype=torch.float64)
    with pytest.raises(AssertionError, match="gap 0 is no near-tie"):
        assert_same_choice([2], [1], scores)


def test_checker_wants_every_excuse_shown() -> None:
    # 2 for 1 is a near-tie, 3 for 1 is not: taking both for 0 and 1 needs both shown.
    scores = torch.tensor([2.0 + 1e-6, 2.0, 2.0 - 1e-6, 1.9, 1.0], dtype=torch.float64)
    assert assert_same_choice([0, 2], [0, 1], scores) == 1
    with pytest.raises(AssertionError, match="chose 3"):
        assert_same_choice([2, 3], [0, 1], scores)


@pytest.mark.parametrize("got", [[0], [0, 1, 2], [0, 0]])
def test_checker_counts(got: list[int]) -> None:
    with pytest.raises(AssertionError, match=r"expected|twice"):
        assert_same_choice(got, [0, 1], torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64))


def test_checker_refuses_scores_that_prove_nothing() -> None:
    with pytest.raises(TypeError, match="fp64"):
        assert_same_choice([0], [0], torch.tensor([1.0, 0.0]))
    with pytest.raises(AssertionError, match=r"the scores choose \[1\]"):
        assert_same_choice([0], [0], torch.tensor([0.0, 1.0], dtype=torch.float64))


def test_checker_takes_masks_and_infinities() -> None:
    scores = torch.tensor([1.0, -math.inf, 2.0, -math.inf], dtype=torch.float64)
    mask = torch.tensor([True, False, True, False])
    assert assert_same_choice(mask, [0, 2], scores) == 0
    with pytest.raises(AssertionError, match="gap inf"):
        assert_same_choice([2, 3], mask, scores)
    assert gap(-math.inf, -math.inf) == 0


def anchors_of(t: int, p: int, counts: list[int], seed: int = 3) -> tuple[Tensor, list[int]]:
    """[T, P] bool with so many marks in each frame, and these counts."""
    order = rand(t, p, seed=seed).argsort(1)
    return order < torch.tensor(counts)[:, None], counts


# -- all ops: what they promise together -------------------------------------------------------------------------------
def examples() -> dict[str, tuple[Any, ...]]:
    """Arguments of every op that has a fast implementation or a kernel."""
    tokens = randn(6, 15, 24)
    return {
        "anchor_merge": (
            tokens,
            rand(6, 15, seed=2) > 0.2,
            *anchors_of(6, 15, [0, 2, 3, 0, 0, 1]),
            [(0, 3)] * 3 + [(3, 4), (3, 6), (3, 6)],
            0.6,
        ),
        "bipartite_match": (tokens.flatten(0, 1), 30, 2),
        "breaches": (
            torch.tensor([2, 5, 7, 90]),
            torch.tensor([2, -1, 2]),
            torch.tensor([1, 2, 7]),
            torch.tensor([0.5, 0.5, math.inf]),
            90,
        ),
        "column_mean_attention": (randn(3, 4, 17, 8), randn(3, 4, 17, 8, seed=1), 8**-0.5),
        "components": (tokens.flatten(0, 1), 0.45),
        "compose": (
            (torch.arange(0, 90, 3), torch.tensor([4, 0, 4, 9, 4]), torch.tensor([7, 3, 12, 27, 7]), rand(5, seed=1)),
            (
                torch.tensor([0, 4, 5, 9, 20]),
                torch.tensor([3, 0, 3, 0, 2]),
                torch.tensor([4, 4, 9, 1, 0]),
                rand(5, seed=2),
            ),
            90,
        ),
        "cosine_fingerprint": (tokens,),
        "cosine_fingerprints": (tokens, [(0, 2), (2, 3), (3, 6)]),
        "density_clusters": (tokens.flatten(0, 1), 9, 4, "index", rand(90) > 0.3),
        "density_peaks": (tokens, rand(6, 15) > 0.3, 4),
        "dpp_map": (tokens.flatten(0, 1), rand(90), (30, 45, 15), (10, 20, 15)),
        "farthest_points": (tokens.flatten(0, 1), 20),
        "merge": (
            tokens.flatten(0, 1),
            torch.tensor([2, 5, 7, 80]),
            torch.tensor([2, 0, 2, 0, 2]),
            torch.tensor([1, 2, 7, 80, 1]),
            torch.tensor([0.5, 0.6, 0.25, 0.4, 0.25]),
        ),
        "nearest": (tokens.flatten(0, 1), randn(7, 24, seed=1), "cosine"),
        "places": anchors_of(6, 15, [2, 0, 15, 3, 0, 1]),
        "retention_pool": (tokens.flatten(0, 1), torch.arange(89, 4, -1), 0.3, 30),
        "select_in_turn": (
            rand(6, 15),
            (0.1, 0.01),
            ((0, 4), (4, 6)),
            rand(2, 15, seed=1) < 0.5,
            torch.tensor([3, 0, 15, 4, 7, 5]),
        ),
        "spectral_entropies": (tokens, [(0, 1), (1, 2), (2, 6)]),
        "spectral_entropy": (tokens.flatten(0, 1),),
        "text_attention": (
            randn(4, 3, 8),
            randn(2, 17, 8, seed=1),
            8**-0.5,
            torch.tensor([16, 5, 15]),
            torch.arange(2, 15),
        ),
        "through_means": (
            torch.tensor([9, 8, 0, 1, 0, 0, 1]),
            torch.tensor([20, 3, 17, 20, 77, 32, 77]),
            rand(7),
            2,
            rand(6, 15) > 0.5,
            [(0, 2), (2, 3), (3, 6)],
            torch.tensor(3),
        ),
        "top_tokens": (rand(6, 15).round(decimals=1), torch.tensor([3, 0, 15, 4, 7, 5])),
        "window_change": (tokens,),
        "with_means": (tokens, rand(6, 15) > 0.7, [(0, 2), (2, 3), (3, 6)]),
    }


FAST = [op for op in ops.__all__ if importlib.util.find_spec(f"vidcompress.ops.{op}.torch")]
both = pytest.mark.parametrize("kind", ["naive", "torch"])


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, tuple):
        return all(equal(x, y) for x, y in zip(a, b, strict=True))
    return torch.equal(a, b) if isinstance(a, Tensor) else a == b


def moved(arguments: tuple[Any, ...], change: Callable[[Tensor], Tensor]) -> tuple[Any, ...]:
    """The arguments, their floating-point tensors changed."""

    def one(a: Any) -> Any:
        if isinstance(a, tuple):
            return tuple(map(one, a))
        return change(a) if isinstance(a, Tensor) and a.is_floating_point() else a

    return tuple(map(one, arguments))


@pytest.mark.parametrize("op", FAST)
def test_the_environment_chooses(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    naive, fast = implementations(op)
    from vidcompress.ops.dispatch import implementation

    cpu = torch.device("cpu")
    monkeypatch.delenv("VIDCOMPRESS_OPS", raising=False)
    assert implementation(op, cpu) is fast
    monkeypatch.setenv("VIDCOMPRESS_OPS", "naive")
    assert implementation(op, cpu) is naive
    assert equal(getattr(ops, op)(*examples()[op]), naive(*examples()[op]))
    monkeypatch.setenv("VIDCOMPRESS_OPS", "torch")
    assert equal(getattr(ops, op)(*examples()[op]), fast(*examples()[op]))
    monkeypatch.setenv("VIDCOMPRESS_OPS", "fast")
    with pytest.raises(ValueError, match=r"VIDCOMPRESS_OPS must be 'naive', 'torch' or 'kernel', got 'fast'"):
        getattr(ops, op)(*examples()[op])


@both
@pytest.mark.parametrize("op", FAST)
def test_the_same_bits_twice(op: str, kind: str) -> None:
    run = getattr(importlib.import_module(f"vidcompress.ops.{op}.{kind}"), op)
    assert equal(run(*examples()[op]), run(*examples()[op]))


@both
@pytest.mark.parametrize("op", FAST)
def test_arguments_stay_as_they_are(op: str, kind: str) -> None:
    run = getattr(importlib.import_module(f"vidcompress.ops.{op}.{kind}"), op)
    handed, same = examples()[op], examples()[op]
    run(*handed)
    for a, b in zip(tree_leaves(handed), tree_leaves(same), strict=True):
        assert torch.equal(a, b) if isinstance(a, Tensor) else a == b


@both
@pytest.mark.parametrize("op", FAST)
def test_memory_layout_does_not_matter(op: str, kind: str) -> None:
    def strided(x: Tensor) -> Tensor:
        wide = torch.full((*x.shape[:-1], 2 * x.shape[-1]), torch.nan)
        wide[..., ::2] = x
        return wide[..., ::2] if x.dim() == 1 else wide[..., ::2].transpose(0, 1).contiguous().transpose(0, 1)

    run = getattr(importlib.import_module(f"vidcompress.ops.{op}.{kind}"), op)
    changed = moved(examples()[op], strided)
    assert any(isinstance(a, Tensor) and not a.is_contiguous() for a in tree_leaves(changed))
    got, want = run(*changed), run(*examples()[op])
    for a, b in zip(*((x if isinstance(x, tuple) else (x,)) for x in (got, want)), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Memory from torch.empty holds NaN (or the largest integer); an op of undefined order raises."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory and torch.empty(3).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(before)


@both
@pytest.mark.parametrize("op", FAST)
def test_no_memory_is_read_before_it_is_written(op: str, kind: str) -> None:
    run = getattr(importlib.import_module(f"vidcompress.ops.{op}.{kind}"), op)
    want = run(*examples()[op])
    with poisoned_memory():
        assert equal(run(*examples()[op]), want)


@both
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=["bfloat16", "float64"])
@pytest.mark.parametrize("op", FAST)
def test_the_default_dtype_does_not_matter(op: str, dtype: torch.dtype, kind: str) -> None:
    run = getattr(importlib.import_module(f"vidcompress.ops.{op}.{kind}"), op)
    arguments = examples()[op]
    want = run(*arguments)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        got = run(*arguments)
    finally:
        torch.set_default_dtype(before)
    for a, b in zip(*((x if isinstance(x, tuple) else (x,)) for x in (got, want)), strict=True):
        assert not isinstance(a, Tensor) or a.dtype == b.dtype
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    ("op", "constant", "value"),
    [
        ("anchor_merge", "CHUNK_ELEMENTS", 1),
        ("anchor_merge", "CHUNK_ELEMENTS", 24 * 15),
        ("anchor_merge", "CHUNK_ELEMENTS", 24 * 15 * 4),
        ("column_mean_attention", "CHUNK_ELEMENTS", {"cpu": 1}),
        ("column_mean_attention", "CHUNK_ELEMENTS", {"cpu": 17 * 5}),
        ("column_mean_attention", "CHUNK_ELEMENTS", {"cpu": 17 * 17 * 5}),
        ("cosine_fingerprint", "CHUNK_BYTES", {"cpu": 1}),
        ("cosine_fingerprint", "CHUNK_BYTES", {"cpu": 4 * (8 * 6 * 24 + 16 * 36)}),
        ("density_peaks", "CHUNK_FRAMES", {"cpu": 1}),
        ("density_peaks", "CHUNK_FRAMES", {"cpu": 4}),
        ("dpp_map", "LONGEST", {"cpu": 20}),
        ("dpp_map", "KERNEL_ELEMENTS", 1),
        ("merge", "CHUNK_BYTES", {"cpu": 1}),
        ("merge", "CHUNK_BYTES", {"cpu": 4 * 24 * 2}),
        ("merge", "CHUNK_BYTES", {"cpu": 4 * 24 * 5}),
        ("retention_pool", "BLOCK_TOKENS", {"cpu": 7}),
        ("retention_pool", "POOL_TOKENS", 3),
        ("nearest", "CHUNK_ELEMENTS", 1),
        ("nearest", "CHUNK_ELEMENTS", 24 * 4),
        ("spectral_entropy", "BLOCK_ROWS", {"cpu": 5}),
        ("text_attention", "CHUNK_ELEMENTS", 1),
        ("text_attention", "CHUNK_ELEMENTS", 17 * 2 * 2),
        ("text_attention", "TILE_ELEMENTS", 1),
        ("text_attention", "TILE_ELEMENTS", 8 * 5),
    ],
)
def test_chunks_do_not_show(op: str, constant: str, value: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module(f"vidcompress.ops.{op}.torch")
    run, arguments = getattr(module, op), examples()[op]
    whole = run(*arguments)
    if op == "density_peaks":
        arguments = (*arguments, "index", rand(6, 15, seed=5) * 1e-6)  # noise is cut into the same chunks
        whole = run(*arguments)
    if op == "merge":  # only half-precision tokens are copied
        arguments = (arguments[0].bfloat16(), *arguments[1:])
        whole = run(*arguments)
    monkeypatch.setattr(module, constant, value)
    parts = run(*arguments)
    for a, b in zip(*((x if isinstance(x, tuple) else (x,)) for x in (parts, whole)), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)


# -- cosine_fingerprint ------------------------------------------------------------------------------------------------
def slow(length: int, positions: int, channels: int, change: float, seed: int = 0) -> Tensor:
    """A still picture: every position keeps its token, but for `change` times noise; [L, P, C]."""
    return randn(1, positions, channels, seed=seed) + change * randn(length, positions, channels, seed=seed + 1)


FINGERPRINTS = {
    "random": lambda: randn(7, 31, 24),
    "one position": lambda: randn(5, 1, 8),
    "one channel": lambda: randn(5, 6, 1),
    "two frames": lambda: randn(2, 9, 16),
    "long": lambda: randn(33, 5, 12),
    "x 0.001": lambda: randn(7, 31, 24) * 1e-3,
    "x 10": lambda: randn(7, 31, 24) * 10,
    "bfloat16": lambda: randn(7, 31, 24).bfloat16(),
    "float16": lambda: randn(7, 31, 24).half(),
    "offset": lambda: randn(7, 31, 24) + 10,
    "slow": lambda: slow(7, 31, 24, 0.1),
    "slower": lambda: slow(7, 31, 24, 0.01),
    "nearly still": lambda: slow(7, 31, 24, 0.001),
    "some zero": lambda: randn(7, 31, 24) * (rand(7, 31, 1) > 0.3),
}


@pytest.mark.parametrize("case", FINGERPRINTS)
def test_fingerprint_equals_definition(case: str) -> None:
    naive, fast = implementations("cosine_fingerprint")
    tokens = FINGERPRINTS[case]()
    got, want = fast(tokens), naive(tokens)
    assert got.dtype == torch.float32 and got.shape == tokens.shape[1:2]
    torch.testing.assert_close(got, want, atol=2e-7, rtol=1e-5)
    # What counts is who is most static: the order, in fp64.
    unit = torch.nn.functional.normalize(tokens.double(), dim=-1, eps=1e-30).transpose(0, 1)  # [P, L, C]
    gram = unit @ unit.transpose(1, 2)
    true = gram.diff(dim=1).abs().mean((1, 2))  # [P] fp64
    for count in (1, len(true) // 10, len(true) // 2):
        chosen = ops.top_tokens(-got[None], count)[0]
        assert_same_choice(chosen, ops.top_tokens(-true[None], count)[0], -true)


@both
def test_fingerprint_of_two_frames_is_one_minus_cosine(kind: str) -> None:
    # F = [[1, c], [c, 1]]. Row 2 - row 1 = [c - 1, 1 - c]; the mean of the absolute values is 1 - c. So with the mean
    # as normaliser the second order equals the first order exactly for L = 2; with another it would be a multiple.
    run = implementations("cosine_fingerprint")[kind == "torch"]
    tokens = randn(2, 20, 8)
    cosine = torch.nn.functional.cosine_similarity(tokens[0].double(), tokens[1].double(), dim=-1)
    torch.testing.assert_close(run(tokens).double(), 1 - cosine, atol=3e-7, rtol=0)


@both
def test_fingerprint_by_hand(kind: str) -> None:
    # One position, three frames: (1,0), (0,2), (0,1). F = [[1,0,0],[0,1,1],[0,1,1]].
    # |row 2 - row 1| = 1,1,1 and |row 3 - row 2| = 0,0,0, so the mean of the six is 1/2.
    # Another: (1,0), (-1,0), (1,0). F = [[1,-1,1],[-1,1,-1],[1,-1,1]]: every difference is 2.
    run = implementations("cosine_fingerprint")[kind == "torch"]
    a, b = torch.tensor([[1.0, 0], [0, 2], [0, 1]]), torch.tensor([[1.0, 0], [-1, 0], [1, 0]])
    torch.testing.assert_close(run(torch.stack([a, b], 1)), torch.tensor([0.5, 2.0]))


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_fingerprint_of_what_never_changes_is_exactly_zero(kind: str, dtype: torch.dtype) -> None:
    run = implementations("cosine_fingerprint")[kind == "torch"]
    still = randn(1, 40, 33).to(dtype).expand(6, -1, -1)
    assert run(still).eq(0).all()
    assert run(torch.zeros(4, 3, 5, dtype=dtype)).eq(0).all()
    assert run(randn(1, 40, 33).to(dtype)).eq(0).all()  # one frame
    moving = still.clone()
    moving[3, 7] = moving[3, 8]
    assert run(moving).nonzero().squeeze(1).tolist() == [7]


def test_fingerprint_does_not_see_length() -> None:
    _, fast = implementations("cosine_fingerprint")
    tokens = randn(5, 30, 16)
    torch.testing.assert_close(fast(tokens * rand(5, 30, 1).add(0.1)), fast(tokens), atol=2e-7, rtol=0)


# -- adjacent_difference -----------------------------------------------------------------------------------------------
def test_adjacent_difference_by_hand() -> None:
    # Position 0 turns by 60 degrees in each of five steps: 1 - cos 60 = 1/2. Position 1 turns by 90 degrees between
    # frames 3 and 4 only, which is between two windows of four; position 2 between frames 1 and 2, one of the four
    # steps that count (0-1, 1-2, 2-3, 4-5): 1/4.
    turning, late, early = at(*range(0, 360, 60)), at(0, 0, 0, 0, 90, 90), at(0, 0, 90, 90, 90, 90)
    got = ops.adjacent_difference(torch.stack([turning, late, early], 1))
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, torch.tensor([0.5, 0, 0.25]), atol=1e-6, rtol=0)
    torch.testing.assert_close(ops.adjacent_difference(late[:, None], 6), torch.tensor([0.2]), atol=1e-6, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_adjacent_difference_of_what_never_changes_is_exactly_zero(dtype: torch.dtype) -> None:
    assert ops.adjacent_difference(randn(1, 40, 33).to(dtype).expand(6, -1, -1)).eq(0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adjacent_difference_is_the_mean_of_changes(dtype: torch.dtype) -> None:
    tokens = randn(11, 5, 16).to(dtype)
    change = ops.frame_change(tokens)
    for window in (2, 4, 5, 11, 99):
        pairs = [i for i in range(10) if i // window == (i + 1) // window]
        torch.testing.assert_close(ops.adjacent_difference(tokens, window), change[pairs].mean(0).float())


# -- frame_change ------------------------------------------------------------------------------------------------------
def test_frame_change_by_hand() -> None:
    # Position 0 turns by 60, 90 and 180 degrees; position 1 only grows; position 2 is zero at first.
    turning = torch.tensor([1.0, 2, 3, 4])[:, None] * at(0, 60, 150, 330).float()
    growing = torch.tensor([[1.0, 0], [3, 0], [5, 0], [0.5, 0]])
    zero = torch.tensor([[0.0, 0], [0, 0], [1, 0], [0, 0]])
    got = ops.frame_change(torch.stack([turning, growing, zero], 1))
    assert got.dtype == torch.float64
    want = torch.tensor([[0.5, 0, 0], [1, 0, 1], [2, 0, 1]], dtype=torch.float64)
    torch.testing.assert_close(got, want, atol=1e-7, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_frame_change_of_copies_is_exactly_zero(dtype: torch.dtype) -> None:
    tokens = randn(20, 7, 33).to(dtype)
    tokens[5:9, 2] = tokens[5, 2]
    tokens[10:, 4] = 0
    got = ops.frame_change(tokens)
    still = torch.zeros(19, 7, dtype=torch.bool)
    still[5:8, 2] = still[10:, 4] = True
    assert torch.equal(got == 0, still)
    assert got[9, 4] == 1  # it vanished


@pytest.mark.parametrize("frames", [0, 1, 2, 8, 9, 10, 16, 17, 18, 33])
def test_frame_change_in_chunks(frames: int) -> None:
    tokens = randn(frames, 5, 12)
    got = ops.frame_change(tokens)
    assert got.shape == (max(0, frames - 1), 5) and got.dtype == torch.float64
    x = tokens.double()
    want = [1 - torch.cosine_similarity(x[i], x[i - 1], dim=-1) for i in range(1, frames)]
    torch.testing.assert_close(got, torch.stack(want) if want else got, atol=1e-12, rtol=0)


@pytest.mark.parametrize("scale", [1e-30, 1e-15, 1e15, 1e30])
def test_frame_change_does_not_see_length(scale: float) -> None:
    tokens = randn(6, 5, 12)
    torch.testing.assert_close(ops.frame_change(tokens * scale), ops.frame_change(tokens), atol=1e-6, rtol=0)


# -- minmax ------------------------------------------------------------------------------------------------------------
def test_minmax_by_hand() -> None:
    got = ops.minmax(torch.tensor([3.0, 1.0, 2.0, 5.0]))
    assert got.dtype == torch.float64 and got.tolist() == [0.5, 0, 0.25, 1]
    assert ops.minmax(torch.tensor([-1.0, -3.0])).tolist() == [1, 0]


@pytest.mark.parametrize("value", [0.0, 0.1, -7.0, 1e30])
@pytest.mark.parametrize("n", [1, 2, 50])
def test_minmax_of_equals_is_zero(n: int, value: float) -> None:
    assert ops.minmax(torch.full((n,), value)).eq(0).all()


@quick
@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=2, max_size=30))
def test_minmax_keeps_the_order(values: list[float]) -> None:
    x = torch.tensor(values)
    got = ops.minmax(x)
    assert 0 <= got.min() and got.max() <= 1 and torch.equal(got[x.argsort(stable=True)], got.sort().values)
    assert (got.max() == 1 and got.min() == 0) or x.min() == x.max()


# -- max_cosine --------------------------------------------------------------------------------------------------------
def test_max_cosine_by_hand() -> None:
    tokens = torch.cat([3 * at(0, 100, 200).float(), torch.zeros(1, 2)])
    others = torch.cat([at(60, 190).float() * 7, torch.zeros(1, 2)])
    got = ops.max_cosine(tokens, others)
    # 60 degrees from the first; 40; 10 from the second. A zero vector has cosine 0 with all.
    want = torch.tensor([0.5, math.cos(math.radians(40)), math.cos(math.radians(10)), 0], dtype=torch.float64)
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, want, atol=1e-6, rtol=0)
    torch.testing.assert_close(ops.max_cosine(tokens[:1], others[1:2])[0], torch.tensor(190.0).double().deg2rad().cos())
    assert ops.max_cosine(tokens[1:2], at(280).float()).item() == pytest.approx(-1, abs=1e-6)


@pytest.mark.parametrize("elements", [1, 24 * 7, 10**6])
def test_max_cosine_in_chunks(elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    naive = importlib.import_module("vidcompress.ops.max_cosine.naive")
    tokens, others = randn(50, 24), randn(9, 24, seed=1)
    monkeypatch.setattr(naive, "CHUNK_ELEMENTS", elements)
    want = torch.cosine_similarity(tokens.double()[:, None], others.double()[None], dim=-1).amax(1)
    torch.testing.assert_close(ops.max_cosine(tokens, others), want, atol=1e-12, rtol=0)


@pytest.mark.parametrize("n", [2, 7, 33, 100])
@pytest.mark.parametrize("channels", [3, 17, 896])
def test_max_cosine_of_copies_is_one_number(n: int, channels: int) -> None:
    # Min-max scaling would make rounding noise a difference of 1.
    copies = randn(1, channels).expand(n, -1)
    for others in (1, 5):
        likeness = ops.max_cosine(copies, randn(others, channels, seed=1))
        assert ops.minmax(likeness).eq(0).all()


def test_max_cosine_where_few_channels_dominate() -> None:
    # All tokens point the same way to 1e-4, as hidden states do; what tells them apart lies far behind fp32's digits.
    tokens, others = 1e-2 * randn(40, 64), 1e-2 * randn(5, 64, seed=1)
    tokens[:, 3] += 100
    others[:, 3] += 100
    x, y = tokens.double(), others.double()
    want = torch.cosine_similarity(x[:, None], y[None], dim=-1).amax(1)
    got = ops.max_cosine(tokens, others)
    want = (want - want.min()) / (want.max() - want.min())
    torch.testing.assert_close(ops.minmax(got), want, atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_max_cosine_upcasts(dtype: torch.dtype) -> None:
    tokens, others = randn(30, 24).to(dtype), randn(4, 24, seed=1).to(dtype)
    assert torch.equal(ops.max_cosine(tokens, others), ops.max_cosine(tokens.float(), others.float()))


# -- standardise -------------------------------------------------------------------------------------------------------
def test_standardise_by_hand() -> None:
    # Mean 3, population variance (4 + 0 + 4) / 3.
    got = ops.standardise(torch.tensor([1.0, 3, 5], dtype=torch.float64))
    assert got.dtype == torch.float64 and got.tolist() == pytest.approx([-(1.5**0.5), 0, 1.5**0.5])
    assert ops.standardise(torch.tensor([2.0, 7.0])).tolist() == pytest.approx([-1, 1])


def test_standardise_finds_nothing_in_rounding_noise() -> None:
    noise = torch.tensor([1.0, 1 + 1e-7, 1 - 1e-7], dtype=torch.float64)
    for values in (torch.tensor([5.0]), torch.ones(4), torch.zeros(2), noise):
        assert ops.standardise(values).eq(0).all()
    assert ops.standardise(noise, 1e-9).ne(0).any()
    assert ops.standardise(torch.tensor([0.0, 1e-30]), 0).isfinite().all()


# -- spectral_entropy --------------------------------------------------------------------------------------------------
ENTROPIES = {
    "tall": lambda: randn(98, 24),
    "wide": lambda: randn(9, 50),
    "square": lambda: randn(17, 17),
    "offset": lambda: randn(98, 24) + 10,
    "large offset": lambda: randn(98, 24) + 100,
    "one direction": lambda: randn(50, 1) @ randn(1, 16, seed=1),
    "constant": lambda: torch.ones(60, 16),
    "two points": lambda: torch.eye(4)[torch.arange(20) % 2],
    "x 0.001": lambda: randn(98, 24) * 1e-3,
    "x 10": lambda: randn(98, 24) * 10,
    "x 1000 float16": lambda: (randn(98, 24) * 1e3).half(),
    "bfloat16": lambda: randn(98, 24).bfloat16(),
    "one token": lambda: randn(1, 24),
    "one channel": lambda: randn(30, 1),
    "zero": lambda: torch.zeros(12, 6),
    "mostly zero": lambda: randn(40, 12) * (torch.arange(40)[:, None] == 3),
}


@pytest.mark.parametrize("case", ENTROPIES)
def test_entropy_equals_definition(case: str) -> None:
    naive, fast = implementations("spectral_entropy")
    tokens = ENTROPIES[case]()
    got, want = fast(tokens), naive(tokens)
    assert got.dtype == want.dtype == torch.float64 and got.shape == ()
    assert abs(float(got) - float(want)) <= 1e-5
    assert -1e-9 <= float(got) <= 1 + 1e-6


@both
def test_entropy_by_hand(kind: str) -> None:
    run = implementations("spectral_entropy")[kind == "torch"]
    assert float(run(torch.eye(5))) == pytest.approx(1)  # five equal directions of five
    assert float(run(torch.ones(7, 3))) == pytest.approx(0, abs=1e-5)
    # Singular values 3 and 4, so shares 9/25 and 16/25 of the energy; R = 2.
    want = -(9 / 25 * math.log(9 / 25) + 16 / 25 * math.log(16 / 25)) / math.log(2)
    assert float(run(torch.tensor([[3.0, 0, 0], [0, 4, 0]]))) == pytest.approx(want, abs=1e-6)
    # Not centred: one direction far from the origin has entropy 0 although its centred tokens spread.
    assert float(run(torch.tensor([[1.0, 1], [2, 2], [3, 3]]))) == pytest.approx(0, abs=1e-5)
    # A zero token adds nothing but counts in R = min(n, C).
    assert float(run(torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 0]]))) == pytest.approx(math.log(2) / math.log(3))


@both
def test_entropy_does_not_see_order_or_scale(kind: str) -> None:
    run = implementations("spectral_entropy")[kind == "torch"]
    tokens = randn(40, 12)
    torch.testing.assert_close(run(tokens[torch.randperm(40)] * 7), run(tokens), atol=1e-6, rtol=0)


# -- merge -------------------------------------------------------------------------------------------------------------
def bag(seed: int, n: int = 40, k: int = 12, e: int = 60) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """keep and unsorted triplets in which some (slot, source) pairs come twice and some slots not at all."""
    generator = torch.Generator().manual_seed(seed)
    keep = torch.randperm(n, generator=generator)[:k].sort().values
    slot = torch.randint(0, k // 2, (e,), generator=generator) * 2
    return keep, slot, torch.randint(0, n, (e,), generator=generator), torch.randn(e, generator=generator) / 4


def product(keep: Tensor, slot: Tensor, source: Tensor, weight: Tensor, n: int) -> Tensor:
    """[K, N] fp64."""
    out = torch.zeros(len(keep), n, dtype=torch.float64)
    out.index_put_((slot, source), weight.double(), accumulate=True)
    alone = torch.ones(len(keep), dtype=torch.bool).index_fill(0, slot, False)
    out[alone, keep[alone]] = 1
    return out


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scale", [1, 1e-3, 10])
def test_merge_is_the_dense_product(kind: str, dtype: torch.dtype, scale: float) -> None:
    run = implementations("merge")[kind == "torch"]
    features = (randn(40, 19) * scale).to(dtype)
    triplets = bag(0)
    got = run(features, *triplets)
    want = product(*triplets, 40) @ features.double()
    assert got.dtype == dtype
    # Sums run in fp32 or better, so one rounding to the storage dtype is all that may be seen.
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(got.double(), want, atol=max(eps / 4, 2e-6) * scale, rtol=max(eps, 1e-6))


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_merge_copies_unmixed_tokens_bit_for_bit(kind: str, dtype: torch.dtype) -> None:
    run = implementations("merge")[kind == "torch"]
    features = (randn(40, 19) * 1e3).to(dtype)
    keep, *triplets = bag(1)
    assert torch.equal(run(features, keep, *triplets)[1::2], features[keep[1::2]])


@both
def test_merge_of_nothing_and_of_everything(kind: str) -> None:
    run = implementations("merge")[kind == "torch"]
    features, none = randn(5, 3), torch.empty(0, dtype=torch.long)
    assert torch.equal(run(features, torch.tensor([1, 4]), none, none, torch.empty(0)), features[[1, 4]])
    ones = torch.full((5,), 0.2)
    mean = run(features, torch.tensor([2]), torch.zeros(5, dtype=torch.long), torch.arange(5), ones)
    torch.testing.assert_close(mean, features.mean(0, keepdim=True), atol=1e-6, rtol=0)
    assert run(features[:1], torch.tensor([0]), torch.tensor([0]), torch.tensor([0]), torch.tensor([0.0])).eq(0).all()


@both
def test_merge_is_differentiable(kind: str) -> None:
    run = implementations("merge")[kind == "torch"]
    triplets, upstream = bag(2), randn(12, 19, seed=3)
    features = randn(40, 19).requires_grad_()
    (run(features, *triplets) * upstream).sum().backward()
    want = product(*triplets, 40).T @ upstream.double()
    torch.testing.assert_close(features.grad.double(), want, atol=1e-5, rtol=1e-5)


# -- column_mean_attention ---------------------------------------------------------------------------------------------
ATTENTIONS = {
    "random": lambda: (randn(3, 4, 17, 8), randn(3, 4, 17, 8, seed=1), 8**-0.5),
    "one token": lambda: (randn(2, 3, 1, 8), randn(2, 3, 1, 8, seed=1), 1.0),
    "one head": lambda: (randn(2, 1, 9, 5), randn(2, 1, 9, 5, seed=1), 1.0),
    "one frame": lambda: (randn(1, 2, 9, 5), randn(1, 2, 9, 5, seed=1), 1.0),
    "peaked": lambda: (randn(2, 3, 11, 8) * 30, randn(2, 3, 11, 8, seed=1) * 30, 8**-0.5),
    "one key far up": lambda: (torch.ones(1, 1, 9, 2), 1e4 * torch.eye(9)[None, None, :, :2], 1.0),
    "all equal": lambda: (torch.ones(2, 2, 7, 4), torch.ones(2, 2, 7, 4), 1.0),
    "all zero": lambda: (torch.zeros(2, 2, 7, 4), torch.zeros(2, 2, 7, 4), 1.0),
    "bfloat16": lambda: (randn(3, 4, 17, 8).bfloat16(), randn(3, 4, 17, 8, seed=1).bfloat16(), 8**-0.5),
    "float16": lambda: ((randn(3, 4, 17, 8) * 3).half(), (randn(3, 4, 17, 8, seed=1) * 3).half(), 8**-0.5),
}


@both
@pytest.mark.parametrize("case", ATTENTIONS)
def test_received_attention_is_the_mean_of_the_softmax(case: str, kind: str) -> None:
    run = implementations("column_mean_attention")[kind == "torch"]
    query, key, scale = ATTENTIONS[case]()
    got = run(query, key, scale)
    assert got.dtype == torch.float32 and got.shape == (query.shape[0], query.shape[2])
    want = torch.softmax(query.double() @ key.double().transpose(2, 3) * scale, dim=-1).mean((1, 2))
    torch.testing.assert_close(got.double(), want, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(got.sum(1), torch.ones(len(got)), atol=1e-6, rtol=0)


@both
def test_received_attention_is_what_scaled_dot_product_attention_hands_on(kind: str) -> None:
    # With the unit vectors as values SDPA returns its weights.
    run = implementations("column_mean_attention")[kind == "torch"]
    query, key, scale = ATTENTIONS["random"]()
    one = torch.eye(17).expand(3, 4, 17, 17)
    weights = torch.nn.functional.scaled_dot_product_attention(query, key, one, scale=scale)
    torch.testing.assert_close(run(query, key, scale), weights.mean((1, 2)), atol=1e-6, rtol=0)


def test_received_attention_needs_no_square_matrix_of_all_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("vidcompress.ops.column_mean_attention.torch")
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", {"cpu": 500})
    sizes = []
    original = torch.bmm

    def watched(*args: Tensor, **kwargs: Any) -> Tensor:
        out = original(*args, **kwargs)
        sizes.append(out.numel())
        return out

    monkeypatch.setattr(module.torch, "bmm", watched)
    module.column_mean_attention(randn(2, 4, 40, 8), randn(2, 4, 40, 8, seed=1), 1.0)
    assert sizes and max(sizes) <= 500 < 2 * 4 * 40 * 40


# -- top_tokens --------------------------------------------------------------------------------------------------------
def test_top_tokens_by_hand() -> None:
    scores = torch.tensor([[1.0, 3, 2, 3], [0, 0, 0, 0], [-math.inf, 5, -math.inf, 6]])
    assert ops.top_tokens(scores, 2).tolist() == [
        [False, True, False, True],
        [True, True, False, False],
        [False, True, False, True],
    ]
    got = ops.top_tokens(scores, torch.tensor([1, 3, 0])).long().tolist()
    assert got == [[0, 1, 0, 0], [1, 1, 1, 0], [0, 0, 0, 0]]
    assert ops.top_tokens(scores, 9).all()
    assert ops.top_tokens(scores[:0], torch.empty(0, dtype=torch.long)).shape == (0, 4)


@quick
@given(st.data())
def test_top_tokens_picks_the_highest_and_the_lowest_index_first(data: st.DataObject) -> None:
    n = data.draw(st.integers(1, 12))
    row = st.lists(st.sampled_from([-math.inf, -1.5, -0.0, 0.0, 1e-3, 2.0, 2.0, math.nan]), min_size=n, max_size=n)
    rows = data.draw(st.lists(row, min_size=1, max_size=4))
    counts = data.draw(st.lists(st.integers(0, n + 2), min_size=len(rows), max_size=len(rows)))
    scores = torch.tensor(rows)
    for run, lowest in itertools.product(implementations("top_tokens"), (False, True)):
        got = run(scores, torch.tensor(counts), lowest)
        for mask, values, count in zip(got.tolist(), rows, counts, strict=True):
            rising = [-math.inf if math.isnan(x) else x if lowest else -x for x in values]
            assert [i for i in range(n) if mask[i]] == sorted(sorted(range(n), key=lambda i: (rising[i], i))[:count])
        assert torch.equal(run(scores, counts[0], lowest)[0], got[0])
