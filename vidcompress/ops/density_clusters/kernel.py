"""Clusters by the kernels of other ops, and two of their own: one says which cluster a token is in and counts, the
other how large that cluster is. The host waits for what density_peaks waits for, and for the number of members unless
it knows that.
"""

from __future__ import annotations

from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from vidcompress.ops.density_clusters.naive import Clusters
from vidcompress.ops.density_peaks.kernel import density_peaks
from vidcompress.ops.kernel_bisect import _first_not_before
from vidcompress.ops.launch import INTERPRETED, launch
from vidcompress.ops.nearest.kernel import nearest
from vidcompress.ops.places.kernel import places

MEMBERS = 1 << 14 if INTERPRETED else 1024
"""Tokens of a program: the interpreter takes as long for few as for many."""


def density_clusters(
    tokens: Tensor,
    count: int,
    neighbours: int,
    ties: Literal["index", "strict"] = "index",
    candidates: Tensor | None = None,
    members: int | None = None,
) -> Clusters:
    n, device = len(tokens), tokens.device
    taken = torch.ones(n, dtype=torch.bool, device=device) if candidates is None else candidates
    peaks = density_peaks(tokens[None], taken[None], neighbours, ties)[0]
    centre = peaks.argsort(descending=True, stable=True)[:count].sort().values
    if candidates is None:
        member, own = torch.arange(n, device=device), tokens
    else:
        member = taken.nonzero().squeeze(1) if members is None else places(taken[None], [members])
        own = tokens[member]
    near = nearest(own, tokens[centre], "euclidean")
    sizes = torch.zeros(count, dtype=torch.int32, device=device)
    joined, size = torch.empty_like(member), torch.empty(len(member), dtype=torch.float32, device=device)
    grid = (triton.cdiv(len(member), MEMBERS),)
    launch(
        _assign, grid, member, centre, near, joined, sizes, len(member), count, count.bit_length(),
        B=MEMBERS, num_warps=4,
    )  # fmt: skip
    launch(_size, grid, near, sizes, size, len(member), B=MEMBERS, num_warps=4)
    return Clusters(member, joined, size, centre)


@triton.jit
def _assign(member, centre, near, joined, sizes, count, centres, steps, B: tl.constexpr):
    """The nearest centre's cluster, of a centre its own; `near` is told which."""
    i = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    token = tl.load(member + i, mask=i < count, other=0)
    none = tl.zeros_like(i)
    low = _first_not_before(centre, token, none, none + centres, steps, False)
    own = (low < centres) & (tl.load(centre + low, mask=low < centres, other=-1) == token)
    which = tl.where(own, low, tl.load(near + i, mask=i < count, other=0))
    tl.store(near + i, which, mask=i < count)
    tl.store(joined + i, tl.load(centre + which, mask=i < count, other=0), mask=i < count)
    tl.atomic_add(sizes + which, 1, mask=i < count)


@triton.jit
def _size(near, sizes, size, count, B: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    which = tl.load(near + i, mask=i < count, other=0)
    tl.store(size + i, tl.load(sizes + which, mask=i < count, other=0).to(tl.float32), mask=i < count)
