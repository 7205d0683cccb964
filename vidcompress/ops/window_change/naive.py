from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

ROUNDING = 1e-6
"""As little change is rounding in fp32."""


def window_change(tokens: Tensor) -> Tensor:
    frames = tokens.shape[0]
    pairs = [(i, j) for i in range(frames) for j in range(i)]
    if not pairs:
        return torch.zeros(tokens.shape[1], dtype=torch.float64, device=tokens.device)
    unit = normalize(tokens.double(), dim=-1, eps=1e-300)
    zero = tokens.eq(0).all(-1)  # [L, P]
    cosines = [torch.where(zero[i] & zero[j], 1.0, (unit[i] * unit[j]).sum(-1)) for i, j in pairs]
    change = 1 - torch.stack(cosines).mean(0)
    return change.masked_fill(change < ROUNDING, 0)
