"""The likeness of tokens to the most similar of others."""

from vidcompress.ops.max_cosine.naive import max_cosine

__all__ = ["max_cosine"]
