"""Outer half of HoliTom: merge over time what hardly moves, in windows that save most, then thin out what is left.

Windows are found by dynamic programming over how many tokens they save. A position that is static throughout its window
becomes its mean; static tokens of a window are clustered by density peaks, of the others each frame keeps the most
attended. `official` reproduces the code's rounding, with its lost tokens: `budget` is then the most it keeps.

About twice FastVID's time: half of it is the likeness of every token to the one before it, in fp64, which decides.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import Literal

import torch
from torch import Tensor

from vidcompress import ops
from vidcompress.method import Method, floor, setting
from vidcompress.tokens import Grid, Reduction, Site, VideoTokens


@dataclass(kw_only=True)
class HoliTomOuter(Method):
    needs = frozenset({"saliency.received"})
    costly = "likenesses of all neighbouring frames in fp64, and clusters of what is static"

    positions: Literal["keep", "renumber"] = setting("renumber", "survivors are numbered anew before the LLM")
    tau: float = setting(0.65, "a token more like the next frame's than this is static (cosine)", low=-1, high=1)
    beta: float | None = setting(
        0.6, "weight of a centre's own token when others are merged into it; null: plain mean", low=0, high=1
    )
    neighbours: int = setting(7, "k of the density estimate, the token itself included", low=1)
    longest_window: int = setting(1024, "most frames of a window", low=1)
    official: bool = setting(False, "reproduce the official code's counts, its lost tokens included")

    @property
    def exact(self) -> bool:
        return not self.official

    def budget(self, grid: Grid) -> int:
        if not self.official:
            return super().budget(grid)
        t, p = grid[0], grid[1] * grid[2]  # a frame rounds up, a window of at least two frames to the nearest
        return min(t * p, floor(self.retention_ratio * t * p + 1.25 * t))

    def reduce(self, tokens: VideoTokens, site: Site) -> Reduction:
        t, h, w = tokens.grid
        x, p = tokens.frames, h * w
        # 1. Windows that save most, and the positions that are static all through theirs.
        change = ops.frame_change(x)  # [T - 1, P], 1 - cosine
        windows = _windows(change < 1 - self.tau, self.longest_window)
        most = torch.stack([change[s : e - 1].amax(0) if e - s > 1 else change.new_ones(p) for s, e in windows])
        lengths = torch.tensor([e - s for s, e in windows], device=x.device)
        room = t * p if self.official else t * p - self.budget(tokens.grid)
        static = ops.steady_positions(most, 1 - self.tau, lengths, room)  # [W, P]
        # 2. What each window keeps of its static tokens, and each frame of its others.
        moving = ~static.repeat_interleave(lengths, 0)  # [T, P]
        kept, counts = self._shares(static.sum(1).tolist(), moving.sum(1).tolist(), tokens.grid)
        # 3. The most attended of a frame stay as they are.
        attention = tokens.signal("saliency.received").view(t, p).masked_fill(~moving, -torch.inf)
        keep = ops.top_tokens(attention, torch.tensor(counts))
        # 4. The static ones are clustered, in the place of their window's first frame.
        triplets = []
        for (start, end), own, count in zip(windows, static, kept, strict=True):
            if count:
                position = own.nonzero().squeeze(1)
                frames = (x[f, position].float() for f in range(start, end))
                mean = sum(frames, torch.zeros((), device=x.device)) / (end - start)
                centre, weight = self._clusters(mean, count)
                keep[start, position[centre.unique()]] = True
                source = torch.arange(start, end, device=x.device)[:, None] * p + position  # [L, n]
                survivor = (start * p + position[centre]).repeat(end - start)
                triplets.append((survivor, source.flatten(), (weight / (end - start)).repeat(end - start)))
        notes = {"windows": windows, "static": kept, "moving": counts}
        return Reduction.merging(keep.flatten().nonzero().squeeze(1), t * p, triplets, notes)

    def _shares(self, static: list[int], moving: list[int], grid: Grid) -> tuple[list[int], list[int]]:
        """Tokens kept of the static ones of every window and of the others of every frame, from how many there are."""
        sizes = [*static, *moving]
        if self.official:
            total = grid[0] * grid[1] * grid[2]
            ratio = min(self.retention_ratio / (sum(sizes) / total), 1)
            counts = [round(n * ratio) for n in static] + [ceil(n * ratio) for n in moving]
            if not any(counts):  # the code would hand on nothing
                counts[sizes.index(max(sizes))] = 1
            return counts[: len(static)], counts[len(static) :]
        shares = ops.fair_shares(self.budget(grid), sizes)
        return shares[: len(static)], shares[len(static) :]

    def _clusters(self, x: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """[n] the centre that each of n tokens is merged into, and the weight it has there."""
        index, joined, size, _ = ops.density_clusters(x, count, min(self.neighbours, count))
        own = 1 / size if self.beta is None else torch.where(size > 1, self.beta, 1.0)
        return joined, torch.where(joined == index, own, (1 - own) / (size - 1).clamp_min(1))


def _windows(still: Tensor, longest: int) -> list[tuple[int, int]]:
    """Cuts a video so that merging what is still all through a window, [T - 1, P] from frame to frame, saves most.

    A window of L frames saves L - 1 tokens for each such position. Of equals the last is the shortest.
    """
    frames, p = len(still) + 1, still.shape[1]
    # The first frame from which a position is still up to here, then for every window how many are.
    frame = torch.arange(1, frames, device=still.device)[:, None]
    since = torch.cat([still.new_zeros(1, p, dtype=torch.long), (frame * ~still).cummax(0).values])  # [T, P]
    cell = torch.arange(frames, device=still.device)[:, None] * frames + since
    count = cell.flatten().bincount(minlength=frames * frames).view(frames, frames).cumsum(1).tolist()
    best, length = [0], []
    for end in range(1, frames + 1):
        saved = [best[end - n] + (n - 1) * count[end - 1][end - n] for n in range(1, min(end, longest) + 1)]
        best.append(max(saved))
        length.append(saved.index(best[-1]) + 1)
    windows, end = [], frames
    while end:
        windows.append((end - length[end - 1], end))
        end -= length[end - 1]
    return windows[::-1]
