"""Sharing out tokens among frames that are worth the same."""

from vidcompress.ops.even_shares.naive import even_shares

__all__ = ["even_shares"]
