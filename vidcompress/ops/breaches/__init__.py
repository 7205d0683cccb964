"""Whether a sparse map of tokens is lawful."""

from __future__ import annotations

from torch import Tensor

from vidcompress.ops.dispatch import implementation

__all__ = ["breaches"]


def breaches(keep: Tensor, slot: Tensor, source: Tensor, weight: Tensor, num_source: int) -> Tensor:
    """How many entries of a `Reduction` break its rules; nobody waits for the answer.

    Args:
        keep: [K] long, to be ascending indices below `num_source`.
        slot, source: [E] long, to be below K and `num_source`.
        weight: [E], to be finite.

    Returns:
        Long scalar.
    """
    return implementation("breaches", keep.device)(keep, slot, source, weight, num_source)
