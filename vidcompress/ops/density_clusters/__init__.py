"""Clusters around density peaks (DPC-KNN, without its randomness)."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from vidcompress.ops.density_clusters.naive import Clusters
from vidcompress.ops.dispatch import implementation

__all__ = ["density_clusters"]


def density_clusters(
    tokens: Tensor,
    count: int,
    neighbours: int,
    ties: Literal["index", "strict"] = "index",
    candidates: Tensor | None = None,
    members: int | None = None,
) -> Clusters:
    """The tokens of highest density-peak score are centres; each token joins the nearest, a centre its own cluster.

    Args:
        tokens: [N, C].
        count: centres, at least 1 and at most the candidates.
        neighbours, ties: as for `density_peaks`.
        candidates: [N] bool, the tokens that are clustered; all unless given.
        members: how many candidates there are, if that is known without asking the device.
    """
    return implementation("density_clusters", tokens.device)(tokens, count, neighbours, ties, candidates, members)
