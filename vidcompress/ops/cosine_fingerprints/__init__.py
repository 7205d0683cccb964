"""Temporal fingerprint differences of all segments of a video."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from vidcompress.ops.dispatch import implementation

__all__ = ["cosine_fingerprints"]


def cosine_fingerprints(tokens: Tensor, segments: Sequence[tuple[int, int]]) -> Tensor:
    """`cosine_fingerprint` of every segment, all of them at once where that is faster.

    Args:
        tokens: [T, P, C].
        segments: (start, end) of each.

    Returns:
        [K, P] fp32.
    """
    return implementation("cosine_fingerprints", tokens.device)(tokens, segments)
