"""A KV cache with two lengths: the caller's (logical) and the one that is stored (physical).

generate() uses `get_seq_length` wherever it means the caller's length, and `get_query_offset`/`get_mask_sizes` wherever
it means stored keys. Answering the first with the logical and the others with the physical length is all that several
turns, manual loops, beams and assisted decoding need. Compression only ever shortens a fixed prefix, at each decoder
layer its own way; tokens decoded later are stored one to one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

if TYPE_CHECKING:
    from vidcompress.engine.eviction import CachedVideo


@dataclass
class CachedPrefix:
    """The compressed prefix as the layers from `start` on store it, up to the next one's start.

    Attributes:
        start: a decoder layer.
        mask: [B, physical] bool, True where the prefix holds a real token.
        following: [B] position of the token that follows, in rows that these layers number anew, -1 in others; None if
            they number none anew.
        shift: [B] what that takes off the caller's positions of all that follows; None until it is known.
        open: [B] bool, the rows of which it is not known, because nothing followed yet.
        end: the caller's length at which `following` begins.
        marks: [B, physical, 2] on the CPU: which of the state's videos a token belongs to (-1: none), and its place in
            the grid, or -1 - line for the newline of a line; None where nothing can be evicted.
    """

    start: int
    mask: Tensor
    following: Tensor | None = None
    shift: Tensor | None = None
    open: Tensor | None = None
    end: int = 0
    marks: Tensor | None = None

    @property
    def renumbered(self) -> Tensor | None:
        """[B] bool, rows that are numbered anew; None if there are none."""
        return None if self.following is None else self.following >= 0

    def continued(self, first: Tensor, present: Tensor) -> CachedPrefix:
        """Now that more tokens follow: the first of them continues this prefix's own count.

        Args:
            first: [B] the caller's position of every row's first new token.
            present: [B] bool, whether the row has one.
        """
        if self.following is None or (self.shift is not None and self.open is None):
            return self
        following = self.following.to(first.device)
        shift = (first - following).masked_fill(following < 0, 0)
        waiting = ~present
        if self.shift is not None and self.open is not None:
            unknown = self.open.to(first.device)
            shift, waiting = torch.where(unknown, shift, self.shift.to(first.device)), unknown & waiting
        return replace(self, shift=shift, open=waiting if waiting.any() else None)

    def cropped(self, length: int) -> CachedPrefix:
        """After the cache was cropped to the caller's `length`: what follows then continues the count from there."""
        if self.following is None or length > self.end:
            return self
        following = torch.where(self.following < 0, -1, self.following - (self.end - length))
        return replace(self, following=following, shift=None, open=None, end=length)

    def map(self, rows: Callable[[Tensor], Tensor]) -> CachedPrefix:
        """After a change of batch rows."""
        names = ("mask", "following", "shift", "open", "marks")
        moved: dict[str, Any] = {name: rows(t) for name in names if (t := getattr(self, name)) is not None}
        return replace(self, **moved)


@dataclass
class CacheState:
    """The compressed prefix of a cache: all up to the last removed token. What follows is stored one to one.

    Attributes:
        logical: tokens of the caller's sequence that the prefix stands for.
        prefixes: how the layers store it, by ascending start; the first starts at layer 0.
        videos: those of which tokens may be evicted between decoding steps.
        served: whether a forward of the engine's is running, which alone knows what the prefix holds.
    """

    logical: int
    prefixes: tuple[CachedPrefix, ...]
    videos: tuple[CachedVideo, ...] = ()
    served: bool = False

    def at(self, layer: int) -> CachedPrefix:
        """What a decoder layer stores of the prefix."""
        return next(p for p in reversed(self.prefixes) if p.start <= layer)

    def removed(self, layer: int) -> int:
        """Tokens that the caller counts and this layer's cache does not store."""
        return self.logical - self.at(layer).mask.shape[1]

    def continued(self, first: Tensor, present: Tensor) -> None:
        """Notes where the tokens that follow begin, as `CachedPrefix.continued`."""
        self.prefixes = tuple(prefix.continued(first, present) for prefix in self.prefixes)

    def map(self, rows: Callable[[Tensor], Tensor]) -> None:
        """Applies a change of batch rows."""
        self.prefixes = tuple(prefix.map(rows) for prefix in self.prefixes)


