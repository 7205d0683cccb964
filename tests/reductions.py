"""A reduction as tests look at it: as a matrix, frame by frame, bit for bit."""

from __future__ import annotations

import torch
from torch import Tensor

from vidcompress.tokens import Grid, Reduction


def dense(reduction: Reduction) -> Tensor:
    """[K, N] fp64."""
    out = torch.zeros(len(reduction), reduction.num_source, dtype=torch.float64)
    own = torch.ones(len(reduction), dtype=torch.bool)
    if reduction.slot is not None:
        assert reduction.source is not None and reduction.weight is not None
        out.index_put_((reduction.slot, reduction.source), reduction.weight.double(), accumulate=True)
        own[reduction.slot] = False
    out[own, reduction.keep[own]] = 1
    return out


def same(a: Reduction, b: Reduction) -> bool:
    """Bit for bit."""
    columns = [(getattr(a, name), getattr(b, name)) for name in ("keep", "slot", "source", "weight")]
    return all((x is None and y is None) or torch.equal(x, y) for x, y in columns)


def per_frame(reduction: Reduction, grid: Grid) -> list[int]:
    """Tokens kept of every frame."""
    return (reduction.keep // (grid[1] * grid[2])).bincount(minlength=grid[0]).tolist()
