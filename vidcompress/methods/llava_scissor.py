"""LLaVA-Scissor (Sun et al., 2025, arXiv:2506.21862): tokens that are connected by likeness, each group as one token.

In every frame the tokens are linked whose cosine is above tau, and every connected component becomes its mean. The
means of all frames are linked in the same way; a component of theirs becomes a representative, the mean of its means.
Last, every token of the video joins the representative that it is most like. The code takes a tau and keeps what comes
of it; without one, tau is searched once a video for the count nearest to `retention_ratio` and not above it.

Much slower than FastVID: means of all frames are compared with each other once for every tau that is tried (some ten),
and all tokens with all representatives. Memory grows linearly, though: likenesses exist within a frame, and in tiles.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vidcompress import ops
from vidcompress.method import Method, setting
from vidcompress.tokens import Grid, Reduction, Site, VideoTokens

TRIES = 24
"""Thresholds at which representatives are counted, at most."""

CLOSE = 0.99
"""The search ends with this part of the budget."""

STEP = 1e-5
"""They are multiples of this and below 1, so that rounding neither links equal tokens nor parts them."""

NONE = -2.0
"""A threshold that links all tokens."""


@dataclass(kw_only=True)
class LlavaScissor(Method):
    costly = "means of all frames compared with each other for every threshold that is tried"
    slow = True

    positions: Literal["keep", "renumber"] = setting("renumber", "the representatives are numbered anew")
    tau: float | None = setting(None, "two tokens are linked if their cosine is above this; null: by retention_ratio")

    @property
    def exact(self) -> bool:
        return False

    @property
    def loose(self) -> bool:
        return self.tau is not None

    def budget(self, grid: Grid) -> int:
        return super().budget(grid) if self.tau is None else math.prod(grid)

    def reduce(self, tokens: VideoTokens, site: Site) -> Reduction:
        x, (t, h, w) = tokens.features.float(), tokens.grid
        index = torch.arange(len(x), device=x.device)
        # 1. Links within frames, from which the components at any threshold follow.
        to, cosine = ops.linkage(tokens.frames)
        links = (to + index.view(t, h * w)[:, :1]).flatten(), cosine.flatten()
        tau = self._search(x, links, self.budget(tokens.grid)) if self.tau is None else self.tau
        # 2. Components within frames, then of their means; a component of these is a representative, their mean.
        first, group = _within(links, tau).unique(return_inverse=True)  # [M], [N]
        chosen, kind = ops.components(_means(x, group), tau).unique(return_inverse=True)  # [K], [M]
        keep, slot = first[chosen], kind[group]
        own = 1 / (group.bincount()[group] * kind.bincount()[slot]).float()
        # 3. Every token joins the representative that it is most like; that and what joins it weigh the same.
        representatives = Reduction.merging(keep, len(x), [(keep[slot], index, own)]).apply(x)
        joined = ops.nearest(x, representatives, "cosine")
        weight = 1 / (joined.bincount(minlength=len(keep)) + 1).float()
        parts = [(keep[slot], index, own * weight[slot]), (keep[joined], index, weight[joined])]
        return Reduction.merging(keep, len(x), parts, {"tau": tau, "within_frames": len(first)})

    def _search(self, x: Tensor, links: tuple[Tensor, Tensor], budget: int) -> float:
        """A threshold that leaves at most `budget` representatives, and nearly as many."""
        cosine = links[1][links[1].isfinite()].double().sort().values
        (low, few), (high, many), tau = (-1.0, budget / 8), (1.0, len(x)), NONE
        parted = budget - (len(x) - len(cosine))  # links that may be cut: no more representatives than groups
        if parted > 0:
            low = tau = _rounded(float(cosine[parted - 1]) - STEP)
        for number in range(TRIES):
            # By turns the middle of the links that are left, of the thresholds, and false position on log counts.
            inside = cosine[(cosine > low + STEP) & (cosine < high)]
            middle = (low + high) / 2
            if number % 3 == 0 and len(inside):
                middle = float(inside[len(inside) // 2])
            elif number % 3 == 2 and few < budget:
                middle = low + (high - low) * math.log(budget / few) / math.log(many / few)
            trial = _rounded(min(max(middle, low + STEP), high - STEP))
            if not low < trial < high:
                break
            _, group = _within(links, trial).unique(return_inverse=True)
            left = len(ops.components(_means(x, group), trial).unique())
            if left > budget:
                high, many = trial, left
            else:
                low, few, tau = trial, left, trial
            if CLOSE * budget <= left <= budget:
                break
        return tau


def _rounded(tau: float) -> float:
    return math.floor(tau / STEP + 1e-6) * STEP


def _within(links: tuple[Tensor, Tensor], tau: float) -> Tensor:
    """[N] for every token the first one of its component in its frame."""
    to, cosine = links
    index = torch.arange(len(to), device=to.device)
    root = torch.where(cosine > tau, to, index)
    while not torch.equal(root[root], root):
        root = root[root]
    return torch.full_like(root, len(root)).scatter_reduce(0, root, index, "amin")[root]


def _means(x: Tensor, group: Tensor) -> Tensor:
    """[M, C] the mean of every group of [N, C]."""
    index, weight = torch.arange(len(x), device=x.device), 1 / group.bincount()[group].float()
    return Reduction(torch.arange(int(group.max()) + 1, device=x.device), len(x), group, index, weight).apply(x)
