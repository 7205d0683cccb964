from __future__ import annotations

import torch
from torch import Tensor


def top_tokens(scores: Tensor, counts: Tensor | int) -> Tensor:
    chosen = torch.zeros_like(scores, dtype=torch.bool)
    for b, row in enumerate(scores.tolist()):
        order = sorted(range(len(row)), key=lambda i: -row[i])  # stable: the lowest index first
        chosen[b, order[: int(counts[b]) if isinstance(counts, Tensor) else counts]] = True
    return chosen
