from __future__ import annotations

import torch
from torch import Tensor

ROUNDING = 1e-13
"""As little 1 - cos is rounding in fp64: the tokens are equal, or copies of another length."""

CHUNK_FRAMES = 4
"""Frames whose fp64 copies exist at once."""


def frame_change(tokens: Tensor) -> Tensor:
    """1 - cos between every token and the one at its position in the frame before (HieraVid, eq. 1).

    Args:
        tokens: [T, P, C].

    Returns:
        [T - 1, P] fp64; exactly 0 where two tokens are equal up to their length, 1 where one of them is zero and the
        other is not (docs/decisions.md, D12).
    """
    changes = [tokens.new_empty(0, tokens.shape[1], dtype=torch.float64)]
    for start in range(1, tokens.shape[0], CHUNK_FRAMES):
        chunk = tokens[start - 1 : start + CHUNK_FRAMES]
        x = chunk.double()
        length = torch.linalg.vector_norm(x, dim=-1)  # [F, P]
        cosine = torch.linalg.vecdot(x[1:], x[:-1]) / (length[1:] * length[:-1]).clamp_min(1e-300)
        change = 1 - cosine
        still = (change < ROUNDING) | (length[1:] + length[:-1] == 0)
        changes.append(change.masked_fill(still, 0))
    return torch.cat(changes)
