from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vidcompress.ops.compose.torch import summed
from vidcompress.ops.table import table


def through_means(
    slot: Tensor,
    source: Tensor,
    weight: Tensor,
    alone: int,
    replaced: Tensor,
    segments: Sequence[tuple[int, int]],
    ask: Tensor,
) -> tuple[Tensor, Tensor, Tensor, int]:
    p, n = replaced.shape[1], replaced.numel()
    spans = table([(start, end - start) for start, end in segments for _ in range(start, end)], slot.device).view(-1, 2)
    mixed = replaced.flatten()[source]
    kept = (~mixed).index_fill_(0, torch.arange(alone, device=slot.device), False)
    keys, shares = slot[kept] * n + source[kept], weight[kept].double()
    # A position's replaced tokens are all the same, so that what a slot takes of them is added up before it is spread.
    begin = spans[source[mixed] // p, 0] * p
    to, token, share = summed(slot[mixed] * n + begin + source[mixed] % p, weight[mixed].double(), n)
    length = spans[token // p, 1]
    one = torch.arange(len(to), device=slot.device).repeat_interleave(length)
    step = torch.arange(len(one), device=slot.device) - (length.cumsum(0) - length)[one]
    keys = torch.cat([keys, to[one] * n + token[one] + step * p])
    shares = torch.cat([shares, (share / length)[one]])
    slot, source, total = summed(keys, shares, n)
    return slot, source, total.float(), int(ask)
