"""Frame by frame selection in which a static position counts once a segment (InfoMerge, eq. 10-11)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from vidcompress.ops.dispatch import implementation

__all__ = ["select_in_turn"]


def select_in_turn(
    scores: Tensor,
    again: tuple[float, float] | None,
    segments: Sequence[tuple[int, int]],
    static: Tensor,
    counts: Tensor,
) -> tuple[Tensor, Tensor]:
    """Picks the highest scores of every frame; a static position picked before in the segment has another score.

    Args:
        scores: [T, P]. What is not a number counts as infinity.
        again: (factor, less) of a position that is static and was picked in an earlier frame of the segment: its score
            becomes score * factor - less, in fp64. None: it comes after all others, but before what has a score of
            minus infinity.
        segments: (start, end) of each, in order; together all T frames. Empty ones are allowed.
        static: [K, P] bool, a row a segment.
        counts: [T] how many to pick in each frame, at most P. Ties go to the lowest index.

    Returns:
        Two [T, P] bool: picked; and static and picked in this frame or an earlier one of the segment.
    """
    return implementation("select_in_turn", scores.device)(scores, again, segments, static, counts)
