"""Scores on a common scale."""

from vidcompress.ops.minmax.naive import minmax

__all__ = ["minmax"]
