from __future__ import annotations

import math
from collections.abc import Sequence


def apportion(
    total: int, weights: Sequence[float], caps: Sequence[int], floors: Sequence[int] | None = None
) -> list[int]:
    """Shares `total` out in proportion to `weights`, within limits, adding up exactly (docs/decisions.md, D9).

    The shares are s * weight, cut off at floor and cap, with the one s that makes them add up (water-filling); then the
    largest remainders are rounded up, the lowest index first among equals (to 1e-9).

    Args:
        total: tokens to share out, from sum(floors) to sum(caps).
        weights: one number a share, 0 or more; zeros get, in equal parts, what nobody else can take.
        caps: the most each share may get.
        floors: the least each share gets; none by default.

    Raises:
        ValueError: the caps together are below `total`, or the floors above.
    """
    floors = [0] * len(weights) if floors is None else floors
    if total > sum(caps):
        raise ValueError(f"{total} tokens do not fit under caps that add up to {sum(caps)}")
    if total < sum(floors):
        raise ValueError(f"{total} tokens do not reach floors that add up to {sum(floors)}")
    share = [float(low) for low in floors]
    free = list(range(len(weights)))
    while free:
        left = total - sum(share[i] for i in range(len(share)) if i not in free)
        together = sum(weights[i] for i in free)
        part = {i: left * weights[i] / together if together else left / len(free) for i in free}
        over = {i: part[i] - caps[i] for i in free if part[i] > caps[i]}
        under = {i: floors[i] - part[i] for i in free if part[i] < floors[i]}
        if not over and not under:
            for i in free:
                share[i] = part[i]
            break
        # The side with the larger excess is cut off for good: what it gives back cannot undo it.
        cut, limits = (over, caps) if sum(over.values()) >= sum(under.values()) else (under, floors)
        for i in cut:
            share[i] = float(limits[i])
        free = [i for i in free if i not in cut]
    counts = [math.floor(s + 1e-9) for s in share]
    by_remainder = sorted(range(len(share)), key=lambda i: (round(counts[i] - share[i], 9), i))
    for i in by_remainder[: total - sum(counts)]:
        counts[i] += 1
    return counts
