"""PruMerge+: PruMerge that also keeps tokens at even steps, so that no part of a frame is left out (Shang et al.).

K tokens by attention bring about three times as many at even steps with them. The code takes K from the attention
(`adaptive`); for a fixed ratio it is as large as the budget allows, and what is then left goes by attention, too.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vidcompress import ops
from vidcompress.methods.prumerge import PruMerge


@dataclass(kw_only=True)
class PruMergePlus(PruMerge):
    def choose(self, attention: Tensor, most: list[int]) -> Tensor:
        """[T, P] bool: the most attended tokens of every frame, and those at even steps."""
        p = attention.shape[1]
        rank = attention.argsort(dim=1, descending=True, stable=True).argsort(dim=1)  # 0: most attended
        limit = torch.tensor(most, device=rank.device)
        # 1. The most by attention with which the steps still fit.
        picked, counts = torch.zeros_like(rank, dtype=torch.bool), limit
        for k in range(1, p // 6 + 1):
            both = (rank < k) | self._steps(k, p, rank.device)
            picked = torch.where((both.sum(1) <= limit)[:, None], both, picked)
        # 2. Or as many as there are outliers, if they fit.
        if self.adaptive:
            outliers = self.outliers(attention)
            steps = torch.stack([self._steps(k, p, rank.device) for k in outliers])
            both = (rank < torch.tensor(outliers, device=rank.device)[:, None]) | steps
            fits = both.sum(1) <= limit
            picked, counts = torch.where(fits[:, None], both, picked), torch.where(fits, both.sum(1), limit)
        # 3. What is left of the budget goes by attention.
        return ops.top_tokens(picked * p - rank, counts)

    def _steps(self, k: int, p: int, device: torch.device) -> Tensor:
        """[P] bool: tokens at even steps, three or more for each of k; none for none."""
        at = torch.arange(p, device=device)
        if not k:
            return at < 0
        if self.official:
            return (at % max(1, int(1 / (k / p)) // 3) == 0) & (at < p - 1)
        return at % max(1, p // k // 3) == 0
