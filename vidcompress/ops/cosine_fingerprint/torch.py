from __future__ import annotations

import torch
from torch import Tensor

CHUNK_BYTES = {"cpu": 4 << 20, "cuda": 64 << 20}
"""Workspace: fp32 copies of so many positions at once."""


def cosine_fingerprint(tokens: Tensor) -> Tensor:
    length, positions, channels = tokens.shape
    out = torch.zeros(positions, dtype=torch.float32, device=tokens.device)
    if length == 1:
        return out
    room = CHUNK_BYTES.get(tokens.device.type, 64 << 20)
    step = max(1, room // (8 * length * channels + 4 * length * length))
    for p in range(0, positions, step):
        x = tokens[:, p : p + step].transpose(0, 1).float()  # [p, L, C]
        norm = x.norm(dim=-1, keepdim=True)
        unit = x / norm.clamp_min(1e-30)
        # (u_i+1 - u_i) . u_j, not the difference of two cosines near 1, which cancels.
        change = torch.bmm(_unit_steps(x, norm, unit), unit.transpose(1, 2))  # [p, L - 1, L]
        out[p : p + step] = change.abs_().mean((1, 2))
    return out


def _unit_steps(x: Tensor, norm: Tensor, unit: Tensor) -> Tensor:
    """u_i+1 - u_i of x [p, L, C]: exactly 0 where frames are bitwise equal.

    Where the step d = x_i+1 - x_i is small, the difference of the rounded units is noise; there it is formed as
    d / |x_i+1| - u_i * (|x_i+1| - |x_i|) / |x_i+1|, the norms' difference from d as well.
    """
    before, after = norm[:, :-1], norm[:, 1:]
    step = x[:, 1:] - x[:, :-1]
    growth = (step * (x[:, 1:] + x[:, :-1])).sum(-1, keepdim=True) / (before + after).clamp_min(1e-30)
    careful = (step - unit[:, :-1] * growth) / after.clamp_min(1e-30)
    small = step.norm(dim=-1, keepdim=True) < 0.1 * torch.minimum(before, after)
    return torch.where(small, careful, unit[:, 1:] - unit[:, :-1])
