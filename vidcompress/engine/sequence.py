"""One forward of the text decoder as the engine sees it: embeddings, mask and positions, and their shortening."""

from __future__ import annotations

from collections.abc import Sequence as Rows
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from vidcompress.engine.cache import CachedPrefix, CacheState


@dataclass(frozen=True)
class Sequence:
    """The tokens that are new in this forward, and what lies before them in the cache.

    Attributes:
        embeds: [B, L, C], or [B, 0, C] where they are not kept.
        mask: [B, L] bool, True for real tokens, False for padding.
        positions: [A, B, L] rotary positions; A = 1, or 3 for M-RoPE (time, row, column).
        past_mask: [B, stored] bool, the same for the keys in the cache.
        shift: [B] what earlier turns' renumbering takes off the caller's positions, or None.
        renumbered: [B] bool, rows whose positions are another count than the caller's, which is to be continued; None
            if there are none.
    """

    embeds: Tensor
    mask: Tensor
    positions: Tensor
    past_mask: Tensor
    shift: Tensor | None = None
    renumbered: Tensor | None = None

    @property
    def length(self) -> int:
        """L, padding included."""
        return self.mask.shape[1]

    @property
    def full_mask(self) -> Tensor:
        """[B, stored + L] bool: every key this forward can see, causality aside."""
        return torch.cat([self.past_mask, self.mask], 1)

    @property
    def position_ids(self) -> Tensor:
        """The positions as a decoder takes them: [B, L], or [3, B, L] for M-RoPE."""
        return self.positions[0] if self.positions.shape[0] == 1 else self.positions

    def entering(
        self, hidden: Tensor, past_mask: Tensor, shift: Tensor | None = None, renumbered: Tensor | None = None
    ) -> Sequence:
        """The same tokens at a deeper layer, on its device, whose cache stores another prefix.

        Args:
            hidden: [B, L, C] the layer's input.
            past_mask: [B, stored] bool of that layer's cache.
            shift: [B] how much more renumbering moved positions at this layer than at the last, or None.
            renumbered: [B] bool, the rows that it moved, where there is a shift.
        """
        device = hidden.device
        deeper = replace(
            self,
            embeds=hidden,
            mask=self.mask.to(device),
            positions=self.positions.to(device),
            past_mask=past_mask.to(device),
            shift=None if self.shift is None else self.shift.to(device),
            renumbered=None if self.renumbered is None else self.renumbered.to(device),
        )
        if shift is None or renumbered is None:
            return deeper
        shift, renumbered = shift.to(device), renumbered.to(device)
        total = shift if deeper.shift is None else deeper.shift + shift
        rows = renumbered if deeper.renumbered is None else deeper.renumbered | renumbered
        return replace(deeper, positions=deeper.positions - shift[:, None], shift=total, renumbered=rows)

    @property
    def following(self) -> Tensor:
        """[B] the position that comes after each row's last token; -1 in rows that are not renumbered."""
        column = torch.arange(self.length, device=self.mask.device)
        last = (column * self.mask).argmax(1, keepdim=True)
        after = self.positions.amax(0).gather(1, last)[:, 0] + 1
        return after if self.renumbered is None else after.masked_fill(~self.renumbered, -1)

    def shortened(self, columns: Rows[Tensor], renumber: Rows[bool]) -> tuple[Sequence, Tensor]:
        """The sequence of the given columns, rows padded on the left to the longest.

        Args:
            columns: for every row the ascending columns that stay; real tokens only.
            renumber: rows whose survivors are numbered consecutively from their first position, on all axes.

        Returns:
            The sequence and [B, n], the column each of its tokens came from (padding repeats a padding column).
        """
        index, mask = left_pad(columns, self.mask)
        positions = torch.stack([axis.gather(1, index) for axis in self.positions])
        renumbered = self.renumbered
        if any(renumber):
            first = positions[0].masked_fill(~mask, torch.iinfo(positions.dtype).max).amin(1)
            anew = (first[:, None] + mask.long().cumsum(1) - 1).masked_fill(~mask, 0)
            chosen = torch.tensor(list(renumber), device=mask.device)
            positions = torch.where(chosen[:, None], anew, positions)
            renumbered = chosen if renumbered is None else renumbered | chosen
        shorter = replace(self, embeds=take(self.embeds, index), mask=mask, positions=positions)
        return replace(shorter, renumbered=renumbered), index


