"""Random: tokens drawn without looking, the same ones for the same seed and grid. The floor that papers forget."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vidcompress.method import Method, setting
from vidcompress.tokens import Reduction, Site, VideoTokens


@dataclass(kw_only=True)
class Random(Method):
    seed: int = setting(0, "of the draw, made on the CPU: every device keeps the same tokens", low=0, high=2**63 - 1)

    def reduce(self, tokens: VideoTokens, site: Site) -> Reduction:
        draw = torch.Generator().manual_seed(self.seed)
        kept = torch.randperm(len(tokens), generator=draw)[: self.budget(tokens.grid)].sort().values
        return Reduction(kept.to(tokens.features.device), len(tokens))
