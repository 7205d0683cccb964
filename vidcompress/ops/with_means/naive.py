from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def with_means(tokens: Tensor, replaced: Tensor, segments: Sequence[tuple[int, int]]) -> Tensor:
    seen = tokens.to(torch.float32, copy=True)
    for start, end in segments:
        own = seen[start:end]
        own.copy_(torch.where(replaced[start:end, :, None], own.mean(0), own))
    return seen
