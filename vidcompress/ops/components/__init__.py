"""Connected components of the graph that links vectors of high cosine."""

from __future__ import annotations

from torch import Tensor

from vidcompress.ops.dispatch import implementation

__all__ = ["components"]


def components(vectors: Tensor, threshold: float) -> Tensor:
    """For every vector the lowest index that it is linked to, by links or chains of them.

    Two vectors are linked if their cosine, in fp32, is above `threshold`; a zero vector has cosine 0 with everything.

    Args:
        vectors: [M, C].
        threshold: with less than -1 all are linked.

    Returns:
        [M] long. No [M, M] matrix exists.
    """
    return implementation("components", vectors.device)(vectors, threshold)
