"""Recorded runs of the official codes of baselines (golden/README.md), and clips to try methods on."""

from __future__ import annotations

import torch
from torch import Tensor

from vidcompress.method import Method
from vidcompress.tokens import Grid, VideoTokens


def clip(grid: Grid, kind: str = "slow", channels: int = 8, seed: int = 0) -> VideoTokens:
    """Pictures that hardly move, are unlike each other, are one picture, or tokens that are all equal."""
    t, p = grid[0], grid[1] * grid[2]
    draw = torch.Generator().manual_seed(seed)
    first = torch.randn(1, p, channels, generator=draw)
    moving = torch.randn(t, p, channels, generator=draw)
    kinds = {"slow": first + 0.3 * moving, "cuts": moving, "still": first.expand(t, -1, -1)}
    features = kinds.get(kind, first[:, :1].expand(t, p, -1))
    text = torch.randn(5, channels, generator=draw)
    return VideoTokens(features.flatten(0, 1), grid, signals={"text_hidden": text})


KINDS = ["slow", "cuts", "still", "equal"]
GRIDS: list[Grid] = [(1, 1, 1), (1, 4, 4), (2, 1, 3), (5, 1, 7), (9, 2, 2), (33, 2, 1)]
RATIOS = [0.01, 0.1, 0.29, 0.5, 0.83, 1.0]


def answers(method: Method, tokens: VideoTokens) -> tuple[list[int], Tensor]:
    """What it keeps at its only site, and the vectors."""
    (site,) = method.sites()
    reduction = method.decide(tokens, site)
    return reduction.keep.tolist(), reduction.apply(tokens.features)
