from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize


def cosine_fingerprint(tokens: Tensor) -> Tensor:
    length, positions, _ = tokens.shape
    out = torch.zeros(positions, dtype=torch.float32, device=tokens.device)
    if length == 1:
        return out
    for p in range(positions):
        unit = normalize(tokens[:, p].double(), dim=-1, eps=1e-30)  # [L, C]
        fingerprint = (unit[:, None] * unit).sum(-1)  # [L, L]; a product of matrices may round equal rows differently
        out[p] = (fingerprint[1:] - fingerprint[:-1]).abs().mean()
    return out
