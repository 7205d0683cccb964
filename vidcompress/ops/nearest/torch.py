from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize

CHUNK_ELEMENTS = 4 << 20
"""Distances, and upcast elements of tokens or of anchors, that exist at once."""

NOISE = {torch.float32: 2.0**-22, torch.float64: 2.0**-51}
"""Rounding of a product of two unit vectors, over the square root of their length: several times what is usual."""


def nearest(tokens: Tensor, anchors: Tensor, measure: Literal["euclidean", "cosine"]) -> Tensor:
    # Only the first of equal anchors can win; leaving out the others keeps a still picture from being all ties.
    first = _first_of_equals(anchors)
    anchors = anchors[first]
    # Distances do not change when a common vector is taken off all, and the expanded square then cancels far less.
    centre = anchors.mean(0, dtype=torch.float64) if measure == "euclidean" else None
    step = max(1, CHUNK_ELEMENTS // max(*anchors.shape, 1))
    return torch.cat([first[_choose(part, anchors, centre, step)] for part in tokens.split(step)])


def _first_of_equals(anchors: Tensor) -> Tensor:
    """The lowest index of each set of equal anchors, ascending."""
    kinds, kind = torch.unique(anchors, dim=0, return_inverse=True)
    index = torch.arange(len(anchors), device=anchors.device)
    return index.new_full((len(kinds),), len(anchors)).scatter_reduce_(0, kind, index, "amin").sort().values


def _choose(tokens: Tensor, anchors: Tensor, centre: Tensor | None, step: int) -> Tensor:
    """[n] index of the nearest anchor. Where the best are within the rounding, a better measure decides among them."""
    choice = torch.zeros(len(tokens), dtype=torch.long, device=tokens.device)
    rows = torch.arange(len(tokens), device=tokens.device)
    if centre is None:
        rows = rows[(tokens != 0).any(1)]  # a zero vector stays with anchor 0: all cosines are 0
    for dtype in NOISE:
        score, noise = _scores(tokens[rows], anchors, centre, dtype, step)
        choice[rows] = score.argmin(1)
        close = score - noise <= (score + noise).amin(1, keepdim=True)
        unsure = (close.sum(1) > 1).nonzero().squeeze(1)
        rows, close = rows[unsure], close[unsure]
    choice[rows] = _exact_scores(tokens[rows], anchors, centre is None, close, step).argmin(1)
    return choice


def _scores(
    tokens: Tensor, anchors: Tensor, centre: Tensor | None, dtype: torch.dtype, step: int
) -> tuple[Tensor, Tensor]:
    """[n, K] minus the cosine, or the squared distance less the token's own square; and how wrong it may be."""
    x = _placed(tokens, centre, dtype)
    length = x.norm(dim=1, keepdim=True)  # [n, 1]
    score = x.new_empty(len(tokens), len(anchors))
    noise = torch.empty_like(score)
    unit = NOISE[dtype] * anchors.shape[1] ** 0.5
    for a in range(0, len(anchors), step):
        y = _placed(anchors[a : a + step], centre, dtype)
        size = y.norm(dim=1)  # [k]
        if centre is None:
            torch.mm(x, -y.T, out=score[:, a : a + step])
            torch.mul(length, unit * size, out=noise[:, a : a + step])
        else:
            score[:, a : a + step] = torch.addmm(size.square(), x, y.T, alpha=-2)
            torch.mul(2 * length + size, unit * size, out=noise[:, a : a + step])
    return score, noise


def _placed(vectors: Tensor, centre: Tensor | None, dtype: torch.dtype) -> Tensor:
    exact = vectors.to(torch.promote_types(vectors.dtype, dtype))
    return (normalize(exact, dim=1, eps=1e-30) if centre is None else exact - centre.to(exact.dtype)).to(dtype)


def _exact_scores(tokens: Tensor, anchors: Tensor, cosine: bool, close: Tensor, step: int) -> Tensor:
    """[n, K] fp64 by the words of the definition where `close`, elsewhere infinite."""
    score = torch.full(close.shape, torch.inf, dtype=torch.float64, device=tokens.device)
    for row, anchor in zip(*(pairs.split(step) for pairs in close.nonzero(as_tuple=True))):
        x, y = tokens[row].double(), anchors[anchor].double()
        if cosine:
            x, y = normalize(x, dim=1, eps=1e-30), normalize(y, dim=1, eps=1e-30)
            score[row, anchor] = -(x * y).sum(1)
        else:
            score[row, anchor] = (x - y).square().sum(1)
    return score
