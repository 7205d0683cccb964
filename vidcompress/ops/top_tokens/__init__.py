"""Picking the highest scores of each row."""

from vidcompress.ops.top_tokens.naive import top_tokens

__all__ = ["top_tokens"]
