from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

CHUNK_ELEMENTS = 4 << 20
"""Cosines that exist at once."""


def components(vectors: Tensor, threshold: float) -> Tensor:
    unit = normalize(vectors.float(), dim=1, eps=1e-30)
    n = len(unit)
    label = torch.arange(n, device=unit.device)
    step = max(1, min(1024, CHUNK_ELEMENTS // max(1, n)))
    for start in range(0, n, step):
        linked = unit[start : start + step] @ unit[start:].T > threshold
        linked &= label[start : start + step, None] != label[start:]  # what is together already tells nothing new
        row, column = linked.nonzero(as_tuple=True)
        label = _joined(label, row + start, column + start)
    return label


def _joined(label: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Labels after the components of every a and b were joined; a label is the lowest index of its component."""
    while a.numel():
        low, high = torch.minimum(label[a], label[b]), torch.maximum(label[a], label[b])
        label = label.scatter_reduce(0, high, low, "amin")
        while not torch.equal(label[label], label):
            label = label[label]
        apart = label[a] != label[b]
        a, b = a[apart], b[apart]
    return label
