from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vidcompress.ops.top_tokens.torch import top_tokens


def select_in_turn(
    scores: Tensor,
    again: tuple[float, float] | None,
    segments: Sequence[tuple[int, int]],
    static: Tensor,
    counts: Tensor,
) -> tuple[Tensor, Tensor]:
    scores = scores.double().nan_to_num(torch.inf, torch.inf, -torch.inf)
    first, second = ranked(scores) if again is None else (scores, scores * again[0] - again[1])
    picked = torch.zeros_like(scores, dtype=torch.bool)
    repeated, before = torch.zeros_like(picked), torch.zeros_like(static)
    lengths = [end - start for start, end in segments]
    # All segments side by side, the longest first: the others drop out.
    order = sorted(range(len(segments)), key=lambda k: -lengths[k])
    begin = torch.tensor([segments[k][0] for k in order], dtype=torch.long, device=scores.device)
    static, counts = static[order], counts.to(scores.device)
    for step in range(max(lengths, default=0)):
        n = sum(length > step for length in lengths)
        frame = begin[:n] + step
        now = top_tokens(torch.where(before[:n], second[frame], first[frame]), counts[frame])
        before[:n] |= now & static[:n]
        picked[frame], repeated[frame] = now, before[:n]
    return picked, repeated


def ranked(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Scores of the same order that leave room between them and minus infinity, and these for what comes again."""
    last = scores.isneginf()
    place = scores.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    place = (place + 2 * scores.shape[1] * last).double()
    return -place, -place - scores.shape[1] * ~last
