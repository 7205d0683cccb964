"""The tokens of a video that are unlike each other (the Unified paper's global retention pool)."""

from __future__ import annotations

import math

from torch import Tensor, int64

from vidcompress.ops.dispatch import implementation

__all__ = ["retention_pool"]


def retention_pool(tokens: Tensor, order: Tensor, threshold: float, size: int) -> Tensor:
    """Visits tokens in `order` and accepts those unlike everything accepted before (Unified, section 3.1, eq. 2).

    A token is accepted if its largest cosine to the pool is below the threshold; the first one always is. A cosine that
    reaches the threshold but for rounding (1e-12) counts as equal to it, so that at 1.0 copies are kept out, whatever
    their length. A zero token has cosine 0 with everything.

    Args:
        tokens: [N, C].
        order: [M] indices into `tokens`, the best first; it may leave tokens out.
        threshold: a cosine. Above 1 everything is accepted.
        size: most tokens to accept.

    Returns:
        [m] long, m <= min(size, M): the accepted indices in the order of their visit.

    Raises:
        ValueError: tokens or order of another shape, a size below 0, a threshold that is not a number.
        TypeError: an order that is not long.
    """
    if tokens.dim() != 2 or order.dim() != 1:
        raise ValueError(f"tokens must be [N, C] and order [M], got {list(tokens.shape)} and {list(order.shape)}")
    if order.dtype != int64:
        raise TypeError(f"order must hold indices (torch.long), got {order.dtype}")
    if math.isnan(threshold):
        raise ValueError("threshold must be a cosine, got nan: nothing compares with it")
    if size < 0:
        raise ValueError(f"size must be at least 0, got {size}: a pool cannot hold fewer than no tokens")
    return implementation("retention_pool", tokens.device)(tokens, order, threshold, size)
