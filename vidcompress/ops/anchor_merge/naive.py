from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize


def anchor_merge(
    tokens: Tensor, members: Tensor, anchors: Sequence[Tensor], anchor_weight: float
) -> tuple[Tensor, Tensor, Tensor]:
    unit = normalize(tokens.double(), dim=-1, eps=1e-30)
    triplets = []
    for frame in anchors:
        choice = (unit[members] @ unit[frame].T).argmax(-1) if len(frame) else members.new_empty(0)
        for a, anchor in enumerate(frame.tolist()):
            joined = members[choice == a].tolist()
            own = max(1 / (len(joined) + 1), anchor_weight)
            triplets.append((anchor, anchor, own if joined else 1.0))
            triplets += [(anchor, source, (1 - own) / len(joined)) for source in joined]
    columns = list(zip(*triplets, strict=True)) or [(), (), ()]
    device = tokens.device
    return (
        torch.tensor(columns[0], dtype=torch.long, device=device),
        torch.tensor(columns[1], dtype=torch.long, device=device),
        torch.tensor(columns[2], dtype=torch.float32, device=device),
    )
