"""VidCom2: frames that stand out get more tokens, and keep those that stand out (Liu et al., EMNLP 2025).

A token is near others if it is near the video's and its frame's mean direction, in the half of the channels that vary
least. The rule is the same for every backbone. `official` gives frames what the code gives them: each share rounded by
itself and cut off at the whole frame, so that the total is not the ratio's and `budget` is the most that can be kept.
Nothing is looked up in pairs: two passes over the tokens after one for the variances.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vidcompress import ops
from vidcompress.method import Method, floor, setting
from vidcompress.tokens import Grid, Reduction, Site, VideoTokens

BANDWIDTHS = tuple(2.0**exponent for exponent in range(-3, 2))
"""Variances of the Gaussian kernels that are added up."""


@dataclass(kw_only=True)
class VidCom2(Method):
    retention_ratio: float = setting(0.25, "R: fraction of the video tokens that is kept", above=0, high=1)
    channel_share: float = setting(0.5, "share of the channels that count, those of least variance", above=0, high=1)
    temperature: float = setting(0.01, "tau: of the softmax over frames; small favours the most unusual", above=0)
    official: bool = setting(False, "the code's counts: shares rounded frame by frame, what exceeds a frame is lost")

    @property
    def exact(self) -> bool:
        return not self.official

    def budget(self, grid: Grid) -> int:
        if not self.official:
            return super().budget(grid)
        # The total is convex in the frames' probabilities: it is largest where one frame has them all.
        t, p = grid[0], grid[1] * grid[2]
        share = self.retention_ratio * p
        others = (t - 1) * max(1, share * (1 - 1 / t) + 0.5)
        return min(t * p, floor(others + max(1, share * (2 - 1 / t) + 0.5)))

    def reduce(self, tokens: VideoTokens, site: Site) -> Reduction:
        x = tokens.frames  # [T, P, C]
        _, p, channels = x.shape
        # 1. The channels of least variance.
        calm = ops.top_tokens(_variance(x)[None], max(1, floor(channels * self.channel_share)), lowest=True)[
            0
        ].double()  # [C]
        # 2. Unit vectors in these: the mean of every frame, and of the video.
        length = torch.stack([(frame.double().square() @ calm).sqrt() for frame in x])  # [T, P]
        scale = torch.where(length > 0, 1 / length, 0)
        means = torch.stack([part @ frame.double() for part, frame in zip(scale, x, strict=True)]) / p * calm  # [T, C]
        # 3. How near a token is to either.
        centre = means.mean(0)
        axes = torch.stack([centre.expand_as(means), means], 2)  # [T, C, 2]
        near = torch.stack([frame.double() @ pair for frame, pair in zip(x, axes, strict=True)])  # [T, P, 2]
        distance = (scale * length)[..., None] - 2 * scale[..., None] * near + axes.square().sum(1)[:, None]
        to_video, to_frame = torch.stack([(-distance / (2 * a)).exp() for a in BANDWIDTHS]).sum(0).unbind(-1)  # [T, P]
        # 4. Frames far from the video's centre get more.
        unusual = -to_video.mean(1)
        probability = ((unusual - unusual.max()) / self.temperature).softmax(0)
        weight = 1 + probability - probability.mean()
        counts = self._counts(weight, tokens.grid)
        # 5. Of every frame the tokens that are least near.
        kept = ops.top_tokens((to_video + to_frame).float(), torch.tensor(counts), lowest=True)
        notes = {"counts": counts, "frame_scores": unusual}
        return Reduction.pruning(kept.flatten(), notes)

    def _counts(self, weight: Tensor, grid: Grid) -> list[int]:
        """Tokens kept of every frame."""
        t, p = grid[0], grid[1] * grid[2]
        if not self.official:
            return ops.apportion(self.budget(grid), weight.tolist(), [p] * t)
        share = (self.retention_ratio * weight).clamp(max=1).float()
        return (share * p).round().clamp(min=1).long().tolist()


def _variance(x: Tensor) -> Tensor:
    """[C] fp64 population variance of every channel over all tokens, summed about a rough centre."""
    rough = x[0].float().mean(0)
    total = square = torch.zeros_like(rough, dtype=torch.float64)
    for frame in x:
        centred = frame.float() - rough
        total = total + centred.sum(0)
        square = square + centred.square_().sum(0)
    n = x.shape[0] * x.shape[1]
    return square / n - (total / n) ** 2
