"""Normalised spectral entropy: how many directions a set of tokens spreads over."""

from __future__ import annotations

from torch import Tensor

from vidcompress.ops.dispatch import implementation

__all__ = ["spectral_entropy"]


def spectral_entropy(tokens: Tensor) -> Tensor:
    """InfoMerge, eq. 24-26: entropy of the squared singular values' shares, divided by log(min(n, C)). Not centred.

    Args:
        tokens: [n, C].

    Returns:
        fp64 scalar in [0, 1]; 0 for a single direction and for all-zero tokens.
    """
    return implementation("spectral_entropy", tokens.device)(tokens)
