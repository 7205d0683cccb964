from __future__ import annotations

import torch
from torch import Tensor


def steady_positions(change: Tensor, below: float, lengths: Tensor, room: int) -> Tensor:
    """Marks what is merged over time: positions that change little, the steadiest first, up to a number of tokens.

    A position that is merged over a window of L frames removes L - 1 tokens. Where those that change less than `below`
    would remove more than `room`, the ones that change most stay as they are, among equals the later ones, so that a
    budget can be kept that merging over time alone would undercut (docs/decisions.md, D3).

    Args:
        change: [W, P], how much each position changes over each window.
        below: what counts as steady.
        lengths: [W] frames of every window; in one of a single frame nothing is steady.
        room: most tokens that may be removed.

    Returns:
        [W, P] bool.
    """
    removed = (lengths[:, None] - 1).expand_as(change).flatten()
    steady = (change.flatten() < below) & (removed > 0)
    order = change.flatten().masked_fill(~steady, torch.inf).argsort(stable=True)
    within = (removed * steady)[order].cumsum(0) <= room
    return (torch.zeros_like(steady).scatter_(0, order, within) & steady).view_as(change)
