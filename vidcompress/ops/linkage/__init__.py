"""Single linkage within every frame."""

from vidcompress.ops.linkage.naive import linkage

__all__ = ["linkage"]
