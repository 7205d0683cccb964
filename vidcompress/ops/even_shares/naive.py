from __future__ import annotations


def even_shares(total: int, parts: int) -> list[int]:
    """Shares `total` out as evenly as whole numbers can, what does not divide spread over all parts.

    Every run of parts holds its due to less than one token, from the first part on rounded down: 3 tokens of 7 frames
    are 0, 0, 1, 0, 1, 0, 1.

    Args:
        total: tokens to share out, 0 or more.
        parts: frames, at least 1.

    Raises:
        ValueError: no part, or fewer than no tokens.
    """
    if parts < 1 or total < 0:
        raise ValueError(f"cannot share {total} tokens out among {parts} parts; 0 tokens or more, and 1 part or more")
    return [(i + 1) * total // parts - i * total // parts for i in range(parts)]
