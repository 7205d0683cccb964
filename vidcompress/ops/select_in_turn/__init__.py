"""Frame by frame selection in which a static position counts once a segment (InfoMerge, eq. 10-11)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from vidcompress.ops.dispatch import implementation

__all__ = ["select_in_turn"]


def select_in_turn(
    scores: Tensor, again: Tensor | None, segments: Sequence[tuple[int, int]], static: Tensor, counts: Tensor
) -> tuple[Tensor, Tensor]:
    """Picks the highest scores of every frame; a static position picked before in the segment has another score.

    Args:
        scores: [T, P] fp64, or fp32 without `again`.
        again: [T, P] fp64 scores of positions that are static and were picked in an earlier frame of the segment. None:
            these come after all others, but before what has a score of minus infinity.
        segments: (start, end) of each, in order; together all T frames. Empty ones are allowed.
        static: [K, P] bool, a row a segment.
        counts: [T] how many to pick in each frame, at most P. Ties go to the lowest index.

    Returns:
        Two [T, P] bool: picked; and static and picked in this frame or an earlier one of the segment.
    """
    return implementation("select_in_turn", scores.device)(scores, again, segments, static, counts)