class LogicalLength:
    """Mixed in front of a cache's own class; `vidcompress_state` is the compressed prefix, or None."""

    vidcompress_state: CacheState | None = None

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """The caller's length."""
        stored = super().get_seq_length(layer_idx)  # type: ignore[misc]
        state = self.vidcompress_state
        layers = getattr(self, "layers", None)  # transformers 4 has none
        if state is None or (layers is not None and not (layers and layers[0].is_initialized)):
            return stored
        return stored + state.removed(layer_idx)

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """The stored length."""
        return super().get_seq_length(layer_idx)  # type: ignore[misc]

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """As in transformers; RuntimeError outside a compressed model, which would misread the prefix."""
        state = self.vidcompress_state
        if state is not None and not state.served:
            raise RuntimeError(
                "this cache holds a compressed prompt, and the model it is used with does not compress (was the handle "
                "removed?); apply the compression again, or start with a new cache"
            )
        return super().update(*args, **kwargs)  # type: ignore[misc]

    def crop(self, tokens_to_remove: int) -> None:
        """As in transformers (a negative count, or a positive final length in the caller's terms).

        Raises ValueError if it would reach into the compressed prompt, whose tokens are not one to one.
        """
        length = int(self.get_seq_length())
        remove = -tokens_to_remove if tokens_to_remove <= 0 else max(0, length - tokens_to_remove)
        state = self.vidcompress_state
        if state is not None and length - remove < state.logical:
            raise ValueError(
                f"cannot crop this cache from {length} to {length - remove} tokens: its first {state.logical} are a "
                f"compressed prompt ({state.at(0).mask.shape[1]} stored at layer 0); crop to {state.logical} or more, "
                "or reset()"
            )
        super().crop(-remove)  # type: ignore[misc]
        if state is not None:
            state.prefixes = tuple(prefix.cropped(length - remove) for prefix in state.prefixes)

    def reset(self) -> None:
        super().reset()  # type: ignore[misc]
        self.vidcompress_state = None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)  # type: ignore[misc]
        self._map(lambda rows: rows.index_select(0, beam_idx.to(rows.device)))

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)  # type: ignore[misc]
        self._map(lambda rows: rows[indices.to(rows.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)  # type: ignore[misc]
        self._map(lambda rows: rows.repeat_interleave(repeats, dim=0))

    def _map(self, rows: Callable[[Tensor], Tensor]) -> None:
        if self.vidcompress_state is not None:
            self.vidcompress_state.map(rows)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _blank, (type(self).__bases__[1],), self.__dict__


_LOGICAL: dict[type, type] = {}


def _logical(kind: type) -> type:
    """The class `kind` with two lengths."""
    if kind not in _LOGICAL:
        _LOGICAL[kind] = type(kind.__name__, (LogicalLength, kind), {"__module__": kind.__module__})
    return _LOGICAL[kind]


def _blank(kind: type) -> Any:
    """An empty object for a copy or a pickle to fill."""
    return object.__new__(_logical(kind))


def commit(cache: Cache, state: CacheState) -> None:
    """Notes the compressed prefix on `cache` (of any class), which from now on knows both lengths."""
    if not isinstance(cache, LogicalLength):
        cache.__class__ = _logical(type(cache))
    cache.vidcompress_state = state  # type: ignore[attr-defined]


@contextmanager
def served(state: CacheState | None) -> Iterator[None]:
    """Meanwhile a forward of the engine's runs, which alone knows what the prefix holds."""
    if state is not None:
        state.served = True
    try:
        yield
    finally:
        if state is not None:
            state.served = False


def state_of(cache: Cache | None) -> CacheState | None:
    """The compressed prefix of a cache; None for a plain or empty one."""
    state = getattr(cache, "vidcompress_state", None)
    return state if state is None or torch.is_tensor(state.prefixes[0].mask) else None
