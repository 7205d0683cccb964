from __future__ import annotations

import torch
from torch import Tensor

CHUNK_BYTES = {"cpu": 4 << 20, "cuda": 64 << 20}
"""Workspace: fp32 copies of so many positions at once."""


@torch.no_grad()
def cosine_fingerprint(tokens: Tensor) -> Tensor:
    length, positions, channels = tokens.shape
    out = torch.zeros(positions, dtype=torch.float32, device=tokens.device)
    if length == 1:
        return out
    room = CHUNK_BYTES.get(tokens.device.type, 64 << 20)
    step = max(1, min(positions, room // (8 * length * channels + 16 * length * length)))
    steps = torch.empty(step, length, channels, dtype=torch.float32, device=tokens.device)
    for p in range(0, positions, step):
        x = tokens[:, p : p + step].transpose(0, 1).float()  # [p, L, C]
        out[p : p + step] = _changes(*_products(x, steps[: len(x)])).abs_().mean((1, 2))
    return out


def _products(x: Tensor, steps: Tensor) -> tuple[Tensor, Tensor]:
    """x_i . x_j [p, L, L] and d_i . x_j [p, L - 1, L] of the steps d_i = x_i+1 - x_i, for which `steps` [p, L, C] is
    room.

    The former are sums of the latter and x_0 . x_j: one product does for both where no token is far longer than
    another, from which it could not be reached without losing digits. A GPU is not asked whether that is so.
    """
    steps[:, 0] = x[:, 0]
    torch.sub(x[:, 1:], x[:, :-1], out=steps[:, 1:])
    moved = torch.bmm(steps, x.transpose(1, 2))
    if not x.is_cuda:
        gram = moved.cumsum(1, dtype=torch.float64).float()
        square = gram.diagonal(dim1=1, dim2=2)
        if (square.amax(1) <= 4 * square.amin(1)).all():
            return gram, moved[:, 1:]
    return torch.bmm(x, x.transpose(1, 2)), moved[:, 1:]


def _changes(gram: Tensor, moved: Tensor) -> Tensor:
    """[p, L - 1, L] (u_i+1 - u_i) . u_j of unit tokens, from x_i . x_j [p, L, L] and, with the steps d_i = x_i+1 - x_i,
    d_i . x_j [p, L - 1, L].

    The difference of two cosines near 1 cancels, and so does u_i+1 - u_i. It is d_i / |x_i+1| less u_i times what the
    norm grows by, relative to |x_i+1|, which is known from d_i, too; all that is exactly 0 where d_i is. Only where the
    norm falls by more than half this loses digits that the difference of cosines keeps.
    """
    norm = gram.diagonal(dim1=1, dim2=2).sqrt()  # [p, L]
    inverse = 1 / norm.clamp_min(1e-30)
    before, after = inverse[:, :-1, None], inverse[:, 1:, None]
    cosine = gram * inverse[:, None]  # not yet divided by |x_i|
    both = moved.diagonal(dim1=1, dim2=2) + moved.diagonal(1, dim1=1, dim2=2)  # d_i . (x_i + x_i+1)
    growth = both / (norm[:, :-1] + norm[:, 1:]).clamp_min(1e-30)  # |x_i+1| - |x_i|
    careful = (moved * inverse[:, None] - cosine[:, :-1] * (growth[..., None] * before)) * after
    plain = cosine[:, 1:] * after - cosine[:, :-1] * before
    return careful.where((2 * norm[:, 1:] >= norm[:, :-1])[..., None], plain)
