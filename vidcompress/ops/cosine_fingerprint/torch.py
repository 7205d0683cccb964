from __future__ import annotations

import torch
from torch import Tensor

CHUNK_BYTES = 64 << 20
"""Workspace: fp32 copies of so many positions at once."""


def cosine_fingerprint(tokens: Tensor) -> Tensor:
    length, positions, channels = tokens.shape
    out = torch.zeros(positions, device=tokens.device)
    if length == 1:
        return out
    step = max(1, CHUNK_BYTES // (8 * length * channels + 4 * length * length))
    for p in range(0, positions, step):
        unit = tokens[:, p : p + step].transpose(0, 1).float()  # [p, L, C]
        unit = unit / unit.norm(dim=-1, keepdim=True).clamp_min(1e-30)
        # (x_i+1 - x_i) . x_j instead of the difference of two cosines near 1: it does not cancel, and frozen frames
        # give exactly 0.
        change = torch.bmm(unit[:, 1:] - unit[:, :-1], unit.transpose(1, 2))  # [p, L - 1, L]
        out[p : p + step] = change.abs_().mean((1, 2))
    return out
