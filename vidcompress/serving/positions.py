"""Rotary positions with three axes (time, row, column) for prompts whose videos are shorter than their grids.

Where text stands after a video follows from the grid alone, so it is known before the video is encoded, and right even
where the video is never encoded again because its part of the prompt is cached. Which positions the survivors have
follows from what is kept. They travel with the survivors, as extra channels behind the features, in digits that every
dtype holds exactly: bfloat16 has no odd number above 256.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vidcompress.tokens import Grid

AXES, DIGITS, BASE = 3, 3, 256
CHANNELS = AXES * DIGITS
"""Extra channels of a survivor's features: its three positions, each below 256 ** 3, in three digits."""


@dataclass(frozen=True)
class Medium:
    """An image or a video in a prompt.

    Attributes:
        offset: column of its first placeholder.
        count: its placeholders; fewer than its grid has tokens if it is compressed.
        grid: (t, h, w) of its tokens.
        seconds: positions on the axis of time from one of the t frames to the next.
    """

    offset: int
    count: int
    grid: Grid
    seconds: float = 1.0


def of_grid(grid: Grid, seconds: float = 1.0) -> Tensor:
    """[3, t * h * w] positions (time, row, column) of a medium that begins at 0."""
    t, h, w = (torch.arange(side) for side in grid)
    time = (t.double() * seconds).long()
    return torch.stack(torch.meshgrid(time, h, w, indexing="ij")).flatten(1)


def of_prompt(length: int, media: Sequence[Medium]) -> tuple[Tensor, int]:
    """Positions before anything is encoded, as vLLM and transformers 4 count: after a medium at its largest plus one.

    Args:
        length: tokens of the prompt, placeholders included.
        media: in the order of their offsets.

    Returns:
        [3, length] positions, and what is to be added to a column behind the prompt. A compressed video's placeholders
        all have the position at which it begins, until `placed` knows better.
    """
    positions = torch.empty(AXES, length, dtype=torch.long)
    column = following = 0
    for medium in media:
        text = medium.offset - column
        positions[:, column : medium.offset] = torch.arange(following, following + text)
        following += text
        column = medium.offset + medium.count
        own = of_grid(medium.grid, medium.seconds)
        positions[:, medium.offset : column] = following + (own if own.shape[1] == medium.count else 0)
        following += int(own.max()) + 1
    positions[:, column:] = torch.arange(following, following + length - column)
    return positions, following - column


def renumbered(length: int) -> tuple[Tensor, int]:
    """The same for `positions: renumber`: every token counts one, on all axes."""
    return torch.arange(length).expand(AXES, -1).clone(), 0


def packed(positions: Tensor, dtype: torch.dtype) -> Tensor:
    """[K, 9]: positions [3, K] in digits to the base 256, exact in every floating dtype of eight bits precision.

    Raises ValueError for a position that three digits do not hold.
    """
    if positions.numel() and not 0 <= int(positions.min()) <= int(positions.max()) < BASE**DIGITS:
        raise ValueError(f"a video's positions must be from 0 to {BASE**DIGITS - 1}, got {int(positions.max())}")
    digits = [positions // BASE**i % BASE for i in range(DIGITS)]  # [3, K] each
    return torch.stack(digits, 1).flatten(0, 1).T.to(dtype)


def unpacked(channels: Tensor) -> Tensor:
    """[3, K] positions of [K, 9]; the reverse of `packed`."""
    digits = channels.T.long().unflatten(0, (AXES, DIGITS))  # [3, digits, K]
    return sum(digits[:, i] * BASE**i for i in range(DIGITS))


def placed(positions: Tensor, media: Tensor, embeddings: Sequence[Tensor], first: int, width: int) -> Tensor:
    """The positions of a prompt, with those of the survivors that are about to be computed.

    Between two media there must be text, which tells where each begins.

    Args:
        positions: [3, N] as they stand.
        media: [N] bool, placeholders of images and videos.
        embeddings: what the placeholders from column `first` on get, in order: [n, width] as it is, or
            [n, width + 9] with its positions within its own medium. The last ones may be missing.
        first: the first column that is computed now. Earlier chunks, or a cache, hold what lies before.
        width: channels of the features.

    Returns:
        A new [3, N].
    """
    positions = positions.clone()
    column = torch.arange(len(media), device=media.device)
    before = column.masked_fill(media, -1).cummax(0).values  # the last column of text so far
    following = torch.cat([torch.zeros_like(positions[0, :1]), positions[0] + 1])  # [N + 1], after each column
    begins = following[before + 1]
    places = column[first:][media[first:]]
    at = 0
    for embedding in embeddings:
        mine = places[at : at + len(embedding)]
        at += len(embedding)
        if embedding.shape[1] > width:
            positions[:, mine] = begins[mine] + unpacked(embedding[:, width:]).to(positions)
    return positions
