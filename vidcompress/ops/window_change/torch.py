from __future__ import annotations

import torch
from torch import Tensor

from vidcompress.ops.window_change.naive import ROUNDING


def window_change(tokens: Tensor) -> Tensor:
    frames, positions = tokens.shape[:2]
    if frames < 2:
        return torch.zeros(positions, dtype=torch.float64, device=tokens.device)
    # All pairs at once: the cosines of all frames with all add up to the squared length of the unit vectors' sum.
    total = torch.zeros(tokens.shape[1:], dtype=torch.float32, device=tokens.device)
    zeros = torch.zeros(positions, dtype=torch.float64, device=tokens.device)
    for frame in tokens:
        x = frame.float()
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        total.addcdiv_(x, length.clamp_min(torch.finfo(torch.float32).tiny))
        zeros += length.squeeze(-1) == 0
    square = total.double().square().sum(-1)
    change = 1 - (square - (frames - zeros) + zeros * (zeros - 1)) / (frames * (frames - 1))
    return change.masked_fill(change < ROUNDING, 0)
