"""First half of DyCoke, temporal merging (Tao et al., CVPR 2025, arXiv:2411.15024): of frames, keep what changed.

In every window of four frames the first stays whole. The others keep the tokens least like those at their position: the
second like the first, the fourth like the third, the third like the first. What stays is a copy; nothing is mixed.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch

from vidcompress import ops
from vidcompress.method import Method, floor, setting
from vidcompress.ops.table import table
from vidcompress.tokens import Grid, Reduction, Site, VideoTokens

WINDOW = 4
"""Frames of a window."""

FRAMES = 32
"""Of whole windows, whose tokens are copied at once."""


@dataclass(kw_only=True)
class DyCokeOuter(Method):
    retention_ratio: float = setting(
        0.475, "fraction of the video tokens that is kept; the whole frames alone are 1/4", low=0.25, high=1
    )
    k: float | None = setting(
        None, "K: share of a frame's tokens that is pruned; null: what gives retention_ratio", low=0, high=1
    )
    official: bool = setting(False, "reproduce the official code, its lost last frame included")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.k is not None:  # then the ratio is what k makes it, in whole windows
            self.retention_ratio = 1 - (WINDOW - 1) / WINDOW * self.k

    def budget(self, grid: Grid) -> int:
        return sum(self.frame_budgets(grid))

    def frame_budgets(self, grid: Grid) -> list[int]:
        """Tokens kept of every frame."""
        t, p = grid[0], grid[1] * grid[2]
        pruned = [f for f in range(t) if f % WINDOW]
        if self.official:  # the last window's third frame stays whole, and of an odd number of frames none of the last
            pruned = [f for f in pruned if f % WINDOW != 2 or f < t - 2]
        kept = [p] * t
        if self.k is not None or self.official:
            k = (1 - self.retention_ratio) * WINDOW / (WINDOW - 1) if self.k is None else self.k
            share = [int((1 - k) * p) if self.official else floor((1 - k) * p)] * len(pruned)
        else:
            whole = p * (t - len(pruned))
            rest = max(0, floor(self.retention_ratio * t * p) - whole)
            share = ops.apportion(rest, [1] * len(pruned), [p] * len(pruned))
        for f, count in zip(pruned, share, strict=True):
            kept[f] = count
        if self.official and t % 2 and t > 1:
            kept[-1] = 0
        return kept

    def reduce(self, tokens: VideoTokens, site: Site) -> Reduction:
        t, x = tokens.grid[0], tokens.frames
        # Each frame is compared with the one before it in the order 1, 0, 2, 3 of a window.
        swapped = [f ^ 1 if f % WINDOW < 2 and f ^ 1 < t else f for f in range(t)]
        change = torch.zeros(x.shape[:2], dtype=torch.float64, device=x.device)
        for start in range(0, t, FRAMES):
            own = swapped[start : start + FRAMES]
            pairs = [(i, max(pair)) for i, pair in enumerate(pairwise(own)) if pair[0] // WINDOW == pair[1] // WINDOW]
            if pairs:
                at, pruned = table(pairs, x.device).T
                change[pruned] = ops.frame_change(x[table(own, x.device)])[at]  # 1 - cosine
        counts = torch.tensor(self.frame_budgets(tokens.grid))
        return Reduction.pruning(ops.top_tokens(change, counts).flatten())
