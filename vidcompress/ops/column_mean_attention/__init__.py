"""Received attention: how much every token is looked at, on average over queries and heads."""

from __future__ import annotations

from torch import Tensor

from vidcompress.ops.dispatch import implementation

__all__ = ["column_mean_attention"]


def column_mean_attention(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """Mean over heads and queries of softmax(scale * q k^T), without the N x N matrix of all heads (`received`).

    Args:
        query, key: [B, H, N, d].
        scale: factor of the logits, usually d ** -0.5.

    Returns:
        [B, N] fp32; every row adds up to 1.
    """
    return implementation("column_mean_attention", query.device)(query, key, scale)
