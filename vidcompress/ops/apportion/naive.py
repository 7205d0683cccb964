from __future__ import annotations

import math
from collections.abc import Sequence


def apportion(total: int, weights: Sequence[float], caps: Sequence[int]) -> list[int]:
    """Shares `total` out in proportion to `weights`, none above its cap, adding up exactly (docs/decisions.md, D9).

    What a cap turns away is shared among the others in proportion to their weights, again until no cap is exceeded
    (water-filling); then the largest remainders are rounded up, the lowest index first among equals (to 1e-9).

    Args:
        total: tokens to share out, at most sum(caps).
        weights: one number a share, 0 or more; zeros get, in equal parts, what nobody else can take.
        caps: the most each share may get.

    Raises:
        ValueError: the caps together are below `total`.
    """
    if total > sum(caps):
        raise ValueError(f"{total} tokens do not fit under caps that add up to {sum(caps)}")
    share = [0.0] * len(weights)
    free = list(range(len(weights)))
    left = float(total)
    while free:
        together = sum(weights[i] for i in free)
        part = {i: left * weights[i] / together if together else left / len(free) for i in free}
        full = [i for i in free if part[i] > caps[i]]
        if not full:
            for i in free:
                share[i] = part[i]
            break
        for i in full:
            share[i] = float(caps[i])
            left -= caps[i]
        free = [i for i in free if i not in full]
    counts = [math.floor(s + 1e-9) for s in share]
    by_remainder = sorted(range(len(share)), key=lambda i: (round(counts[i] - share[i], 9), i))
    for i in by_remainder[: total - sum(counts)]:
        counts[i] += 1
    return counts
