"""Where marks are."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from vidcompress.ops.dispatch import implementation

__all__ = ["places"]


def places(marks: Tensor, counts: Sequence[int]) -> Tensor:
    """The flat indices of the marks, ascending; nobody waits for their number, which the caller knows.

    Args:
        marks: [B, n] bool.
        counts: how many marks each of the B rows has.

    Returns:
        [sum of counts] long.
    """
    return implementation("places", marks.device)(marks, counts)
