"""First-order change: how much a position differs from one frame to the next."""

from vidcompress.ops.adjacent_difference.naive import adjacent_difference

__all__ = ["adjacent_difference"]
