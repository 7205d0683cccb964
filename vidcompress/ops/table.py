"""Numbers that the host knows, for a device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def table(values: Sequence[Any], device: torch.device, dtype: torch.dtype = torch.long) -> Tensor:
    """A tensor of numbers, or of rows of them, on a device. The host does not wait for the copy, as it does when a
    tensor is made there.
    """
    return torch.tensor(values, dtype=dtype).to(device, non_blocking=True)
