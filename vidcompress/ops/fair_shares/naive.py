from __future__ import annotations

from collections.abc import Sequence

from vidcompress.ops.apportion import apportion


def fair_shares(total: int, sizes: Sequence[int]) -> list[int]:
    """Shares `total` out in proportion to the sizes of groups, adding up exactly; none is left without, if it can be.

    A group that is not empty gets one at least, unless there are more such groups than `total`
    (docs/decisions.md, D9 and D19).

    Raises:
        ValueError: `total` is more than there is in the groups.
    """
    least = [min(1, size) for size in sizes]
    return apportion(total, sizes, sizes, least if sum(least) <= total else None)
