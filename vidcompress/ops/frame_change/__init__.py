"""How much every token differs from the one at its position in the frame before."""

from vidcompress.ops.frame_change.naive import frame_change

__all__ = ["frame_change"]
