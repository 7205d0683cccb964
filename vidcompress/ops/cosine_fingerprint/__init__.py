"""Temporal fingerprint difference (TFD): how much a position's pattern of similarities changes from frame to frame."""

from __future__ import annotations

from torch import Tensor

from vidcompress.ops.dispatch import implementation

__all__ = ["cosine_fingerprint"]


def cosine_fingerprint(tokens: Tensor) -> Tensor:
    """InfoMerge, eq. 1-2: the mean absolute difference of neighbouring rows of each position's cosine matrix.

    Args:
        tokens: [L, P, C], the frames of one segment.

    Returns:
        [P] fp32, 0 for a position that never changes and for L = 1. A zero token has cosine 0 with everything.
    """
    return implementation("cosine_fingerprint", tokens.device)(tokens)
