from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

CHUNK_ELEMENTS = 16 << 20
"""Similarities (and fp32 token copies) that exist at once."""


def anchor_merge(
    tokens: Tensor, members: Tensor, anchors: Sequence[Tensor], anchor_weight: float
) -> tuple[Tensor, Tensor, Tensor]:
    anchors = [frame for frame in anchors if frame.numel()]
    if not anchors:
        none = members.new_empty(0)
        return none, none, torch.empty(0, dtype=torch.float32, device=tokens.device)
    centre = torch.cat(anchors)
    unit = tokens[centre].float()
    unit = unit / unit.norm(dim=-1, keepdim=True).clamp_min(1e-30)
    sizes = [frame.numel() for frame in anchors]
    first = [sum(sizes[:i]) for i in range(len(sizes))]
    step = max(1, CHUNK_ELEMENTS // max(len(centre), tokens.shape[-1]))
    choices = []
    for part in members.split(step):
        # The member's own norm cannot change which anchor is the most similar.
        similarity = tokens[part].float() @ unit.T  # [m, anchors]
        frames = similarity.split(sizes, dim=1)
        choices.append(torch.stack([s.argmax(-1) + f for s, f in zip(frames, first, strict=True)]))  # [frames, m]
    joined = torch.cat(choices, dim=1) if choices else members.new_empty(len(anchors), 0)

    count = joined.flatten().bincount(minlength=len(centre))  # [anchors]
    own = (1 / (count + 1).float()).clamp_min(anchor_weight).where(count > 0, 1.0)
    share = (1 - own) / count.clamp_min(1)
    chosen = joined.flatten()
    return (
        torch.cat([centre, centre[chosen]]),
        torch.cat([centre, members.repeat(len(anchors))]),
        torch.cat([own, share[chosen]]),
    )
