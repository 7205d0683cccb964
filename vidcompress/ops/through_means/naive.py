from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor


def through_means(
    slot: Tensor,
    source: Tensor,
    weight: Tensor,
    alone: int,
    replaced: Tensor,
    segments: Sequence[tuple[int, int]],
    ask: Tensor,
) -> tuple[Tensor, Tensor, Tensor, int]:
    p, spans = replaced.shape[1], [span for span in segments for _ in range(*span)]
    total: dict[tuple[int, int], float] = defaultdict(float)
    for e, (to, token, share) in enumerate(zip(slot.tolist(), source.tolist(), weight.tolist(), strict=True)):
        frame, position = divmod(token, p)
        if replaced[frame, position]:
            start, end = spans[frame]
            for f in range(start, end):
                total[to, f * p + position] += share / (end - start)
        elif e >= alone:
            total[to, token] += share
    pairs, device = sorted(total), slot.device
    columns = torch.tensor(pairs, dtype=torch.long, device=device).view(-1, 2)
    shares = torch.tensor([total[pair] for pair in pairs], dtype=torch.float32, device=device)
    return columns[:, 0], columns[:, 1], shares, int(ask)
