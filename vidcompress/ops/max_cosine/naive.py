from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from vidcompress.ops.hashing import first_copies

CHUNK_ELEMENTS = 16 << 20
"""fp64 copies of tokens, and similarities, that exist at once."""


def max_cosine(tokens: Tensor, others: Tensor) -> Tensor:
    """The highest cosine of every token to any of `others` (Unified, eq. 8).

    Args:
        tokens: [N, C].
        others: [Q, C], at least one; a zero vector has cosine 0 with everything.

    Returns:
        [N] fp64: min-max scaling would magnify what fp32 rounds away where a few channels dominate all tokens. Equal
        tokens have equal ones.
    """
    unit = normalize(others.double(), dim=-1, eps=1e-300)
    step = max(1, CHUNK_ELEMENTS // max(tokens.shape[1], len(others)))
    parts = [(normalize(part.double(), dim=-1, eps=1e-300) @ unit.T).amax(1) for part in tokens.split(step)]
    return torch.cat(parts)[first_copies(tokens)]
