from __future__ import annotations

from collections.abc import Sequence

from vidcompress.ops.apportion import apportion


def anchor_budgets(
    segments: Sequence[tuple[int, int]],
    positions: int,
    budget: int,
    salient: int,
    weights: Sequence[float],
    interval: int,
) -> tuple[list[int], list[int]]:
    """Places exactly `budget` tokens: `salient` in every frame, the rest as anchors (docs/decisions.md, D8-D9).

    A segment's anchor frames are its last one and every `interval`-th before it. The anchors are shared among segments
    in proportion to `weights` and within a segment as evenly as possible, the latest anchor frames getting one more.
    A frame has room for `positions` tokens: if the anchor frames cannot take their part, `salient` rises until they
    can; what is left at the very end becomes one more salient token in frames without anchors, earliest first.

    Args:
        segments: (start, end) frames, covering the video.
        positions: tokens a frame, P.
        budget: tokens to place, fewer than frames * P.
        salient: salient tokens a frame before any rise.
        weights: one a segment.
        interval: p.

    Returns:
        (salient tokens, anchors), one number a frame each.
    """
    frames = segments[-1][1]
    anchor_frames = [[f for f in range(start, end) if (end - 1 - f) % interval == 0] for start, end in segments]
    while True:
        caps = [len(own) * (positions - salient) for own in anchor_frames]
        if sum(caps) >= budget - frames * salient or frames * (salient + 1) > budget:
            break
        salient += 1
    left = budget - frames * salient - sum(caps)
    shares = apportion(min(budget - frames * salient, sum(caps)), weights, caps)

    salient_counts = [salient] * frames
    anchor_counts = [0] * frames
    for own, share in zip(anchor_frames, shares, strict=True):
        for i, f in enumerate(reversed(own)):
            anchor_counts[f] = share // len(own) + (i < share % len(own))
    others = [f for f in range(frames) if all(f not in own for own in anchor_frames)]
    for f in others[: max(0, left)]:
        salient_counts[f] += 1
    return salient_counts, anchor_counts
