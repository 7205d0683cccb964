"""Entropy of a spectrum without the spectrum: Cholesky factors and matrix products only, which GPUs are fast at."""

from __future__ import annotations

import functools
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
    powers = gram.new_empty(POWERS, n, n)
    torch.div(gram, top, out=powers[0])
    for k in range(1, POWERS):
        torch.mm(powers[k - 1], powers[0], out=powers[k])
    flat = powers.flatten(1)
    traces = flat @ flat.T  # [POWERS, POWERS] tr(AB) of symmetric A, B
    series = powers[0].diagonal().sum() + (traces * _coefficients().to(gram)).sum()
    first = top.log() * (n * top + gram.diagonal().sum()) + top * series

    at, weight = _nodes().to(gram)
    shifts, volume = top * at, torch.empty_like(at)
    for part in torch.arange(len(at), device=gram.device).split(max(1, CHUNK_ELEMENTS // n**2)):
        shifted = gram.expand(len(part), n, n).clone()
        shifted.diagonal(dim1=1, dim2=2).add_(shifts[part, None])
        factor = torch.linalg.cholesky_ex(shifted).L
        volume[part] = 2 * factor.diagonal(dim1=1, dim2=2).log().sum(1)
    return first - n * top - top * (weight * volume).sum()


@functools.cache
def _coefficients() -> Tensor:
    """[POWERS, POWERS] fp64: what the trace of a product of two powers counts in the series."""
    out = torch.zeros(POWERS, POWERS, dtype=torch.float64)
    for k in range(2, 2 * POWERS + 1):
        out[k // 2 - 1, k - k // 2 - 1] = (-1) ** k / (k * (k - 1))
    return out


@functools.cache
def _nodes() -> Tensor:
    """[2, m] fp64 places and weights to integrate from 0 to 1 a function that grows like a logarithm."""
    # Golub and Welsch: the nodes are the eigenvalues of the Legendre polynomials' recurrence.
    k = torch.arange(1, NODES, dtype=torch.float64)
    beside = k / (4 * k.square() - 1).sqrt()
    x, vectors = torch.linalg.eigh(torch.diag(beside, 1) + torch.diag(beside, -1))
    length = -math.log(LOWEST)
    at = (length * (x - 1) / 2).exp()
    weight = length * vectors[0].square() * at  # dt = t d(log t)
    # Below: exact for a logarithm.
    end = torch.tensor([LOWEST], dtype=torch.float64)
    return torch.stack([torch.cat([end / math.e, at]), torch.cat([end, weight])])
