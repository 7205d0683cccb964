"""Tokens of which some are replaced by what their positions look like on average."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from vidcompress.ops.dispatch import implementation

__all__ = ["with_means"]


def with_means(tokens: Tensor, replaced: Tensor, segments: Sequence[tuple[int, int]]) -> Tensor:
    """The tokens, those that are replaced as the means of their positions over their segments (InfoMerge, eq. 11).

    Args:
        tokens: [T, P, C].
        replaced: [T, P] bool.
        segments: (start, end) of each, together all T frames.

    Returns:
        [T, P, C] fp32.
    """
    return implementation("with_means", tokens.device)(tokens, replaced, segments)
