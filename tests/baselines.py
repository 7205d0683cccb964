"""What the tests of the baselines share: recorded runs of their official codes, and clips to try a method on."""

from __future__ import annotations

from typing import Any

import torch
from reductions import same
from torch import Tensor

from vidcompress.method import Method
from vidcompress.tokens import Grid, Site, VideoTokens

PROJECTOR = Site.projector()
GRIDS: list[Grid] = [(1, 1, 1), (1, 6, 6), (2, 3, 3), (5, 1, 7), (8, 4, 4), (33, 3, 2)]
RATIOS = (0.001, 0.03, 0.1, 0.2041, 0.5, 0.77, 0.999)
KINDS = ("random", "slow", "still", "one colour", "all zero")


def video(features: Tensor, attention: Tensor, keys: Tensor, grid: Grid | None = None) -> VideoTokens:
    """From [T, P, C], [T, P] and [T, P, D]; the grid is one row a frame unless given."""
    signals = {"saliency.received": attention.flatten(), "tower_keys": keys.flatten(0, 1)}
    return VideoTokens(features.flatten(0, 1), grid or (*features.shape[:2], 1), signals=signals)


def clip(grid: Grid, kind: str = "random", seed: int = 0) -> VideoTokens:
    """A clip of 8 channels, keys of 6; in a still one nothing changes from frame to frame, attention neither."""
    t, p = grid[0], grid[1] * grid[2]
    draw = torch.Generator().manual_seed(seed)
    moving, attention = torch.randn(t, p, 14, generator=draw), torch.rand(t, p, generator=draw) / p
    picture = torch.randn(1, p, 14, generator=draw)
    values = {
        "random": moving,
        "slow": picture + 0.1 * moving,
        "still": picture.expand(t, -1, -1),
        "one colour": picture[:, :1].expand(t, p, -1),
        "all zero": torch.zeros(t, p, 14),
    }[kind]
    if kind in ("one colour", "all zero"):
        attention = torch.full((t, p), 1 / p)
    elif kind == "still":
        attention = attention[:1].expand(t, -1)
    return video(values[..., :8], attention, values[..., 8:], grid)


def assert_exact(build: type[Method], **settings: Any) -> None:
    """The count is max(1, floor(r * N)), for every grid, ratio and kind of clip, and what is handed on is finite."""
    for grid in GRIDS:
        n = grid[0] * grid[1] * grid[2]
        for ratio in RATIOS:
            method = build(retention_ratio=ratio, **settings)
            for kind in KINDS:
                tokens = clip(grid, kind)
                reduction = method.decide(tokens, PROJECTOR)
                assert len(reduction) == method.budget(grid) == max(1, int(ratio * n)), (grid, ratio, kind)
                assert reduction.apply(tokens.features).isfinite().all()
        whole = build(retention_ratio=1.0, **settings).decide(clip(grid), PROJECTOR)
        assert whole.is_identity


def assert_half_precision_decides_alike(method: Method) -> None:
    """Half precision changes what is stored, not what is decided of it; and nothing is left to chance."""
    grid = (6, 5, 4)
    tokens = clip(grid, "slow")
    signals = {name: signal.bfloat16() for name, signal in tokens.signals.items()}
    half = VideoTokens(tokens.features.bfloat16(), grid, signals=signals)
    floats = {name: signal.float() for name, signal in signals.items()}
    whole = VideoTokens(half.features.float(), grid, signals=floats)
    a, b = method.decide(half, PROJECTOR), method.decide(whole, PROJECTOR)
    assert same(a, b) and same(a, method.decide(half, PROJECTOR))
    assert torch.equal(a.apply(half.features), b.apply(whole.features).bfloat16())
