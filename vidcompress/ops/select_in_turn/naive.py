from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def select_in_turn(
    scores: Tensor, again: Tensor | None, segments: Sequence[tuple[int, int]], static: Tensor, counts: Tensor
) -> tuple[Tensor, Tensor]:
    picked = torch.zeros_like(scores, dtype=torch.bool)
    repeated = torch.zeros_like(picked)
    for (start, end), fixed in zip(segments, static, strict=True):
        before = torch.zeros_like(fixed)
        for f in range(start, end):
            if again is None:
                group = torch.where(scores[f].isneginf(), 2, before.int()).tolist()
                order = sorted(range(len(group)), key=lambda i: (group[i], -scores[f, i]))  # stable
            else:
                order = torch.where(before, again[f], scores[f]).argsort(descending=True, stable=True).tolist()
            picked[f, order[: counts[f]]] = True
            before |= picked[f] & fixed
            repeated[f] = before
    return picked, repeated
