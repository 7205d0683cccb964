"""Tokens as far from each other as can be: the greedy answer to the max-min diversity problem (DivPrune)."""

from __future__ import annotations

from torch import Tensor

from vidcompress.ops.dispatch import implementation

__all__ = ["farthest_points"]


def farthest_points(tokens: Tensor, count: int, period: int = 1) -> Tensor:
    """Picks tokens one by one, each time the one whose nearest picked token is farthest, by 1 - cosine.

    The first is the token that is farthest from its nearest other. Ties go to the lowest index; distances that agree to
    1e-9 are tied, because the rounding of fp64 must not choose between copies. When only copies of picked tokens are
    left they follow in order. A zero vector has cosine 0 with everything.

    Args:
        tokens: [N, C].
        count: how many to pick, 0 to N.
        period: tokens this many places apart tend to be alike (those of a frame); it changes the speed only.

    Returns:
        [count] long, in the order of the picks.

    Raises:
        ValueError: tokens that are no matrix, another count, a period below 1.
    """
    if tokens.dim() != 2:
        raise ValueError(f"tokens must be [N, C], got shape {list(tokens.shape)}")
    if not 0 <= count <= len(tokens):
        raise ValueError(f"count must be 0 to all {len(tokens)} tokens, got {count}")
    if period < 1:
        raise ValueError(f"period must be at least 1 token, got {period}")
    return implementation("farthest_points", tokens.device)(tokens, count, period)
