from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize


def adjacent_difference(tokens: Tensor, window: int = 4) -> Tensor:
    """Mean of 1 - cos between neighbouring frames at the same position (InfoMerge's Table 5; docs/decisions.md, D13).

    Args:
        tokens: [L, P, C], the frames of one segment, at least 2.
        window: frames are compared within windows of so many, at least 2, as in DyCoke.

    Returns:
        [P] fp32, exactly 0 for a position that never changes.
    """
    pairs = [i for i in range(tokens.shape[0] - 1) if (i + 1) % window]
    unit = normalize(tokens.float(), dim=-1, eps=1e-30)
    after, before = unit[[i + 1 for i in pairs]], unit[pairs]
    change = (after - before).square().sum(-1) / 2  # 1 - cos of unit vectors, without cancellation
    appears = after.any(-1) != before.any(-1)  # a zero vector is like nothing but itself
    return torch.where(appears, 1.0, change).mean(0)
