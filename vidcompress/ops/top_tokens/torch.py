from __future__ import annotations

import torch
from torch import Tensor


def top_tokens(scores: Tensor, counts: Tensor | int, lowest: bool = False) -> Tensor:
    scores = (-scores if lowest else scores).nan_to_num(torch.inf, torch.inf, -torch.inf)
    order = scores.argsort(dim=-1, descending=True, stable=True)
    rank = torch.arange(scores.shape[-1], device=scores.device).expand_as(order)
    limit = counts.to(scores.device, non_blocking=True)[:, None] if isinstance(counts, Tensor) else counts
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, order, rank < limit)
