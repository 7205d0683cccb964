from __future__ import annotations

import torch
from torch import Tensor

from vidcompress.ops.compose.naive import Map


def compose(first: Map, second: Map, num_source: int) -> tuple[Tensor, Tensor, Tensor]:
    keep, *early = first
    own, slot, middle, b = second
    # What the second map hands on has a triplet here if the first mixed it.
    handed = _without(slot, len(own)) & ~_without(early[0], len(keep))[own]
    handed = handed.nonzero().squeeze(1)
    slot, middle = torch.cat([slot, handed]), torch.cat([middle, own[handed]])
    b = torch.cat([b.double(), torch.ones_like(handed, dtype=torch.float64)])
    # Every triplet meets all of its middle's, or the middle itself.
    alone = _without(early[0], len(keep)).nonzero().squeeze(1)
    row, order = torch.cat([early[0], alone]).sort(stable=True)
    source = torch.cat([early[1], keep[alone]])[order]
    a = torch.cat([early[2].double(), torch.ones_like(alone, dtype=torch.float64)])[order]
    begin = torch.searchsorted(row, torch.arange(len(keep) + 1, device=keep.device))
    each = begin.diff()[middle]
    pair = torch.arange(len(each), device=keep.device).repeat_interleave(each)
    place = torch.arange(len(pair), device=keep.device) - (each.cumsum(0) - each - begin[middle])[pair]
    slot, source, weight = summed(slot[pair] * num_source + source[place], a[place] * b[pair], num_source)
    return slot, source, weight.float()


def summed(key: Tensor, weight: Tensor, num_source: int) -> tuple[Tensor, Tensor, Tensor]:
    """Triplets, fp64, from keys slot * num_source + source: equal ones add up, in order."""
    if not len(key):
        return key, key, weight
    key, order = key.sort(stable=True)
    key, lengths = key.unique_consecutive(return_counts=True)
    weight = torch.segment_reduce(weight[order], "sum", lengths=lengths)
    return key // num_source, key % num_source, weight


def _without(slot: Tensor, count: int) -> Tensor:
    """[count] bool: slots that have no triplets."""
    out = torch.ones(count, dtype=torch.bool, device=slot.device)
    out[slot] = False
    return out
