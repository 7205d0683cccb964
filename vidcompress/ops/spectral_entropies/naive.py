from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vidcompress.ops.spectral_entropy import spectral_entropy


def spectral_entropies(tokens: Tensor, segments: Sequence[tuple[int, int]]) -> Tensor:
    out = torch.zeros(len(segments), dtype=torch.float64, device=tokens.device)
    for k, (start, end) in enumerate(segments):
        out[k] = spectral_entropy(tokens[start:end].flatten(0, 1))
    return out
