"""How much every position changes over a window of frames."""

from __future__ import annotations

from torch import Tensor

from vidcompress.ops.dispatch import implementation

__all__ = ["window_change"]


def window_change(tokens: Tensor) -> Tensor:
    """1 - the mean cosine of all pairs of frames, at every position (PruneVid).

    Args:
        tokens: [L, P, C], the frames of one window.

    Returns:
        [P] fp64, exactly 0 below 1e-6: as little is rounding; 0 for a window of one frame. Two zero tokens have not
        changed, a zero token has cosine 0 with any other (docs/decisions.md, D12).
    """
    return implementation("window_change", tokens.device)(tokens)
