from __future__ import annotations

from torch import Tensor

from vidcompress.ops.frame_change import frame_change


def adjacent_difference(tokens: Tensor, window: int = 4) -> Tensor:
    """Mean of 1 - cos between neighbouring frames at the same position (InfoMerge's Table 5; docs/decisions.md, D13).

    Args:
        tokens: [L, P, C], the frames of one segment.
        window: frames are compared within windows of so many, at least 2, as in DyCoke.

    Returns:
        [P] fp32, exactly 0 for a position that never changes and for L = 1.
    """
    pairs = [i for i in range(tokens.shape[0] - 1) if (i + 1) % window]
    return frame_change(tokens)[pairs].sum(0).div(max(1, len(pairs))).float()
