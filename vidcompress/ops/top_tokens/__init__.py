"""Picking the highest scores of each row."""

from __future__ import annotations

from torch import Tensor

from vidcompress.ops.dispatch import implementation

__all__ = ["top_tokens"]


def top_tokens(scores: Tensor, counts: Tensor | int, lowest: bool = False) -> Tensor:
    """Marks the highest (or `lowest`) scores of every row, the lowest index first among equals.

    Args:
        scores: [B, n]. What is not a number comes before all that is but infinity, which it equals.
        counts: [B] how many each row keeps, or one number for all.

    Returns:
        [B, n] bool.
    """
    return implementation("top_tokens", scores.device)(scores, counts, lowest)
