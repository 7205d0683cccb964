from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from vidcompress.ops.cosine_fingerprint import cosine_fingerprint


def cosine_fingerprints(tokens: Tensor, segments: Sequence[tuple[int, int]]) -> Tensor:
    out = tokens.new_zeros(len(segments), tokens.shape[1]).float()
    for k, (start, end) in enumerate(segments):
        out[k] = cosine_fingerprint(tokens[start:end])
    return out
