from __future__ import annotations

import torch
from torch import Tensor


def breaches(keep: Tensor, slot: Tensor, source: Tensor, weight: Tensor, num_source: int) -> Tensor:
    kept = (keep < 0) | (keep >= num_source)
    kept[1:] |= keep.diff() <= 0
    mixed = (slot < 0) | (slot >= len(keep)) | (source < 0) | (source >= num_source) | ~torch.isfinite(weight)
    return kept.sum() + mixed.sum()
