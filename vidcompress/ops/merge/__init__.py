"""Carrying out a `Reduction`: the only op that makes new tokens."""

from __future__ import annotations

from torch import Tensor

from vidcompress.ops.dispatch import implementation

__all__ = ["merge"]


def merge(features: Tensor, keep: Tensor, slot: Tensor, source: Tensor, weight: Tensor) -> Tensor:
    """out[slot] = sum of weight * features[source]; a slot without triplets is features[keep[slot]], bit for bit.

    Args:
        features: [N, C].
        keep: [K] source index of every survivor.
        slot, source, weight: [E] triplets.

    Returns:
        [K, C] in the dtype of `features`, summed in fp32. Differentiable in `features`.
    """
    return implementation("merge", features.device)(features, keep, slot, source, weight)
