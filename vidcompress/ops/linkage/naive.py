from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

CHUNK_FRAMES = 8
"""Frames whose fp32 copies exist at once."""


def linkage(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """A tree of highest cosines over the tokens of every frame (Prim's).

    Cut at the links that are not above a threshold, it falls into the connected components of the graph that links
    tokens whose cosine is above it, whatever the threshold.

    Args:
        tokens: [T, P, C].

    Returns:
        [T, P] long, the token of its frame to which each is linked, itself for token 0; and [T, P] fp32, their cosine,
        -inf for token 0.
    """
    t, p, _ = tokens.shape
    unit = [normalize(part.float(), dim=-1, eps=1e-30) for part in tokens.split(CHUNK_FRAMES)]
    cosine = torch.cat([part @ part.mT for part in unit])  # [T, P, P]
    frame = torch.arange(t, device=tokens.device)
    to = torch.zeros(t, p, dtype=torch.long, device=tokens.device)
    best = cosine[:, 0].clone()
    open_ = torch.ones(t, p, dtype=torch.bool, device=tokens.device)
    open_[:, 0] = False
    for _ in range(p - 1):
        new = best.masked_fill(~open_, -torch.inf).argmax(1)
        open_[frame, new] = False
        near = cosine[frame, new]
        closer = (near > best) & open_
        best = torch.where(closer, near, best)
        to = torch.where(closer, new[:, None], to)
    best[:, 0] = -torch.inf
    return to, best
