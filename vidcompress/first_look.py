"""Frames are worth what the prompt looks at: budgets from a first look inside the LLM, for any method that takes frames
one by one (DyToK, Li et al., NeurIPS 2025, arXiv:2512.06866).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vidcompress.method import DEPTH, floor, setting
from vidcompress.tokens import Grid, VideoTokens


@dataclass(kw_only=True)
class FirstLook:
    """To be named first among the bases, before a per-frame method that asks its `shares` for the counts of frames.

    The signal `first_look`, which the method must add to its `needs`, is what the prompt's last token pays to every
    token of the uncompressed video.
    """

    layers: tuple[int, ...] | None = setting(
        None, "layers of the LLM that are looked at, counted from 0; null: the last third of them", low=0
    )
    upper_limit: int | None = setting(None, "the most tokens a frame may keep; null: all it has", low=1)
    assistant: str | None = setting(
        None, "checkpoint (folder or hub id) of a smaller model that looks instead, at layers of its own; null: none"
    )

    def looks(self, depth: int = DEPTH) -> tuple[int, ...]:
        """The layers that are looked at; of the model itself none if it has an assistant."""
        return () if self.assistant else self.layers_of(depth)

    def layers_of(self, depth: int) -> tuple[int, ...]:
        """The layers that are looked at, of whoever looks."""
        return tuple(range(depth * 2 // 3, depth)) if self.layers is None else self.layers

    def budget(self: Any, grid: Grid) -> int:
        """As without the look, but no more than the frames may keep."""
        return min(super().budget(grid), grid[0] * self._most(grid))  # type: ignore[misc]

    def shares(self: Any, tokens: VideoTokens, parts: int) -> list[int]:
        """Tokens kept of every frame, in proportion to what is paid to it."""
        paid = tokens.signal("first_look").double().view(parts, -1).mean(1)
        return frame_budgets(paid.tolist(), self.budget(tokens.grid), self._most(tokens.grid))

    def _most(self, grid: Grid) -> int:
        per_frame = grid[1] * grid[2]
        return per_frame if self.upper_limit is None else min(self.upper_limit, per_frame)


def frame_budgets(weights: Sequence[float], total: int, most: int) -> list[int]:
    """Shares `total` tokens out among frames in proportion to their weights.

    Shares are rounded down, and the largest remainders up. What a frame cannot hold goes to the others, one token a
    frame and round, the heaviest first.

    Args:
        weights: one a frame, 0 or more; all 0 are all equal.
        total: tokens to share out.
        most: what a frame can hold.

    Raises:
        ValueError: the frames cannot hold so many.
    """
    if total > most * len(weights):
        raise ValueError(f"{total} tokens do not fit into {len(weights)} frames of at most {most}")
    whole = sum(weights)
    parts = [total * weight / whole if whole else total / len(weights) for weight in weights]
    counts = [floor(part) for part in parts]
    by_remainder = sorted(range(len(parts)), key=lambda f: (round(counts[f] - parts[f], 9), f))
    for f in by_remainder[: total - sum(counts)]:
        counts[f] += 1
    counts = [min(count, most) for count in counts]
    heaviest = sorted(range(len(weights)), key=lambda f: (-weights[f], f))
    while left := total - sum(counts):
        for f in [f for f in heaviest if counts[f] < most][:left]:
            counts[f] += 1
    return counts
