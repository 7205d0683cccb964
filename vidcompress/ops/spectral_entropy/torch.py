from __future__ import annotations

import math

import torch
from torch import Tensor


def spectral_entropy(tokens: Tensor) -> Tensor:
    x = tokens.float()
    rank = min(x.shape)
    # The Gram matrix of the shorter side has the squared singular values as its eigenvalues.
    gram = x @ x.T if x.shape[0] <= x.shape[1] else x.T @ x
    trace = gram.diagonal().double().sum()
    if rank < 2:
        return trace.new_zeros(())
    energy = torch.linalg.eigvalsh(gram / trace.clamp_min(1e-30).float()).double().clamp_min(0)
    share = energy / energy.sum().clamp_min(1e-30)
    return torch.special.entr(share).sum() / math.log(rank)
