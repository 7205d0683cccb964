from __future__ import annotations

import math

import torch
from torch import Tensor

from vidcompress.ops.spectral_entropy import determinants

DETERMINANTS = {"cpu": False, "cuda": True}
"""Whether a dozen Cholesky factors are faster than eigenvalues, which wait for one small step after another."""

BLOCK_ROWS = {"cpu": 256}
"""Rows of a symmetric product that are made at once, where launching so many products costs nothing."""

CHUNK_ROWS = 1024
"""Tokens whose fp64 copies exist at once when there are more tokens than channels."""


def spectral_entropy(tokens: Tensor) -> Tensor:
    rank = min(tokens.shape)
    gram = gram_of(tokens)
    if rank < 2:
        return gram.new_zeros(())
    if DETERMINANTS.get(gram.device.type, True):
        return (determinants.entropies(gram[None])[0] / math.log(rank)).clamp(0, 1)
    gram /= gram.diagonal().sum().clamp_min(1e-30)
    energy = torch.linalg.eigvalsh(gram).clamp_min(0)
    share = energy / energy.sum().clamp_min(1e-30)
    return torch.special.entr(share).sum() / math.log(rank)


def gram_of(x: Tensor) -> Tensor:
    """Gram matrix of the shorter side: its eigenvalues are the squared singular values.

    In fp64, because a video at rest has rank 1, and fp32 would give it an entropy made of noise.
    """
    n, channels = x.shape
    side, step = min(n, channels), BLOCK_ROWS.get(x.device.type, max(n, 1))
    gram = torch.zeros(side, side, dtype=torch.float64, device=x.device)
    blocks = [slice(a, a + step) for a in range(0, side, step)]
    for part in x.split(CHUNK_ROWS) if n > channels else [x]:
        rows = part.double().T if n > channels else part.double()
        for own in blocks:  # what lies above the diagonal is what lies below it
            gram[own, : own.stop].addmm_(rows[own], rows[: own.stop].T)
    for own in blocks[1:]:
        gram[: own.start, own] = gram[own, : own.start].T
    return gram
