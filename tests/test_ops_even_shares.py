"""`ops.even_shares`: sums, evenness, and what is refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vidcompress.ops import even_shares


@given(total=st.integers(0, 5000), parts=st.integers(1, 300))
def test_shares_add_up_and_are_even_in_every_run(total: int, parts: int) -> None:
    shares = even_shares(total, parts)
    assert len(shares) == parts and sum(shares) == total
    assert max(shares) - min(shares) <= 1
    for start, length in ((0, parts // 2), (parts // 3, parts // 2), (parts // 2, parts - parts // 2)):
        assert abs(sum(shares[start : start + length]) - total * length / parts) < 1


def test_by_hand() -> None:
    assert even_shares(3, 7) == [0, 0, 1, 0, 1, 0, 1]
    assert even_shares(10, 4) == [2, 3, 2, 3]
    assert even_shares(6, 3) == [2, 2, 2]
    assert even_shares(0, 2) == [0, 0]


@pytest.mark.parametrize("total, parts", [(3, 0), (-1, 2)])
def test_nothing_to_share_among_is_refused(total: int, parts: int) -> None:
    with pytest.raises(ValueError, match=f"cannot share {total} tokens out among {parts} parts"):
        even_shares(total, parts)
