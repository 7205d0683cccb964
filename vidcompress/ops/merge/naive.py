from __future__ import annotations

import torch
from torch import Tensor


def merge(features: Tensor, keep: Tensor, slot: Tensor, source: Tensor, weight: Tensor) -> Tensor:
    out = []
    for k in range(keep.numel()):
        mine = slot == k
        if mine.any():
            mixed = weight[mine, None].double() * features[source[mine]].double()
            out.append(mixed.sum(0).to(features.dtype))
        else:
            out.append(features[keep[k]])
    return torch.stack(out)
