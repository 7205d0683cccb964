"""The anchor that a token joins."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from vidcompress.ops.dispatch import implementation

__all__ = ["nearest"]


def nearest(tokens: Tensor, anchors: Tensor, measure: Literal["euclidean", "cosine"]) -> Tensor:
    """Index of the anchor of smallest Euclidean distance, or of highest cosine, for every token.

    Equals go to the lowest index; a zero vector has cosine 0 with everything.

    Args:
        tokens: [N, C].
        anchors: [K, C], K at least 1.

    Returns:
        [N] long.

    Raises:
        ValueError: no anchor, another number of channels, another `measure`.
    """
    if measure not in ("euclidean", "cosine"):
        raise ValueError(f"measure must be 'euclidean' or 'cosine', got {measure!r}")
    if not anchors.shape[0]:
        raise ValueError(f"anchors is empty, got shape {list(anchors.shape)}: a token needs at least one to join")
    if tokens.shape[1] != anchors.shape[1]:
        raise ValueError(
            f"tokens and anchors need the same number of channels, got {tokens.shape[1]} and {anchors.shape[1]}"
        )
    return implementation("nearest", tokens.device)(tokens, anchors, measure)
