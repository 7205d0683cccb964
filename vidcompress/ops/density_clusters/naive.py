from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from vidcompress.ops.density_peaks import density_peaks
from vidcompress.ops.nearest import nearest
from vidcompress.ops.places import places
from vidcompress.ops.top_tokens import top_tokens


def density_clusters(
    tokens: Tensor,
    count: int,
    neighbours: int,
    ties: Literal["index", "strict"] = "index",
    candidates: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The tokens of highest density-peak score are centres; each token joins the nearest, a centre its own cluster.

    Args:
        tokens: [N, C].
        count: centres, at least 1 and at most the candidates.
        neighbours, ties: as for `density_peaks`.
        candidates: [N] bool, the tokens that are clustered; all unless given.

    Returns:
        ([M] long, [M] long): the M candidates, ascending, and the centre that each is in, both indices into `tokens`.
    """
    taken = torch.ones(len(tokens), dtype=torch.bool, device=tokens.device) if candidates is None else candidates
    peaks = density_peaks(tokens[None], taken[None], neighbours, ties)
    is_centre = top_tokens(peaks, count)[0]
    member, centre = taken.nonzero().squeeze(1), places(is_centre[None], [count])
    joined = centre[nearest(tokens[member], tokens[centre], "euclidean")]
    return member, torch.where(is_centre[member], member, joined)
