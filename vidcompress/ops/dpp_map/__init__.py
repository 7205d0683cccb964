"""Relevant tokens that are unlike each other: greedy MAP inference of a determinantal point process (HieraVid)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor

from vidcompress.ops.dispatch import implementation

__all__ = ["dpp_map"]


def dpp_map(
    tokens: Tensor,
    log_relevance: Tensor,
    sizes: Sequence[int],
    counts: Sequence[int],
    rank_eps: float = 1e-6,
    kernel: Literal["dot", "cosine"] = "dot",
) -> Tensor:
    """Picks tokens of every segment one by one, each time the one that adds most volume (HieraVid, eq. 9-10).

    The kernel of a segment is diag(relevance) K diag(relevance). A token adds what the picked ones do not span of its
    own kernel value. It is exhausted once that is at most `rank_eps` of its own kernel value; when all left are
    exhausted, the rest is filled by relevance. Ties go to the lowest index; gains that agree to 1e-9 are tied, because
    the rounding of fp64 must not choose between copies. Relevance comes as a logarithm: the softmax of a model's hidden
    states spans more than floats hold, and what is spanned does not depend on it.

    Args:
        tokens: [n, C], segment after segment.
        log_relevance: [n], -inf for a token that is not relevant at all.
        sizes: tokens of each segment; their sum is n.
        counts: how many each segment keeps, at most its size.
        rank_eps: see above; 0 <= rank_eps < 1.
        kernel: K is H H^T / C ("dot", the paper's) or the cosine ("cosine"; a zero token has 0 with all and itself).

    Returns:
        [sum(counts)] long indices into `tokens`: segment after segment, each in the order of its picks.

    Raises:
        ValueError: shapes, sizes and counts that do not fit together, a rank_eps or kernel that is none.
    """
    if tokens.dim() != 2 or log_relevance.shape != tokens.shape[:1]:
        raise ValueError(
            f"tokens must be [n, C] and log_relevance [n], got {list(tokens.shape)} and {list(log_relevance.shape)}"
        )
    if len(sizes) != len(counts) or sum(sizes) != len(tokens):
        raise ValueError(
            f"sizes and counts must have one entry a segment and sizes sum to n = {len(tokens)}, "
            f"got sizes {list(sizes)} and counts {list(counts)}"
        )
    if not all(0 <= count <= size for size, count in zip(sizes, counts, strict=True)):
        raise ValueError(f"a segment keeps 0 to all of its tokens, got counts {list(counts)} of sizes {list(sizes)}")
    if not 0 <= rank_eps < 1:
        raise ValueError(f"rank_eps must be in [0, 1), got {rank_eps}: it is a share of a token's own kernel value")
    if kernel not in ("dot", "cosine"):
        raise ValueError(f"kernel must be 'dot' or 'cosine', got {kernel!r}")
    return implementation("dpp_map", tokens.device)(tokens, log_relevance, sizes, counts, rank_eps, kernel)
