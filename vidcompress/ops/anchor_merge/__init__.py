"""Merging a segment's tokens into its density-peak anchors (the second half of FastVID's DTM)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from vidcompress.ops.dispatch import implementation

__all__ = ["anchor_merge"]


def anchor_merge(
    tokens: Tensor, members: Tensor, anchors: Sequence[Tensor], anchor_weight: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Every member joins the anchor of highest cosine in each anchor frame (FastVID on OneVision; InfoMerge, eq. 34).

    An anchor that n_a members chose (it is a member itself) becomes w * own + (1 - w) * mean(its members) with
    w = max(1 / (n_a + 1), anchor_weight); one that nobody chose stays as it is.

    Args:
        tokens: [N, C].
        members: [m] indices into `tokens`.
        anchors: one [a_f] index tensor an anchor frame; a member joins one anchor of each.
        anchor_weight: least weight of the anchor's own token, in [0, 1].

    Returns:
        Triplets (anchor, source, weight), each [E]: indices into `tokens` and fp32 weights that sum to 1 an anchor.
        A zero token, and ties, go to the anchor that comes first.
    """
    return implementation("anchor_merge")(tokens, members, anchors, anchor_weight)
