from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor

Map = tuple[Tensor, Tensor, Tensor, Tensor]
"""(keep [K], slot [E], source [E], weight [E]) of a `Reduction`: a slot without triplets hands its own token on."""
Row = list[tuple[int, float]]


def compose(first: Map, second: Map, num_source: int) -> tuple[Tensor, Tensor, Tensor]:
    early, late, keep = _rows(first), _rows(second), first[0].tolist()
    total: dict[tuple[int, int], float] = defaultdict(float)
    for slot, own in enumerate(second[0].tolist()):
        if slot not in late and own not in early:
            continue
        for middle, b in late.get(slot, [(own, 1.0)]):
            for source, a in early.get(middle, [(keep[middle], 1.0)]):
                total[slot, source] += a * b
    pairs, device = sorted(total), first[0].device
    places = torch.tensor(pairs, dtype=torch.long, device=device).view(-1, 2)
    weight = torch.tensor([total[pair] for pair in pairs], dtype=torch.float32, device=device)
    return places[:, 0], places[:, 1], weight


def _rows(one: Map) -> dict[int, Row]:
    """(source, weight) of every slot that has triplets."""
    rows: dict[int, Row] = defaultdict(list)
    for slot, source, weight in zip(*(x.tolist() for x in one[1:]), strict=True):
        rows[slot].append((source, weight))
    return rows
