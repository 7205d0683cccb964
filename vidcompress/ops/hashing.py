"""Telling equal tokens from different ones, by one number each."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

CHUNK_ELEMENTS = {"cpu": 1 << 16, "cuda": 16 << 20}
"""Elements of tokens that exist in whole numbers at once."""


def hashes(tokens: Tensor, chosen: Tensor) -> Tensor:
    """[m] sums of the bits of the tokens [n, C] at `chosen` [m] with random odd factors, modulo 2^64.

    Different tokens agree by chance once in some 10^14 pairs.
    """
    wide = tokens.dtype == torch.float64
    sums, factor = [], factors(tokens.shape[1], tokens.device)
    for part in chosen.split(max(1, CHUNK_ELEMENTS.get(tokens.device.type, 1 << 20) // tokens.shape[1])):
        x = tokens.index_select(0, part).to(torch.float64 if wide else torch.float32) + 0.0  # -0 becomes 0
        sums.append((x.view(torch.int64 if wide else torch.int32) * factor).sum(1))
    return torch.cat(sums)


def first_copies(tokens: Tensor) -> Tensor:
    """[n] where the first token is that equals each of the tokens [n, C]: rows of a product of matrices need not be
    rounded alike where their factors are equal.
    """
    every = torch.arange(len(tokens), device=tokens.device)
    value, order = hashes(tokens, every).sort(stable=True)
    starts = torch.nn.functional.pad(value[1:] != value[:-1], (1, 0))
    head = order[every.where(starts, 0).cummax(0).values] if len(tokens) else order
    return torch.empty_like(order).scatter_(0, order, head)


@functools.cache
def factors(channels: int, device: torch.device) -> Tensor:
    """[C] random odd numbers."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(-(2**62), 2**62, (channels,), generator=generator).mul_(2).add_(1).to(device)