def read(kwargs: dict[str, Any], past: int, state: CacheState | None, axes: int) -> tuple[Sequence, Tensor]:
    """The decoder's keyword arguments as a `Sequence` at its first layer.

    Args:
        kwargs: `inputs_embeds`, and optionally `attention_mask` [B, past + L] and `position_ids` ([B, L], [3, B, L], or
            [4, B, L] whose first row is the text position that transformers adds for M-RoPE).
        past: tokens before this forward, in the caller's terms.
        state: the cache's compressed prefix, if any.
        axes: rotary axes of this decoder, 1 or 3.

    Returns:
        The sequence, and [B, n] bool, the mask of what every layer's cache stores after its compressed prefix.
    """
    embeds = kwargs["inputs_embeds"]
    batch, length, _ = embeds.shape
    device = embeds.device
    given = kwargs.get("attention_mask")
    if given is None:
        given = torch.ones(batch, past + length, dtype=torch.bool, device=device)
    given = given.to(device).bool()
    following = given[:, 0 if state is None else state.logical : past]
    positions = kwargs.get("position_ids")
    if positions is None:
        positions = torch.arange(past, past + length, device=device)
    if positions.dim() == 3:
        positions = positions[-axes:]
    positions = positions.to(device).expand(axes, batch, length)
    mask, past_mask, shift, renumbered = given[:, -length:], following, None, None
    if state is not None:
        first = positions[0].gather(1, mask.int().argmax(1, keepdim=True))[:, 0]
        state.continued(first, mask.any(1))
        past_mask, shift = after(state.at(0), following)
        renumbered = state.at(0).renumbered
    if shift is not None:
        positions = positions - shift[:, None]
    return Sequence(embeds, mask, positions, past_mask, shift, renumbered), following


def after(prefix: CachedPrefix, following: Tensor) -> tuple[Tensor, Tensor | None]:
    """([B, stored] bool, [B] shift or None): what lies before a forward at a layer that stores `prefix`."""
    shift = None if prefix.shift is None else prefix.shift.to(following.device)
    return torch.cat([prefix.mask.to(following.device), following], 1), shift


def left_pad(columns: Rows[Tensor], mask: Tensor) -> tuple[Tensor, Tensor]:
    """([B, n] column of every token, [B, n] bool real): rows of different lengths, padded on the left."""
    longest = max(row.numel() for row in columns)
    padding = (~mask).float().argmax(1)  # some padding column of each row, or 0
    index = padding[:, None].repeat(1, longest)
    real = torch.zeros_like(index, dtype=torch.bool)
    for b, row in enumerate(columns):
        if row.numel():
            index[b, -row.numel() :] = row
            real[b, -row.numel() :] = True
    return index, real


def take(x: Tensor, index: Tensor) -> Tensor:
    """x [B, L, ...] at index [B, n] -> [B, n, ...]."""
    return x[torch.arange(x.shape[0], device=x.device)[:, None], index]


def scatter(x: Tensor, index: Tensor, real: Tensor, length: int) -> Tensor:
    """The reverse of `take` for real tokens: [B, n, C] -> [B, length, C], zeros where nothing came from."""
    row, column = real.nonzero(as_tuple=True)
    place = index[row, column].to(x.device)  # a decoder spread over devices ends on another one than it began
    row, column = row.to(x.device), column.to(x.device)
    return x.new_zeros(x.shape[0], length, *x.shape[2:]).index_put((row, place), x[row, column])


def untouched(index: Tensor, real: Tensor, length: int) -> int:
    """How many columns at the end of the caller's `length` every row still has, one to one."""
    batch = index.shape[0]
    row, column = real.nonzero(as_tuple=True)
    kept = torch.zeros(batch, length, dtype=torch.bool, device=index.device)
    kept[row, index[row, column]] = True
    gone = (~kept.all(0)).nonzero()
    return length - 1 - int(gone[-1]) if gone.numel() else length
