from __future__ import annotations

import torch
from torch import Tensor


def standardise(values: Tensor, eps: float = 1e-6) -> Tensor:
    """(x - mean) / population standard deviation, or 0 if that is below `eps`: nothing to tell apart (D11).

    Args:
        values: [K], one number a segment; fp64 keeps rounding below `eps`.

    Returns:
        [K] in the dtype of `values`.
    """
    std = values.std(correction=0)
    return torch.where(std < eps, 0.0, (values - values.mean()) / std.clamp_min(1e-30))
