"""Density peaks (DPC-kNN): tokens that are dense and far from anything denser."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from vidcompress.ops.dispatch import implementation

__all__ = ["density_peaks"]


def density_peaks(
    tokens: Tensor,
    candidates: Tensor,
    neighbours: int,
    ties: Literal["index", "strict"] = "index",
    noise: Tensor | None = None,
) -> Tensor:
    """Density-peak score of every candidate of every frame (DPC-kNN; InfoMerge, eq. 31-33).

    With D the Euclidean distance divided by sqrt(C) among a frame's candidates: density = exp(-mean of D^2 over the
    `neighbours` nearest, the point itself included), delta = distance to the nearest denser point, or the frame's
    largest distance for the densest, score = density * delta. Returned as a logarithm, which keeps the order where exp
    would collapse to 1 or underflow (docs/decisions.md, D2). Memory grows with n * `neighbours`, not with n^2, for
    large n.

    Args:
        tokens: [B, n, C], one frame a row.
        candidates: [B, n] bool; the others neither score nor count as neighbours.
        neighbours: k, at least 1; a frame with fewer candidates uses all of them.
        ties: among equal densities the lower index counts as denser ("index"), or none does ("strict").
        noise: [B, n] added to the densities, to reproduce code that draws it at random.

    Returns:
        [B, n] fp32 log score: the lowest finite number for a copy of a denser point, -inf for non-candidates only.
    """
    return implementation("density_peaks", tokens.device)(tokens, candidates, neighbours, ties, noise)
