from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from vidcompress.ops.density_peaks import density_peaks
from vidcompress.ops.nearest import nearest
from vidcompress.ops.top_tokens import top_tokens


class Clusters(NamedTuple):
    """What `density_clusters` finds; all indices are into its tokens.

    Attributes:
        member: [M] the candidates, ascending.
        joined: [M] the centre that each is in.
        size: [M] fp32, members of that cluster.
        centre: [K] the centres, ascending.
    """

    member: Tensor
    joined: Tensor
    size: Tensor
    centre: Tensor


def density_clusters(
    tokens: Tensor,
    count: int,
    neighbours: int,
    ties: Literal["index", "strict"] = "index",
    candidates: Tensor | None = None,
    members: int | None = None,
) -> Clusters:
    taken = torch.ones(len(tokens), dtype=torch.bool, device=tokens.device) if candidates is None else candidates
    is_centre = top_tokens(density_peaks(tokens[None], taken[None], neighbours, ties), count)[0]
    member, centre = (x.nonzero().squeeze(1) for x in (taken, is_centre))
    joined = centre[nearest(tokens[member], tokens[centre], "euclidean")]
    joined = torch.where(is_centre[member], member, joined)
    return Clusters(member, joined, joined.bincount(minlength=len(tokens))[joined].float(), centre)
