"""The sparse map that puts the means of positions over their segments in the place of some tokens."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from vidcompress.ops.dispatch import implementation

__all__ = ["mean_triplets"]


def mean_triplets(replaced: Tensor, segments: Sequence[tuple[int, int]]) -> tuple[Tensor, Tensor, Tensor]:
    """What `with_means` does, as triplets (InfoMerge, eq. 11).

    Args:
        replaced: [T, P] bool.
        segments: (start, end) of each, in order, together all T frames.

    Returns:
        (token, source, weight), each [E]: flat indices t * P + p, tokens ascending, and fp32 weights, 1 over the length
        of the token's segment.
    """
    return implementation("mean_triplets", replaced.device)(replaced, segments)
