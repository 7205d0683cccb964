"""Outer half of PruneVid: merge over time what stays as it is through a scene, then similar tokens over space.

Scenes are runs of frames that density peaks put into one cluster. A position that hardly changes through its scene
becomes its mean. The static tokens of a scene, and the others of each frame, are clustered by density peaks, and every
cluster is handed on as its mean. `official` has the code's counts, which follow from the video; `budget` is then the
most it can keep. All frames are clustered, of FastVID's one in four: where nothing is static it takes 2 to 3 times as
long, else less than twice.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vidcompress import ops
from vidcompress.method import Method, floor, setting
from vidcompress.tokens import Grid, Reduction, Site, VideoTokens

SMALL = 14
"""So many tokens the official code does not cluster."""


@dataclass(kw_only=True)
class PruneVidOuter(Method):
    looks_ahead: ClassVar[bool] = True

    tau: float = setting(0.8, "a position is static if its mean cosine over a scene is above this", low=-1, high=1)
    segment_ratio: float = setting(0.25, "clusters of frames, as a share of all frames", low=0, high=1)
    cluster_ratio: float = setting(0.5, "official counts only: share of static, or other, tokens kept", low=0, high=1)
    neighbours: int = setting(7, "k of the density estimates, the frame or token itself included", low=1)
    official: bool = setting(False, "reproduce the official code's counts, which depend on the video")

    @property
    def exact(self) -> bool:
        return not self.official

    def budget(self, grid: Grid) -> int:
        if not self.official:
            return super().budget(grid)
        t, p = grid[0], grid[1] * grid[2]
        # The static tokens of a scene stand for two frames at least.
        return min(t * p, floor(t * max(self._clusters(n) + self._clusters(p - n) / 2 for n in range(p + 1))))

    def reduce(self, tokens: VideoTokens, site: Site) -> Reduction:
        t, h, w = tokens.grid
        x, p = tokens.frames, h * w
        # 1. Scenes, and the positions that stay as they are in each.
        scenes = _scenes(self._frame_clusters(torch.stack([frame.float().mean(0) for frame in x])))
        lengths = torch.tensor([end - start for start, end in scenes], device=x.device)
        change = torch.stack([ops.window_change(x[start:end]) for start, end in scenes])
        room = t * p if self.official else t * p - self.budget(tokens.grid)
        static = ops.steady_positions(change, 1 - self.tau, lengths, room)  # [S, P]
        # 2. Groups: the static tokens of every scene, the others of every frame; and how many are left of each.
        moving = ~static.repeat_interleave(lengths, 0)  # [T, P]
        spans = [*scenes, *((f, f + 1) for f in range(t))]
        members = torch.cat([static, moving])  # [S + T, P]
        sizes = members.sum(1).tolist()
        counts = (
            [self._clusters(n) for n in sizes] if self.official else ops.fair_shares(self.budget(tokens.grid), sizes)
        )
        # 3. Every group is clustered, in the place of its first frame; a cluster becomes its mean.
        keep, triplets = torch.zeros_like(moving), []
        for (start, end), own, size, count in zip(spans, members, sizes, counts, strict=True):
            if count:
                position = own.nonzero().squeeze(1)
                frames = (x[f, position].float() for f in range(start, end))
                mean = sum(frames, torch.zeros((), device=x.device)) / (end - start)
                centre = position[self._joined(mean, count)]
                keep[start, centre] = True
                if count < size or end - start > 1:
                    source = torch.arange(start, end, device=x.device)[:, None] * p + position  # [L, n]
                    weight = 1 / (centre.bincount(minlength=p)[centre] * (end - start)).float()
                    triplets.append(
                        ((start * p + centre).repeat(end - start), source.flatten(), weight.repeat(end - start))
                    )
        scene = torch.arange(len(scenes), device=x.device).repeat_interleave(lengths)[:, None]
        frame = torch.arange(t, device=x.device)[:, None] + len(scenes)
        notes = {"scenes": scenes, "counts": counts, "group": torch.where(moving, frame, scene).flatten()}
        return Reduction.merging(keep.flatten().nonzero().squeeze(1), t * p, triplets, notes)

    def _frame_clusters(self, frames: Tensor) -> list[int]:
        """The frame in the middle of every frame's cluster, from [T, C]."""
        return self._joined(frames, max(1, floor(self.segment_ratio * len(frames)))).tolist()

    def _joined(self, x: Tensor, count: int) -> Tensor:
        """[n] index of the density peak, one of `count`, that each of [n, C] joins."""
        if count == len(x):
            return torch.arange(count, device=x.device)
        return ops.density_clusters(x, count, self.neighbours).joined

    def _clusters(self, size: int) -> int:
        """Tokens that the official code keeps of a group."""
        return size if size <= SMALL else max(1, int(size * self.cluster_ratio))


def _scenes(labels: list[int]) -> list[tuple[int, int]]:
    """Runs of frames of one cluster: of each cluster only its longest, two frames at least; what lies between joins
    the longer of the runs beside it, the earlier of equals."""
    runs = [(label, len(list(run))) for label, run in itertools.groupby(labels)]
    longest = {label: max(n for other, n in runs if other == label) for label in labels}
    scenes: list[tuple[int, int]] = []  # label and length
    between = 0
    for label, length in [*runs, (-1, 0)]:
        if label != -1 and not 1 < length == longest[label]:
            between += length
            continue
        if scenes and scenes[-1][1] >= length:
            scenes[-1] = (scenes[-1][0], scenes[-1][1] + between)
        else:
            length += between
        between = 0
        if scenes and scenes[-1][0] == label:
            scenes[-1] = (label, scenes[-1][1] + length)
        elif length:
            scenes.append((label, length))
    ends = list(itertools.accumulate(length for _, length in scenes))
    return list(zip([0, *ends[:-1]], ends, strict=True))
