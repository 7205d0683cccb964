from __future__ import annotations

import torch
from torch import Tensor


def top_tokens(scores: Tensor, counts: Tensor | int) -> Tensor:
    """Marks the highest scores of every row, the lowest index first among equals.

    Args:
        scores: [B, n].
        counts: [B] how many each row keeps, or one number for all.

    Returns:
        [B, n] bool.
    """
    order = scores.argsort(dim=-1, descending=True, stable=True)
    rank = torch.arange(scores.shape[-1], device=scores.device).expand_as(order)
    limit = counts.to(scores.device)[:, None] if isinstance(counts, Tensor) else counts
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, order, rank < limit)
