from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def select_in_turn(
    scores: Tensor,
    again: tuple[float, float] | None,
    segments: Sequence[tuple[int, int]],
    static: Tensor,
    counts: Tensor,
) -> tuple[Tensor, Tensor]:
    scores = scores.double().nan_to_num(torch.inf, torch.inf, -torch.inf)
    picked = torch.zeros_like(scores, dtype=torch.bool)
    repeated = torch.zeros_like(picked)
    for (start, end), fixed in zip(segments, static, strict=True):
        before = torch.zeros_like(fixed)
        for f in range(start, end):
            if again is None:
                group = torch.where(scores[f].isneginf(), 2, before.int()).tolist()
                order = sorted(range(len(group)), key=lambda i: (group[i], -scores[f, i]))  # stable
            else:
                second = (scores[f] * again[0] - again[1]).nan_to_num(torch.inf, torch.inf, -torch.inf)
                order = torch.where(before, second, scores[f]).argsort(descending=True, stable=True).tolist()
            picked[f, order[: counts[f]]] = True
            before |= picked[f] & fixed
            repeated[f] = before
    return picked, repeated
