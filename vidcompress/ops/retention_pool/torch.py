from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from vidcompress.ops.retention_pool.naive import ROUNDING

BLOCK_TOKENS = {"cpu": 256, "cuda": 1024}
"""Tokens that are held against the pool together, and then against each other."""

POOL_TOKENS = 4096
"""Pool tokens a block is held against at once."""


def margin(channels: int) -> float:
    """Where an fp32 cosine is nearer to the threshold than this, it is measured again in fp64."""
    return max(1e-6, 2.0**-22 * channels**0.5)  # a GPU's products add channel after channel


def retention_pool(tokens: Tensor, order: Tensor, threshold: float, size: int) -> Tensor:
    pool = order.new_empty(0)  # [m]
    unit = torch.empty(0, tokens.shape[1], dtype=torch.float32, device=tokens.device)  # [room for m, C] normalised
    for block in order.split(BLOCK_TOKENS.get(tokens.device.type, 1024)):
        room = size - len(pool)
        if room <= 0:
            break
        x = tokens[block].float()  # [b, C]
        length = x.norm(dim=-1, keepdim=True).clamp_min_(1e-30)
        if len(pool):  # which is normalised, but most tokens need not be
            unlike = (~_reaches(tokens, block, x, length, pool, unit, threshold)).nonzero().squeeze(1)
            block, x, length = block[unlike], x[unlike], length[unlike]
        z = x / length
        accepted = _first_come(_alike(tokens, block, z, threshold)).nonzero().squeeze(1)[:room]
        have, total = len(pool), len(pool) + len(accepted)
        if total > len(unit):
            unit = torch.cat([unit[:have], unit.new_empty(max(total, 2 * have) - have, unit.shape[1])])
        unit[have:total] = z[accepted]
        pool = torch.cat([pool, block[accepted]])
    return pool


def _reaches(
    tokens: Tensor, block: Tensor, x: Tensor, length: Tensor, pool: Tensor, unit: Tensor, threshold: float
) -> Tensor:
    """[b] bool: whose cosine to some token of the pool reaches the threshold."""
    reached, doubt = torch.zeros(len(block), dtype=torch.bool, device=block.device), margin(tokens.shape[1])
    for start in range(0, len(pool), POOL_TOKENS):
        part = pool[start : start + POOL_TOKENS]
        cosine = (x @ unit[start : start + len(part)].T).div_(length)  # [b, p]
        top = cosine.amax(1)
        reached |= top >= threshold + doubt
        unsure = (~reached & (top > threshold - doubt)).nonzero().squeeze(1)
        if len(unsure):
            near = (cosine[unsure] > threshold - doubt).any(0)
            reached[unsure] |= (_cosines(tokens, block[unsure], part[near]) >= threshold - ROUNDING).any(1)
    return reached


def _alike(tokens: Tensor, block: Tensor, z: Tensor, threshold: float) -> Tensor:
    """[b, b] bool: which earlier tokens (columns) keep a token (row) out, once they are accepted themselves; all are
    unlike the pool and, normalised, `z` [b, C].
    """
    cosine = z @ z.T
    alike = cosine >= threshold
    near = ((cosine - threshold).abs() < margin(z.shape[1])).tril_(-1)
    rows = near.any(1).nonzero().squeeze(1)
    if len(rows):
        columns = near.any(0).nonzero().squeeze(1)
        alike[rows[:, None], columns] = _cosines(tokens, block[rows], block[columns]) >= threshold - ROUNDING
    return alike.tril_(-1)


def _cosines(tokens: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """[r, c] fp64."""
    a, b = (normalize(tokens[index].double(), dim=-1, eps=1e-30) for index in (rows, columns))
    return a @ b.T


def _first_come(alike: Tensor) -> Tensor:
    """[b] bool: accepted if no accepted earlier token is alike. All that can be decided is decided at once, in a few
    rounds: out is who is like an accepted one, in is who is like no undecided one.
    """
    accepted = torch.zeros(len(alike), dtype=torch.bool, device=alike.device)
    undecided = ~accepted
    while undecided.any():
        undecided &= ~(alike & accepted).any(1)
        sure = undecided & ~(alike & undecided).any(1)
        accepted |= sure
        undecided &= ~sure
    return accepted
