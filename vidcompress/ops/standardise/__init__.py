"""z-scores of a few numbers."""

from vidcompress.ops.standardise.naive import standardise

__all__ = ["standardise"]
