from __future__ import annotations

import math

import torch
from torch import Tensor


def top_tokens(scores: Tensor, counts: Tensor | int, lowest: bool = False) -> Tensor:
    chosen = torch.zeros_like(scores, dtype=torch.bool)
    for b, row in enumerate(scores.tolist()):
        first = [-math.inf if math.isnan(x) else x if lowest else -x for x in row]
        order = sorted(range(len(row)), key=first.__getitem__)  # stable: the lowest index first
        chosen[b, order[: int(counts[b]) if isinstance(counts, Tensor) else counts]] = True
    return chosen
