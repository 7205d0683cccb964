"""Entropy of a spectrum without the spectrum: Cholesky factors and matrix products only, which GPUs are fast at."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

NODES = 18
"""Gauss-Legendre nodes on a logarithmic scale; with one more for what lies below them."""

ABOVE = 16
"""Where the integral ends: so many times what no eigenvalue exceeds."""

LOWEST = 2.5e-8
"""Where the nodes begin, relative to that end."""

POWERS = 2
"""Matrix powers that exist at once; traces of up to twice as many follow from them."""

CHUNK_ELEMENTS = {"cpu": 32 << 20, "cuda": 64 << 20}
"""Of shifted copies that are factored together."""


def spectral_sums(gram: Tensor) -> Tensor:
    """[B] sums of x log x over the eigenvalues x of positive semidefinite matrices [B, n, n] in fp64, to about 1e-6.

    For T above the largest eigenvalue, x log x = (x + T) log(x + T) - T - (integral of log(x + t) from 0 to
    T). Summed over x the first term is a series in traces of powers, and the integrand is a log-determinant.
    """
    count, n, _ = gram.shape
    # The Frobenius norm is no less than any eigenvalue.
    top = ABOVE * torch.linalg.matrix_norm(gram).clamp_min(torch.finfo(gram.dtype).tiny)  # [B]
    # (1 + s) log(1 + s) = s + sum over k of (-1)^k s^k / (k (k - 1)), for s = x / T up to 1 / ABOVE.
    powers = gram.new_empty(POWERS, count, n, n)
    torch.div(gram, top[:, None, None], out=powers[0])
    for k in range(1, POWERS):
        torch.bmm(powers[k - 1], powers[0], out=powers[k])
    flat = powers.flatten(2).transpose(0, 1)  # [B, POWERS, n * n]
    traces = flat @ flat.mT  # [B, POWERS, POWERS] tr(AB) of symmetric A, B
    total = gram.diagonal(dim1=1, dim2=2).sum(1)
    series = total / top + (traces * coefficients(gram.device)).sum((1, 2))
    first = top.log() * (n * top + total) + top * series

    at, weight = nodes(gram.device)
    shifts = torch.outer(top, at)
    volume = torch.empty_like(shifts)  # [B, m]
    step = nodes_at_once(gram)
    for a in range(0, len(at), step):
        part = slice(a, a + step)
        shifted = gram[:, None].expand(-1, len(at[part]), -1, -1).clone()
        shifted.diagonal(dim1=2, dim2=3).add_(shifts[:, part, None])
        factor = torch.linalg.cholesky_ex(shifted).L
        volume[:, part] = 2 * factor.diagonal(dim1=2, dim2=3).log().sum(2)
    return first - top * (n + volume @ weight)


def nodes_at_once(gram: Tensor) -> int:
    """For how many nodes shifted copies of matrices [B, n, n] fit."""
    return max(1, CHUNK_ELEMENTS.get(gram.device.type, 32 << 20) // gram.numel())


@functools.cache
def coefficients(device: torch.device) -> Tensor:
    """[POWERS, POWERS] fp64: what the trace of a product of two powers counts in the series."""
    out = torch.zeros(POWERS, POWERS, dtype=torch.float64)
    for k in range(2, 2 * POWERS + 1):
        out[k // 2 - 1, k - k // 2 - 1] = (-1) ** k / (k * (k - 1))
    return out.to(device)


@functools.cache
def nodes(device: torch.device) -> Tensor:
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
    return torch.stack([torch.cat([end / math.e, at]), torch.cat([end, weight])]).to(device)
