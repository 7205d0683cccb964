from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize


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
    unit = normalize(frames.double(), dim=-1, eps=1e-30)
    index = torch.arange(members.numel(), device=frames.device).view_as(members)
    triplets = []
    for f in [f for f, count in enumerate(counts) if count]:
        start, end = reach[f]
        joins = members[start:end].clone()
        if not anchors_join and start <= f < end:
            joins[f - start] &= ~anchors[f]
        # Not a product of matrices, whose rounding may differ between columns that are equal.
        cosine = [(unit[start:end][joins] * anchor).sum(-1) for anchor in unit[f][anchors[f]]]
        choice = torch.stack(cosine, -1).argmax(-1)
        for a, anchor in enumerate(index[f][anchors[f]].tolist()):
            joined = index[start:end][joins][choice == a].tolist()
            own = max(1 / (len(joined) + 1), anchor_weight)
            triplets.append((anchor, anchor, own if joined else 1.0))
            triplets += [(anchor, source, (1 - own) / len(joined)) for source in joined]
    columns = list(zip(*triplets, strict=True)) or [(), (), ()]
    device = frames.device
    return (
        torch.tensor(columns[0], dtype=torch.long, device=device),
        torch.tensor(columns[1], dtype=torch.long, device=device),
        torch.tensor(columns[2], dtype=torch.float32, device=device),
    )
