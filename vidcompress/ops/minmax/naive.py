from __future__ import annotations

import torch
from torch import Tensor


def minmax(values: Tensor) -> Tensor:
    """(x - min) / (max - min), all zeros where max = min.

    Args:
        values: [n], at least one.

    Returns:
        [n] fp64 in [0, 1].
    """
    x = values.double()
    low, high = x.amin(), x.amax()
    return torch.where(high > low, (x - low) / (high - low), 0.0)
