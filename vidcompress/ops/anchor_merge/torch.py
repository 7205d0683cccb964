from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize

from vidcompress.ops.hashing import hashes

CHUNK_ELEMENTS = 16 << 20
"""Similarities, and upcast elements of tokens, that exist at once."""

Piece = tuple[int, int, int, int]
"""Frames from, to (exclusive), whose members join the anchors of the rows from, to (exclusive)."""


def anchor_merge(
    frames: Tensor,
    members: Tensor,
    anchors: Tensor,
    counts: Sequence[int],
    reach: Sequence[tuple[int, int]],
    anchor_weight: float,
    anchors_join: bool = True,
    member_counts: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    (_, p, channels), device = frames.shape, frames.device
    rows = _rows_of(counts, reach)
    if not rows:
        return nothing(device)
    widest, joined, source = max(counts), [], []
    frame, centre, unit, first = _peaks(frames, anchors, rows, widest)
    real = torch.arange(widest, device=device) < torch.tensor([counts[f] for f in rows], device=device)[:, None]
    for pieces in _batches(rows, reach, p * widest, p * channels):
        token, row = _pairs(pieces, p, device)
        score, done = unit.new_full((len(token), widest), -torch.inf), 0
        for a, b, r, s in pieces:
            most = max(counts[f] for f in rows[r:s])
            # The member's own norm cannot change which anchor is the most similar.
            part = frames[a:b].flatten(0, 1).float() @ unit[r:s, :most].flatten(0, 1).T
            part = part.view(-1, most)
            score[done : done + len(part), :most] = part
            done += len(part)
        choice = first[row, score.masked_fill_(~real[row], -torch.inf).argmax(1)]
        joins = members.flatten()[token]
        if not anchors_join:
            joins = joins & ~(anchors.flatten()[token] & (token // p == frame[row]))
        mine = joins.nonzero().squeeze(1)
        joined.append((row * widest + choice)[mine])
        source.append(token[mine])
    slot = torch.cat(joined)
    count = torch.zeros(real.numel(), dtype=torch.long, device=device).scatter_add_(0, slot, torch.ones_like(slot))
    return _triplets(rows, counts, centre, slot, torch.cat(source), count, anchor_weight)


def _rows_of(counts: Sequence[int], reach: Sequence[tuple[int, int]]) -> list[int]:
    """[R] the frames that have anchors, a row each in what follows, those of one reach side by side."""
    return sorted((f for f, count in enumerate(counts) if count), key=lambda f: (reach[f], f))


def nothing(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """No triplets."""
    none = torch.empty(0, dtype=torch.long, device=device)
    return none, none, torch.empty(0, dtype=torch.float32, device=device)


def _peaks(frames: Tensor, anchors: Tensor, rows: list[int], widest: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of every row its frame [R], the flat indices of its anchors [R, A], padded to the most of any, these tokens,
    normalised, in fp32 [R, A, C], and of each anchor the first of the row that equals it [R, A]: the columns of a
    product of matrices need not be rounded alike.
    """
    frame = torch.tensor(rows, device=frames.device)
    place = anchors[frame].int().argsort(dim=1, descending=True, stable=True)[:, :widest]
    unit = normalize(frames[frame[:, None], place].float(), dim=-1, eps=1e-30)
    centre = frame[:, None] * frames.shape[1] + place
    same = hashes(frames.flatten(0, 1), centre.flatten()).view_as(centre)
    return frame, centre, unit, (same[:, :, None] == same[:, None]).int().argmax(2)


def _triplets(
    rows: list[int],
    counts: Sequence[int],
    centre: Tensor,
    slot: Tensor,
    source: Tensor,
    count: Tensor,
    anchor_weight: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """What `anchor_merge` returns, of tokens `source` [E] that join the anchor `slot` [E] of `centre` [R, A].

    Args:
        count: [R * A] how many join each.
    """
    widest, anchor = centre.shape[1], centre.flatten()
    own = (1 / (count + 1).float()).clamp_min(anchor_weight)  # 1 where nobody joins
    share = (1 - own) / count.clamp_min(1)
    # The places that are no padding are known without asking the device.
    kept = torch.tensor([r * widest + a for r, f in enumerate(rows) for a in range(counts[f])], device=centre.device)
    survivor = anchor[torch.cat([kept, slot])]
    return survivor, torch.cat([survivor[: len(kept)], source]), torch.cat([own[kept], share[slot]])


def _batches(
    rows: list[int], reach: Sequence[tuple[int, int]], scores_a_row: int, elements_a_frame: int
) -> Iterator[list[Piece]]:
    """All pieces of work, in batches that fit; a piece has as many rows as share a reach, and a batch one piece at
    least.
    """
    batch: list[Piece] = []
    room = CHUNK_ELEMENTS
    for (start, end), group in itertools.groupby(enumerate(rows), key=lambda row: reach[row[1]]):
        own = [r for r, _ in group]
        cost = max(scores_a_row * len(own), elements_a_frame)  # of a frame
        step = max(1, CHUNK_ELEMENTS // cost)
        for a in range(start, end, step):
            b = min(a + step, end)
            if batch and (b - a) * cost > room:
                yield batch
                batch, room = [], CHUNK_ELEMENTS
            batch.append((a, b, own[0], own[-1] + 1))
            room -= (b - a) * cost
    yield batch


def _pairs(pieces: list[Piece], p: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """([n] token, [n] row) of every product, in the order in which the pieces make them."""
    facts = torch.tensor([(a * p, r, s - r, (b - a) * p * (s - r)) for a, b, r, s in pieces])
    total = int(facts[:, 3].sum())
    begins = facts[:, 3].cumsum(0) - facts[:, 3]
    token, row, width, _, begin = torch.cat([facts, begins[:, None]], 1).to(device).T
    piece = torch.arange(len(pieces), device=device).repeat_interleave(facts[:, 3].to(device), output_size=total)
    place = torch.arange(total, device=device) - begin[piece]
    return token[piece] + place // width[piece], row[piece] + place % width[piece]
