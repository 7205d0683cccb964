"""Normalised spectral entropies of all segments of a video."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from vidcompress.ops.dispatch import implementation

__all__ = ["spectral_entropies"]


def spectral_entropies(tokens: Tensor, segments: Sequence[tuple[int, int]]) -> Tensor:
    """`spectral_entropy` of the tokens of every segment, many at once where that is faster.

    Args:
        tokens: [T, P, C].
        segments: (start, end) of each.

    Returns:
        [K] fp64.
    """
    return implementation("spectral_entropies", tokens.device)(tokens, segments)
