"""Uniform frames: whole frames, evenly spaced, as if fewer had been sampled. A floor that every method has to beat."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vidcompress.method import Method
from vidcompress.tokens import Reduction, Site, VideoTokens


@dataclass(kw_only=True)
class UniformFrames(Method):
    def reduce(self, tokens: VideoTokens, site: Site) -> Reduction:
        t, h, w = tokens.grid
        device, per_frame, budget = tokens.features.device, h * w, self.budget(tokens.grid)
        count = -(-budget // per_frame)
        frame = (2 * torch.arange(count, device=device) + 1) * t // (2 * count)
        index = frame[:, None] * per_frame + torch.arange(per_frame, device=device)  # [count, P]
        # The budget need not be a whole number of frames: the last one is then thinned evenly.
        rest = budget - (count - 1) * per_frame
        thinned = index[-1, (2 * torch.arange(rest, device=device) + 1) * per_frame // (2 * rest)]
        return Reduction(torch.cat([index[:-1].flatten(), thinned]), len(tokens))
