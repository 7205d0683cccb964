"""Reports made by hand: random lawful reductions of a clip of random pixels, no model behind them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from vidcompress.measure import Result
from vidcompress.report import Report, Side, TokenMap
from vidcompress.report.frames import Field
from vidcompress.tokens import Grid, Reduction, Site
from vidcompress.trace import Prompt, Step
from vidcompress.video import Video


def step(reduction: Reduction, grid: Grid, site: Site | None = None, method: str = "mine", **facts: Any) -> Step:
    """A recorded step of a video's first row."""
    counts = {"before": reduction.num_source, "after": len(reduction), "newlines": 1, "seconds": 0.5}
    return Step(0, 0, site or Site.projector(), method, grid, **(counts | facts), reduction=reduction)


def mixing(draw: torch.Generator, n: int, k: int, notes: dict[str, Any] | None = None) -> Reduction:
    """k of n tokens are kept; half of them are mixed from themselves and from a third of the others."""
    order = torch.randperm(n, generator=draw)
    keep, others = order[:k].sort().values, order[k : k + max(1, (n - k) // 3)]
    mixed = keep[: max(1, k // 2)]
    survivor = torch.cat([mixed, mixed[torch.arange(len(others)) % len(mixed)]])
    source = torch.cat([mixed, others])
    weight = torch.rand(len(source), generator=draw) + 0.1
    return Reduction.merging(keep, n, [(survivor, source, weight)], notes)


def steps_of(grid: Grid, seed: int = 0) -> list[Step]:
    """Merging before the LLM, in two segments; nothing at layer 1; pruning at 2; merging again at 4."""
    draw, n = torch.Generator().manual_seed(seed), grid[0] * grid[1] * grid[2]
    a, b, c = n // 2, n // 3, n // 5
    first = mixing(draw, n, a, {"segments": [(0, 1), (1, grid[0])]})
    pruned = Reduction.pruning(torch.rand(a, generator=draw).argsort().argsort() < b)
    return [
        step(first, grid),
        step(Reduction.identity(a), grid, Site.decoder(1)),
        step(pruned, grid, Site.decoder(2)),
        step(mixing(draw, b, c), grid, Site.decoder(4)),
    ]


def result(**facts: Any) -> Result:
    """Measured by nobody."""
    plain: dict[str, Any] = {name: 1.0 for name in Result.__dataclass_fields__}
    plain |= {"compression": "none", "settings": [], "head": None, "answer": "a red square", "device": "cpu"}
    plain |= {"dtype": "float32", "frames": 4, "tokens_before": 1, "tokens_after": 1, "prompt_before": 9}
    return Result(**(plain | {"prompt_after": 9, "new_tokens": 1} | facts))


def side(steps: list[Step], letter: str = "A", layers: int = 6, **facts: Any) -> Side:
    """A side of a report, its prompt of so many layers."""
    before, after = steps[0].before, steps[-1].after
    lengths = [9 + next(s.after for s in reversed(steps) if s.site.layer <= i) for i in range(layers)]
    record = Prompt(steps, before + 9, lengths[0], 0.1, 0.0, [{"method": "mine", "strength": 0.5}], None, lengths)
    found = result(tokens_before=before, tokens_after=after, **facts)
    return Side(letter, f"mine @ {letter}", found, record, TokenMap.of(steps))


def sample(grid: Grid = (4, 3, 5), frames: int | None = None, prompt: str = "What?", **facts: Any) -> Report:
    """Two sides: several stages, and pruning alone. `frames` more than the grid's are shared two by two."""
    n = grid[0] * grid[1] * grid[2]
    pixels = np.random.default_rng(0).integers(0, 256, (frames or grid[0], 36, 60, 3), np.uint8)
    video = Video(pixels, 4.0, len(pixels), len(pixels) / 4, tuple(range(len(pixels))), "a/clip.mp4")
    sides = [side(steps_of(grid), "A", **facts), side([step(Reduction.pruning(torch.arange(n) % 3 == 1), grid)], "B")]
    plain = result(tokens_before=n, tokens_after=n, prompt_before=n + 9)
    return Report(video, prompt, "tiny", "", plain, sides, Field())
