"""The positions that are merged over the frames of their windows."""

from vidcompress.ops.steady_positions.naive import steady_positions

__all__ = ["steady_positions"]
