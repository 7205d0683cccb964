"""Uniform tokens: every n-th token of the video. A floor that every method has to beat."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vidcompress.method import Method
from vidcompress.tokens import Reduction, Site, VideoTokens


@dataclass(kw_only=True)
class UniformTokens(Method):
    def reduce(self, tokens: VideoTokens, site: Site) -> Reduction:
        n, budget = len(tokens), self.budget(tokens.grid)
        # The middle of each of `budget` equal stretches of the flattened video.
        return Reduction((2 * torch.arange(budget, device=tokens.features.device) + 1) * n // (2 * budget), n)
