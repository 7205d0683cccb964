from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize


def components(vectors: Tensor, threshold: float) -> Tensor:
    unit = normalize(vectors.float(), dim=1, eps=1e-30)
    label = torch.full((len(unit),), -1, dtype=torch.long, device=unit.device)
    for first in range(len(unit)):
        reached = [first] if label[first] < 0 else []
        while reached:
            linked = (unit @ unit[reached.pop()] > threshold) & (label < 0)
            linked[first] |= label[first] < 0
            label[linked] = first
            reached += linked.nonzero().squeeze(1).tolist()
    return label
