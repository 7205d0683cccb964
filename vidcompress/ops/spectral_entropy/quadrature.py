"""Entropy of a spectrum without the spectrum: Cholesky factors and matrix products only, which GPUs are fast at."""

from __future__ import annotations

import math

import torch
from torch import Tensor

NODES = 16
"""Gauss-Legendre nodes on a logarithmic scale; with one more for what lies below them."""

LOWEST = 1e-7
"""Where the nodes begin, relative to the upper end."""

POWERS = 6
"""Matrix powers that exist at once; traces of up to twice as many follow from them."""

CHUNK_ELEMENTS = 32 << 20
"""Of shifted copies that are factored together."""


def spectral_sum(gram: Tensor) -> Tensor:
    """Sum of x log x over the eigenvalues x of a positive semidefinite matrix [n, n] in fp64, to about 1e-6.

    For T above four times the largest eigenvalue, x log x = (x + T) log(x + T) - T - (integral of log(x + t) from 0 to
    T). Summed over x the first term is a series in traces of powers, and the integrand is a log-determinant.
    """
    n = len(gram)
    top = 4 * gram.norm().clamp_min(torch.finfo(gram.dtype).tiny)  # the Frobenius norm is no less than any eigenvalue
    # (1 + s) log(1 + s) = s + sum over k of (-1)^k s^k / (k (k - 1)), for s = x / T up to 1/4.
    scaled = gram / top
    powers = [scaled]
    while len(powers) < POWERS:
        powers.append(powers[-1] @ scaled)
    series = powers[0].diagonal().sum()
    for k in range(2, 2 * POWERS + 1):
        a, b = powers[k // 2 - 1], powers[k - k // 2 - 1]
        series = series + (-1) ** k / (k * (k - 1)) * (a * b).sum()  # tr(AB) of symmetric A, B
    first = top.log() * (n * top + gram.diagonal().sum()) + top * series

    at, weight = _nodes(gram)
    shifts, volume = top * at, torch.empty_like(at)
    for part in torch.arange(len(at), device=gram.device).split(max(1, CHUNK_ELEMENTS // n**2)):
        shifted = gram.expand(len(part), n, n).clone()
        shifted.diagonal(dim1=1, dim2=2).add_(shifts[part, None])
        factor = torch.linalg.cholesky_ex(shifted).L
        volume[part] = 2 * factor.diagonal(dim1=1, dim2=2).log().sum(1)
    return first - n * top - top * (weight * volume).sum()


def _nodes(like: Tensor) -> tuple[Tensor, Tensor]:
    """([m], [m]) places and weights to integrate from 0 to 1 a function that grows like a logarithm."""
    # Golub and Welsch: the nodes are the eigenvalues of the Legendre polynomials' recurrence.
    k = torch.arange(1, NODES, dtype=torch.float64)
    beside = k / (4 * k.square() - 1).sqrt()
    x, vectors = torch.linalg.eigh(torch.diag(beside, 1) + torch.diag(beside, -1))
    length = -math.log(LOWEST)
    at = (length * (x - 1) / 2).exp()
    weight = length * vectors[0].square() * at  # dt = t d(log t)
    # Below: exact for a logarithm.
    end = torch.tensor([LOWEST], dtype=torch.float64)
    return torch.cat([end / math.e, at]).to(like), torch.cat([end, weight]).to(like)
