"""Choices are compared exactly, except where two scores are the same to within rounding.

Fast implementations work in fp32, their definitions in fp64. Where two candidates score alike to the last digits of
fp32 either may be taken; anywhere else another choice is a mistake. So a difference is excused only if the fp64 scores
show that it is a near-tie, and a test that uses this module thereby demonstrates it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

TOLERANCE = 1e-5
"""Relative gap of two fp64 scores below which either may be taken."""


def gap(a: float, b: float, logarithmic: bool = False) -> float:
    """Relative gap of two scores; 0 if they are equal, infinities of one sign included.

    Args:
        logarithmic: a and b are logarithms of the scores that are meant.
    """
    if a == b:
        return 0.0
    if math.isinf(a) or math.isinf(b):
        return math.inf
    return abs(a - b) / (1.0 if logarithmic else max(abs(a), abs(b)))


def assert_same_choice(
    got: Tensor | Iterable[int],
    want: Tensor | Iterable[int],
    scores: Tensor,
    *,
    tolerance: float = TOLERANCE,
    logarithmic: bool = False,
) -> int:
    """Both hold the same indices, but for candidates that the scores cannot tell apart.

    Equal scores are not excused: for them the rule is that the lowest index wins.

    Args:
        got, want: chosen indices in any order, or [n] bool masks of them.
        scores: [n] fp64; `want` must be the highest of them, the lowest index first among equals.
        logarithmic: the scores are logarithms.

    Returns:
        How many indices differ, all of them shown to be near-ties.

    Raises:
        AssertionError: another count, or a choice that the scores do not excuse; it names indices and gap.
        TypeError: scores that are not fp64.
    """
    if scores.dtype != torch.float64:
        raise TypeError(f"near-ties are judged in fp64, got scores in {scores.dtype}")
    mine, right = _indices(got), _indices(want)
    value = scores.tolist()
    by_rule = sorted(range(len(value)), key=lambda i: (-value[i], i))[: len(right)]
    assert right == set(by_rule), f"the scores choose {sorted(by_rule)}, not the expected {sorted(right)}"
    assert len(mine) == len(right), f"{len(mine)} indices chosen, {len(right)} expected"
    taken, missed = sorted(mine - right), sorted(right - mine)
    for i in taken:
        for j in missed:
            apart = gap(value[i], value[j], logarithmic)
            assert 0 < apart < tolerance, (
                f"chose {i} (score {value[i]!r}) instead of {j} (score {value[j]!r}): their gap {apart:.3g} is no "
                f"near-tie (0 < gap < {tolerance:g})"
            )
    return len(taken)


def assert_same_argmax(got: Tensor, want: Tensor, scores: Tensor, *, tolerance: float = TOLERANCE) -> int:
    """[m] choices among n, one a row, are the same, but for rows whose fp64 scores [m, n] cannot tell the two apart.

    Returns how many rows differ. Raises as `assert_same_choice`.
    """
    assert got.shape == want.shape == scores.shape[:1], f"{got.shape} and {want.shape} choices for {scores.shape}"
    return sum(
        assert_same_choice(mine[None], right[None], row, tolerance=tolerance)
        for mine, right, row in zip(got, want, scores, strict=True)
    )


def _indices(choice: Tensor | Iterable[int]) -> set[int]:
    if isinstance(choice, Tensor):
        choice = (choice.nonzero().squeeze(1) if choice.dtype == torch.bool else choice).tolist()
    listed = list(choice)
    assert len(set(listed)) == len(listed), f"an index is chosen twice: {listed}"
    return set(listed)
