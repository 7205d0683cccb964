from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor


def text_attention(
    query: Tensor,
    key: Tensor,
    scale: float,
    rows: Tensor,
    columns: Tensor,
    reduce: Literal["max", "none"] = "max",
) -> Tensor:
    keys = key.double().repeat_interleave(query.shape[0] // key.shape[0], dim=0)  # [H, N, D]
    logits = query.double() @ keys.transpose(-1, -2) * scale  # [H, Q, N]
    unseen = torch.arange(key.shape[1], device=key.device) > rows[:, None]
    weights = logits.masked_fill(unseen, -torch.inf).softmax(-1)[..., columns]
    return (weights.mean(0).amax(0) if reduce == "max" else weights).float()
