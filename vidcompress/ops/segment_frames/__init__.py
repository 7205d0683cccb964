"""Dynamic temporal segmentation (DySeg)."""

from vidcompress.ops.segment_frames.naive import segment_frames

__all__ = ["segment_frames"]
