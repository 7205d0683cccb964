from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

CHUNK_BYTES = {"cpu": 8 << 20, "cuda": 64 << 20}
"""fp32 copies of so many tokens at once."""


def merge(features: Tensor, keep: Tensor, slot: Tensor, source: Tensor, weight: Tensor) -> Tensor:
    slot, order = slot.sort(stable=True)
    mixed, count = slot.unique_consecutive(return_counts=True)  # [S] slots that have triplets
    out = features[keep]
    if not mixed.numel():
        return out
    source, weight, ends = source[order], weight[order].float(), count.cumsum(0)
    first = ends - count
    # A weighted bag of rows a slot: summed in order, unlike atomic adds, and without an [E, C] product.
    if features.dtype == torch.float32:
        return out.index_copy_(0, mixed, _bags(features, source, first, weight))
    room = max(1, CHUNK_BYTES.get(features.device.type, 64 << 20) // 4)  # elements
    for a, b, low, high in _runs(ends.tolist(), room // features.shape[1]):
        rows, every = source[low:high], torch.arange(high - low, device=source.device)
        # As many columns as fit, should a single slot have more rows than do.
        columns = features.split(max(1, room // (high - low)), dim=1)
        sums = [
            _bags(part.index_select(0, rows).float(), every, first[a:b] - low, weight[low:high]) for part in columns
        ]
        out.index_copy_(0, mixed[a:b], torch.cat(sums, dim=1).to(features.dtype))
    return out


def _bags(rows: Tensor, index: Tensor, first: Tensor, weight: Tensor) -> Tensor:
    """[S, C] weighted sums of the rows of bags that begin at `first` [S] of `index`."""
    return embedding_bag(index, rows.contiguous(), first, mode="sum", per_sample_weights=weight)


def _runs(ends: list[int], most: int) -> Iterator[tuple[int, int, int, int]]:
    """Slots a to b and their triplets, from low to high, as many slots at once as have at most `most` triplets."""
    a = low = 0
    while a < len(ends):
        b = max(a + 1, bisect_right(ends, low + most))
        yield a, b, low, ends[b - 1]
        a, low = b, ends[b - 1]
