from __future__ import annotations

import math

import torch
from torch import Tensor

from vidcompress.ops.spectral_entropy.quadrature import spectral_sum

DETERMINANTS = {"cpu": False, "cuda": True}
"""Whether seventeen Cholesky factors are faster than eigenvalues, which wait for one small step after another."""

CHUNK_ROWS = 1024
"""Tokens whose fp64 copies exist at once when there are more tokens than channels."""


def spectral_entropy(tokens: Tensor) -> Tensor:
    rank = min(tokens.shape)
    gram = _gram(tokens)
    trace = gram.diagonal().sum()
    if rank < 2:
        return trace.new_zeros(())
    gram /= trace.clamp_min(1e-30)
    if DETERMINANTS.get(gram.device.type, True):
        return (-spectral_sum(gram) / math.log(rank)).clamp(0, 1)
    energy = torch.linalg.eigvalsh(gram).clamp_min(0)
    share = energy / energy.sum().clamp_min(1e-30)
    return torch.special.entr(share).sum() / math.log(rank)


def _gram(x: Tensor) -> Tensor:
    """Gram matrix of the shorter side: its eigenvalues are the squared singular values.

    In fp64, because a video at rest has rank 1, and fp32 would give it an entropy made of noise.
    """
    n, channels = x.shape
    if n <= channels:
        rows = x.double()
        return rows @ rows.T
    gram = torch.zeros(channels, channels, dtype=torch.float64, device=x.device)
    for part in x.split(CHUNK_ROWS):
        rows = part.double()
        gram.addmm_(rows.T, rows)
    return gram
