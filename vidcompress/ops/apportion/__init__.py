"""Sharing out a whole number of tokens."""

from vidcompress.ops.apportion.naive import apportion

__all__ = ["apportion"]
