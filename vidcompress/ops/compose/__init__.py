"""Two sparse maps of tokens, one after the other, as one."""

from __future__ import annotations

from torch import Tensor

from vidcompress.ops.compose.naive import Map
from vidcompress.ops.dispatch import implementation

__all__ = ["compose"]


def compose(first: Map, second: Map, num_source: int) -> tuple[Tensor, Tensor, Tensor]:
    """The sparse product of two maps.

    Args:
        first: from `num_source` tokens to K.
        second: from these K to fewer.

    Returns:
        Triplets (slot, source, weight) of the whole, each [E], sorted by slot and source, every pair once; products are
        summed in fp64, weights are fp32. No slot that both maps only hand on has any.
    """
    return implementation("compose", first[0].device)(first, second, num_source)
