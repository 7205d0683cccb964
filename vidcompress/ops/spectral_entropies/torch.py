from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from vidcompress.ops.spectral_entropies import naive
from vidcompress.ops.spectral_entropy import torch as one
from vidcompress.ops.spectral_entropy.determinants import entropies
from vidcompress.ops.table import table

CHUNK_ELEMENTS = 32 << 20
"""Of fp64 copies of tokens, and of their Gram matrices, that exist at once."""

ALIKE = 0.7
"""Matrices that are no smaller than so much of another are padded to its size: at worst thrice the work."""

SMALL = 1024
"""Matrices up to so large are padded to any size up to this: for a GPU that is less than to ask it once more."""


def spectral_entropies(tokens: Tensor, segments: Sequence[tuple[int, int]]) -> Tensor:
    if not one.DETERMINANTS.get(tokens.device.type, True):
        return naive.spectral_entropies(tokens, segments)
    (_, p, channels), flat, device = tokens.shape, tokens.flatten(0, 1), tokens.device
    out = torch.zeros(len(segments), dtype=torch.float64, device=device)
    sizes = [(end - start) * p for start, end in segments]
    for group in groups(sizes, channels):
        most = sizes[group[0]]
        if most > channels:
            gram = torch.stack([one.gram_of(flat[a * p : b * p]) for a, b in (segments[k] for k in group)])
        else:
            begin, size = table([(segments[k][0] * p, sizes[k]) for k in group], device).T[..., None]
            place = torch.arange(most, device=device)
            inside = place < size  # [B, n]
            rows = flat[torch.where(inside, begin + place, 0)].double().mul_(inside[..., None])
            gram = rows @ rows.mT
        rank = table([min(sizes[k], channels) for k in group], device, torch.float64)
        out[table(group, device)] = (entropies(gram) / rank.log()).clamp_(0, 1)
    return out


def groups(sizes: Sequence[int], channels: int) -> Iterator[list[int]]:
    """Segments whose matrices are of about the same size, as many together as fit, the largest first; nothing is to be
    done for those that cannot spread over two directions."""
    group: list[int] = []
    for k in sorted((k for k, n in enumerate(sizes) if min(n, channels) > 1), key=lambda k: -sizes[k]):
        if group:
            most = sizes[group[0]]
            elements = channels**2 if most > channels else most * channels
            alike = sizes[k] > channels if most > channels else most <= SMALL or sizes[k] >= ALIKE * most
            if not alike or (len(group) + 1) * elements > CHUNK_ELEMENTS:
                yield group
                group = []
        group.append(k)
    if group:
        yield group
