from __future__ import annotations

import math

import torch
from torch import Tensor


def spectral_entropy(tokens: Tensor) -> Tensor:
    energy = torch.linalg.svdvals(tokens.double()) ** 2  # [R]
    if energy.numel() < 2 or energy.sum() == 0:
        return energy.new_zeros(())
    share = energy / energy.sum()
    return torch.special.entr(share).sum() / math.log(energy.numel())
