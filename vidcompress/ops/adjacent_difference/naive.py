from __future__ import annotations

from torch import Tensor
from torch.nn.functional import cosine_similarity


def adjacent_difference(tokens: Tensor, window: int = 4) -> Tensor:
    """Mean of 1 - cos between neighbouring frames at the same position (InfoMerge's Table 5; docs/decisions.md, D13).

    Args:
        tokens: [L, P, C], the frames of one segment, at least 2.
        window: frames are compared within windows of so many, at least 2, as in DyCoke.

    Returns:
        [P] fp32.
    """
    pairs = [i for i in range(tokens.shape[0] - 1) if (i + 1) % window]
    after = [i + 1 for i in pairs]
    return 1 - cosine_similarity(tokens[after].float(), tokens[pairs].float(), dim=-1, eps=1e-30).mean(0)
