"""Text-to-video attention: how much the text behind a video looks at each of its tokens."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from vidcompress.ops.dispatch import implementation

__all__ = ["text_attention"]


def text_attention(
    query: Tensor,
    key: Tensor,
    scale: float,
    rows: Tensor,
    columns: Tensor,
    reduce: Literal["max", "none"] = "max",
) -> Tensor:
    """Causal softmax attention of a few queries to chosen keys of one sequence (Unified, eq. 5).

    Query i stands at place rows[i] and sees keys 0..rows[i]; a key behind it counts 0.

    Args:
        query: [H, Q, D] after rotary embedding, Q at least 1.
        key: [G, N, D] after rotary embedding, G a divisor of H: query head h uses key head h // (H / G).
        scale: factor of the logits, usually D ** -0.5.
        rows: [Q] long, places of the queries among the N keys.
        columns: [n] long, the keys asked about.
        reduce: "max" is the maximum over queries of the mean over heads, "none" is every head and query.

    Returns:
        fp32, [n] for "max" and [H, Q, n] for "none".

    Raises:
        ValueError: no query, shapes that do not fit, places outside the sequence, another `reduce`.
    """
    if reduce not in ("max", "none"):
        raise ValueError(f"reduce must be 'max' or 'none', got {reduce!r}")
    heads, queries, groups, n = *query.shape[:2], *key.shape[:2]
    if not queries:
        raise ValueError(f"query is empty, got shape {list(query.shape)}: attention needs at least one text query")
    if not groups or heads % groups or query.shape[2] != key.shape[2]:
        raise ValueError(
            f"query [H, Q, D] and key [G, N, D] need the same D and an H that G divides, "
            f"got {list(query.shape)} and {list(key.shape)}"
        )
    if rows.shape != (queries,):
        raise ValueError(f"rows must hold one place for each of {queries} queries, got shape {list(rows.shape)}")
    for name, places in (("rows", rows), ("columns", columns)):
        if ((places < 0) | (places >= n)).any():
            raise ValueError(f"{name} must lie in 0..{n - 1}, got {int(places.min())}..{int(places.max())}")
    return implementation("text_attention", query.device)(query, key, scale, rows, columns, reduce)
