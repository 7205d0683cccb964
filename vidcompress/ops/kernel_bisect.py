"""Binary search inside of kernels."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _first_not_before(values, wanted, low, high, steps, FALLING: tl.constexpr):
    """The first place from `low` to `high`, or `high`, that is not before `wanted`, of ascending or FALLING values.

    `low` and `high` are of one type, a number or as many as `wanted`; `steps` is the bit length of most that `high` can
    be beyond `low`.
    """
    for _ in range(0, steps):
        middle = (low + high) // 2
        value = tl.load(values + middle, mask=low < high, other=0)
        before = (low < high) & ((value > wanted) if FALLING else (value < wanted))
        high = tl.where(before, high, tl.minimum(middle, high))
        low = tl.where(before, middle + 1, low)
    return low
