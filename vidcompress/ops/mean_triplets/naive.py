from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def mean_triplets(replaced: Tensor, segments: Sequence[tuple[int, int]]) -> tuple[Tensor, Tensor, Tensor]:
    p, device = replaced.shape[1], replaced.device
    token = replaced.flatten().nonzero().squeeze(1)
    start, end = (
        torch.tensor([span for span in segments for _ in range(*span)], device=device).view(-1, 2)[token // p].T
    )
    each = end - start
    which = torch.arange(len(token), device=device).repeat_interleave(each)
    step = torch.arange(len(which), device=device) - (each.cumsum(0) - each)[which]
    source = (start[which] + step) * p + (token % p)[which]
    return token[which], source, 1 / each[which].float()
