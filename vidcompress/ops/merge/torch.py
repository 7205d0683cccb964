from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

CHUNK_BYTES = {"cpu": 16 << 20, "cuda": 64 << 20}
"""fp32 copies of so many channels at once."""


def merge(features: Tensor, keep: Tensor, slot: Tensor, source: Tensor, weight: Tensor) -> Tensor:
    slot, order = slot.sort(stable=True)
    mixed, count = slot.unique_consecutive(return_counts=True)  # [S] slots that have triplets
    if not mixed.numel():
        return features[keep]
    # A weighted bag of rows a slot: no [E, C] gather, and summed in order, unlike atomic adds.
    bag = {"input": source[order], "offsets": count.cumsum(0) - count, "per_sample_weights": weight[order].float()}
    step = features.shape[1]
    if features.dtype != torch.float32:
        step = max(1, CHUNK_BYTES.get(features.device.type, 64 << 20) // (4 * features.shape[0]))
    parts = [embedding_bag(weight=part.float().contiguous(), mode="sum", **bag) for part in features.split(step, dim=1)]
    return features[keep].index_copy(0, mixed, torch.cat(parts, dim=1).to(features.dtype))
