"""The kernel of one segment, launched for all."""

from __future__ import annotations

from vidcompress.ops.cosine_fingerprint.kernel import cosine_fingerprints

__all__ = ["cosine_fingerprints"]
