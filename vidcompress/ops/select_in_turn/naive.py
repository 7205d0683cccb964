from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from vidcompress.ops.top_tokens import top_tokens


def select_in_turn(
    scores: Tensor,
    segments: Sequence[tuple[int, int]],
    counts: Sequence[int],
    static: Tensor,
    penalised: Callable[[Tensor, Tensor], Tensor],
) -> tuple[Tensor, Tensor]:
    """Marks the best positions of every frame, frames of a segment in turn, segments side by side (InfoMerge, eq. 10).

    Args:
        scores: [T, P].
        segments: (start, end) frames of each of the K segments; empty ones are allowed.
        counts: how many positions each of the T frames picks.
        static: [K, P] bool, the positions that count as one token throughout a segment.
        penalised: from scores [n, P] and [n, P] bool, which positions are static and were picked before, the scores
            that count.

    Returns:
        ([T, P] bool picked, [T, P] bool static and picked in this frame or before it).
    """
    picked = torch.zeros(scores.shape, dtype=torch.bool, device=scores.device)
    held, history = torch.zeros_like(picked), torch.zeros_like(static)
    order = sorted(range(len(segments)), key=lambda k: segments[k][0] - segments[k][1])  # the longest first
    lengths = [segments[k][1] - segments[k][0] for k in order]
    first = torch.tensor([segments[k][0] for k in order], device=scores.device)
    static, count = static[order], torch.tensor(counts, device=scores.device)
    for step in range(max(lengths, default=0)):
        n = sum(length > step for length in lengths)  # the others have dropped out
        frame = first[:n] + step
        now = top_tokens(penalised(scores[frame], history[:n]), count[frame])
        history[:n] |= now & static[:n]
        picked[frame], held[frame] = now, history[:n]
    return picked, held
