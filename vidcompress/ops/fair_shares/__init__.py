"""A budget shared out among groups of tokens."""

from vidcompress.ops.fair_shares.naive import fair_shares

__all__ = ["fair_shares"]
