"""A sparse map of tokens of which some are replaced by means, as one of the tokens themselves."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from vidcompress.ops.dispatch import implementation

__all__ = ["through_means"]


def through_means(
    slot: Tensor,
    source: Tensor,
    weight: Tensor,
    alone: int,
    replaced: Tensor,
    segments: Sequence[tuple[int, int]],
    ask: Tensor,
) -> tuple[Tensor, Tensor, Tensor, int]:
    """What triplets over the tokens that `with_means` makes are over the tokens that it is given (InfoMerge, eq. 11).

    Args:
        slot, source, weight: [E] triplets; sources are flat indices t * P + p.
        alone: so many triplets, the first ones, only say that a slot hands on its own token: they are left out unless
            it is replaced.
        replaced: [T, P] bool.
        segments: (start, end) of each, in order, together all T frames.
        ask: a number on the device that the caller wants to know, read in the same wait.

    Returns:
        Triplets (slot, source, weight), by slots, every pair once, weights summed in fp64 and rounded to fp32; and what
        was asked.
    """
    return implementation("through_means", replaced.device)(slot, source, weight, alone, replaced, segments, ask)
