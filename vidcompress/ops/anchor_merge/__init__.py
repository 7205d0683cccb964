"""Merging a video's tokens into its density-peak anchors (the second half of FastVID's DTM)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from vidcompress.ops.dispatch import implementation

__all__ = ["anchor_merge"]


def anchor_merge(
    frames: Tensor,
    members: Tensor,
    anchors: Tensor,
    counts: Sequence[int],
    reach: Sequence[tuple[int, int]],
    anchor_weight: float,
    anchors_join: bool = True,
    member_counts: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Every member joins the anchor of highest cosine in each frame of anchors that reaches it (FastVID; InfoMerge,
    eq. 34).

    An anchor that n_a members chose becomes w * own + (1 - w) * mean(its members) with
    w = max(1 / (n_a + 1), anchor_weight); one that nobody chose stays as it is.

    Args:
        frames: [T, P, C].
        members: [T, P] bool.
        anchors: [T, P] bool.
        counts: anchors in each of the T frames, known without asking the device.
        reach: (start, end) for each of the T frames: the members of which frames join its anchors.
        anchor_weight: least weight of the anchor's own token, in [0, 1].
        anchors_join: whether an anchor that is a member joins an anchor of its own frame, mostly itself.
        member_counts: members in each of the T frames, all anchors among them, if they are known without asking the
            device.

    Returns:
        Triplets (anchor, source, weight), each [E]: flat indices t * P + p, and fp32 weights that sum to 1 an anchor.
        A zero token, and ties, go to the anchor that comes first.
    """
    run = implementation("anchor_merge", frames.device)
    return run(frames, members, anchors, counts, reach, anchor_weight, anchors_join, member_counts)
