"""The papers' steps as one would write them first: matrices of all pairs, loops, nothing shared.

What `bench_inside.py` measures the library against. The library's own definitions (`naive.py`) are no measure: they
are made to be read and to be exact, these to be written quickly.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from vidcompress.methods.fastvid import FastVID
from vidcompress.tokens import VideoTokens


def received_attention(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """All attention matrices of a tower layer, then their column mean."""
    return (query @ key.transpose(-1, -2) * scale).softmax(-1).mean((1, 2))


def retention_pool(x: Tensor, order: Tensor, threshold: float, size: int) -> Tensor:
    """One candidate at a time, the pool gathered anew for each."""
    unit, pool = nn.functional.normalize(x, dim=-1), []
    for i in order.tolist():
        if len(pool) == size:
            break
        if not pool or (unit[pool] @ unit[i]).max() < threshold:
            pool.append(i)
    return torch.tensor(pool)


def retention_pool_in_a_buffer(x: Tensor, order: Tensor, threshold: float, size: int) -> Tensor:
    """One candidate at a time, the pool in a buffer."""
    unit, pool = nn.functional.normalize(x, dim=-1), []
    held = x.new_empty(size, x.shape[1])
    for i in order.tolist():
        if len(pool) == size:
            break
        if not pool or (held[: len(pool)] @ unit[i]).max() < threshold:
            held[len(pool)] = unit[i]
            pool.append(i)
    return torch.tensor(pool)


def cosines(x: Tensor, others: Tensor) -> Tensor:
    """All cosines at once."""
    return nn.functional.normalize(x, dim=-1) @ nn.functional.normalize(others, dim=-1).mT


def density_peaks(x: Tensor, k: int) -> Tensor:
    """Density peaks of sets of tokens [B, n, C], the distances of all pairs in all sets at once."""
    distance = torch.cdist(x, x) / x.shape[2] ** 0.5
    density = (-(distance.topk(k, largest=False).values ** 2).mean(-1)).exp()
    denser = (density[:, None] > density[:, :, None]).float()
    largest = distance.flatten(1).amax(1)[:, None, None]
    delta = (distance * denser + largest * (1 - denser)).min(-1).values
    return delta * density


def nearest(x: Tensor, centres: Tensor) -> Tensor:
    """The nearest centre, read off the distances of all pairs."""
    return torch.cdist(x, x)[:, centres].argmin(1)


def cosine_fingerprint(x: Tensor) -> Tensor:
    """Position by position, as differences of cosines."""
    out = []
    for p in range(x.shape[1]):
        unit = nn.functional.normalize(x[:, p], dim=-1)
        out.append((unit @ unit.T).diff(dim=0).abs().mean())
    return torch.stack(out)


def spectral_entropy(x: Tensor) -> Tensor:
    """From singular values."""
    share = torch.linalg.svdvals(x).square()
    return torch.special.entr(share / share.sum()).sum() / math.log(min(x.shape))


def merge(x: Tensor, slot: Tensor, count: int) -> Tensor:
    """Group means by a dense matrix."""
    dense = torch.zeros(count, len(x)).index_put_((slot, torch.arange(len(x))), torch.ones(len(x)))
    return dense / dense.sum(1, keepdim=True) @ x


def dpp_map(x: Tensor, relevance: Tensor, k: int) -> Tensor:
    """Greedy MAP with the whole kernel."""
    weighted = relevance[:, None] * x
    kernel = weighted @ weighted.T / x.shape[1]
    rows, left, picks = torch.zeros(k, len(x)), kernel.diagonal().clone(), []
    for i in range(k):
        j = int(left.argmax())
        picks.append(j)
        row = (kernel[j] - rows[:i, j] @ rows[:i]) / left[j].clamp(min=1e-12).sqrt()
        rows[i] = row
        left -= row * row
        left[j] = -math.inf
    return torch.tensor(picks)


def fastvid(method: FastVID, tokens: VideoTokens) -> Tensor:
    """[K, C] all of FastVID with `remainder: official`, arranged as in the official code: frame by frame the most
    attended tokens, and the rest of a segment, copied for each of its anchor frames, merged into the anchors there.
    """
    t, h, w = tokens.grid
    x, index = tokens.frames, torch.arange(len(tokens), device=tokens.features.device).view(t, h * w)
    seen, attention = tokens.signal("frame_features"), tokens.signal("saliency.head").view(t, h * w)
    alike = nn.functional.cosine_similarity(seen[1:], seen[:-1], dim=-1)
    cut = alike < method.dyseg_tau
    cut[alike.argsort()[: method.dyseg_c - 1]] = True
    starts = [0, *(cut.nonzero().squeeze(1) + 1).tolist()]
    per_frame = int(method.retention_ratio * h * w)
    context = int(per_frame * method.context_share)
    order = attention.argsort(dim=1, descending=True)
    salient, rest = order.split([per_frame - context, h * w - per_frame + context], dim=1)
    rest = rest.sort(dim=1).values  # [T, M]
    places, kept = [index.gather(1, salient).flatten()], [_taken(x, salient).flatten(0, 1)]
    others, index = _taken(x, rest), index.gather(1, rest)  # [T, M, C]
    for start, end in zip(starts, [*starts[1:], t], strict=True):
        own = list(range(start, end)[:: -method.anchor_interval])
        count = context * (end - start) // len(own)
        if not count:
            continue
        peaks = density_peaks(others[own], method.neighbours).topk(count).indices  # [A, K]
        target = _taken(others[own], peaks)  # [A, K, C]
        source = others[own] if count == context else others[start:end].flatten(0, 1).expand(len(own), -1, -1)
        nearest = cosines(target, source).argmax(1, keepdim=True)  # [A, 1, L * M]
        one_hot = x.new_zeros(len(own), count, source.shape[1]).scatter_(1, nearest, 1)
        joined = one_hot.sum(2, keepdim=True)
        weight = (1 / (joined + 1)).clamp_min(method.beta)
        kept.append((weight * target + (1 - weight) * (one_hot / joined @ source)).flatten(0, 1))
        places.append(index[own].gather(1, peaks).flatten())
    return torch.cat(kept)[torch.cat(places).argsort()]


def _taken(x: Tensor, index: Tensor) -> Tensor:
    """[B, k, C] of [B, n, C]."""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[2]))
