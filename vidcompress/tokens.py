"""The vocabulary: what a method sees (`VideoTokens`), where (`Site`), and what it answers (`Reduction`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from vidcompress.ops import breaches, compose, merge, through_means
from vidcompress.precision import full_precision

Grid = tuple[int, int, int]
"""Frames, rows and columns of one video's tokens, after the projector's pooling and without newline tokens."""


@dataclass(frozen=True)
class Site:
    """A place where a method acts: the projector's output (outer-LLM), the input of a decoder layer (inner-LLM), or the
    KV caches from a decoder layer on, between two decoding steps.

    Attributes:
        layer: decoder layer, counted from 0; -1 for the projector.
        stage: which of its method's sites it is, counted from 0; does not count when sites are compared.
        depth: decoder layers of its LLM, 0 where its method did not note them; does not count either.
        is_decoding: whether it lies between decoding steps.
    """

    layer: int
    stage: int = field(default=0, compare=False)
    depth: int = field(default=0, compare=False)
    is_decoding: bool = False

    @classmethod
    def projector(cls) -> Site:
        """The video tokens as the text decoder is about to get them."""
        return cls(-1)

    @classmethod
    def decoder(cls, layer: int, stage: int = 0, depth: int = 0) -> Site:
        """The input of decoder layer `layer`, counted from 0."""
        return cls(layer, stage, depth)

    @classmethod
    def decoding(cls, layer: int, stage: int = 0) -> Site:
        """What the decoder layers from `layer` on have cached, between two decoding steps."""
        return cls(layer, stage, is_decoding=True)

    @property
    def is_inner(self) -> bool:
        """Whether it lies inside the LLM."""
        return self.layer >= 0

    @property
    def order(self) -> tuple[bool, int]:
        """By which sites follow each other: the prompt's come before those between decoding steps."""
        return self.is_decoding, self.layer

    def __str__(self) -> str:
        return f"{'decoding' if self.is_decoding else 'decoder'}[{self.layer}]" if self.is_inner else "projector"


@dataclass(frozen=True)
class VideoTokens:
    """The M surviving tokens of one video, oldest frame first.

    Attributes:
        features: [M, C], in the model's dtype.
        grid: (t, h, w) of the whole video; M = t * h * w as long as nothing was removed.
        index: [M] ascending places in the flattened t * h * w grid; None stands for all of them.
        signals: what the method's `needs` asked for, by name. From the vision tower: `frame_features` [t, F],
            `saliency.head` [M], `saliency.received` [M], `tower_keys` [M, D] (of the layer of `saliency.received`, the
            mean over its heads). From the decoder (Q text tokens after the video, H heads):
            `text_attention` [M], `text_attention.heads` [H, Q, M], `last_query_attention` [M],
            `last_query_attention.previous` [M], `text_hidden` [Q, C], `last_text_hidden` [C]; and, before it is
            entered, `first_look` [M].
        notes: what the same method noted about this video at its site before this one.
        entered: tokens of this video that entered the LLM; M where nothing is said.
    """

    features: Tensor
    grid: Grid
    index: Tensor | None = None
    signals: Mapping[str, Tensor] = field(default_factory=dict)
    notes: Mapping[str, Any] = field(default_factory=dict)
    entered: int = -1

    def __post_init__(self) -> None:
        t, h, w = self.grid
        if min(self.grid) < 1:
            raise ValueError(f"grid {self.grid} has an empty side; frames, rows and columns must be at least 1")
        if self.features.dim() != 2:
            raise ValueError(f"features must be [tokens, channels], got shape {tuple(self.features.shape)}")
        expected = t * h * w if self.index is None else self.index.numel()
        if len(self) != expected:
            raise ValueError(f"{len(self)} tokens do not fill the grid {self.grid} ({expected} tokens expected)")
        if self.entered < 0:
            object.__setattr__(self, "entered", len(self))

    def __len__(self) -> int:
        return self.features.shape[0]

    @property
    def frames(self) -> Tensor:
        """[t, P, C] view of the features, P = h * w. Only for a video of which nothing was removed yet."""
        t, h, w = self.grid
        return self.features.reshape(t, h * w, -1)

    def signal(self, name: str) -> Tensor:
        """The signal `name`; KeyError if the method did not list it in `needs`."""
        return _signal(self.signals, name)


@dataclass(frozen=True)
class CachedTokens:
    """The M tokens of one video that a decoder layer's KV cache still holds, between two decoding steps.

    Attributes:
        grid: (t, h, w) of the whole video.
        index: [M] ascending places in the flattened t * h * w grid.
        signals: what the method's `needs` asked for, of the token that was written last: `last_query_attention` [M] in
            this layer, `last_query_attention.previous` [M] in the one before.
        notes: what the same method noted about this video while the prompt was read.
        entered: tokens of this video that entered the LLM.
    """

    grid: Grid
    index: Tensor
    signals: Mapping[str, Tensor]
    notes: Mapping[str, Any]
    entered: int

    def __len__(self) -> int:
        return self.index.numel()

    def signal(self, name: str) -> Tensor:
        """The signal `name`; KeyError if the method did not list it in `needs`."""
        return _signal(self.signals, name)


@dataclass(frozen=True)
class Reduction:
    """A decision, not yet carried out: a sparse [K, N] map from N source tokens to K survivors.

    Attributes:
        keep: [K] ascending source indices of the survivors; they give a survivor its place and position.
        num_source: N.
        slot, source, weight: [E] triplets: survivor `slot` receives `weight` times the token `source`. A slot without
            triplets hands its own token on, unchanged. None means that no slot has any (pure pruning).
        notes: what the method wants recorded (segments, budgets), for the trace and for its own later sites.
        lawful: whether this has been checked.
    """

    keep: Tensor
    num_source: int
    slot: Tensor | None = None
    source: Tensor | None = None
    weight: Tensor | None = None
    notes: Mapping[str, Any] = field(default_factory=dict)
    lawful: bool = field(default=False, repr=False, compare=False, kw_only=True)

    @classmethod
    def identity(cls, n: int, device: torch.device | str = "cpu") -> Reduction:
        """Keeps all n tokens as they are."""
        return cls(torch.arange(n, device=device), n)

    @classmethod
    def pruning(cls, kept: Tensor, notes: Mapping[str, Any] | None = None) -> Reduction:
        """Keeps the tokens where `kept` [N] bool is True, as they are."""
        return cls(kept.nonzero().squeeze(1), kept.numel(), notes=notes or {})

    @classmethod
    def merging(
        cls,
        keep: Tensor,
        num_source: int,
        parts: Sequence[tuple[Tensor, Tensor, Tensor]],
        notes: Mapping[str, Any] | None = None,
    ) -> Reduction:
        """From parts of (survivor, source, weight) triplets whose survivors are named by their source index."""
        if not parts or not sum(p[0].numel() for p in parts):
            return cls(keep, num_source, notes=notes or {})
        columns = parts[0] if len(parts) == 1 else [torch.cat(column) for column in zip(*parts, strict=True)]
        survivor, source, weight = columns
        return cls(keep, num_source, torch.searchsorted(keep, survivor), source, weight, notes or {})

    def __len__(self) -> int:
        return self.keep.numel()

    @property
    def is_identity(self) -> bool:
        """True if every token is kept and none is mixed: applying it would change nothing."""
        return len(self) == self.num_source and self.slot is None

    def check(self) -> Reduction:
        """Returns self, or raises RuntimeError if this is not a lawful map (a method's own mistake)."""
        if not self.lawful:
            self._refuse(int(self._breaches()))
        return self

    def _breaches(self) -> Tensor:
        """Long scalar: how many entries break the rules, those aside that their number and type tell."""
        _, slot, source, weight = self._map()
        indices = [self.keep, slot, source]
        if not 0 < len(self) <= self.num_source or any(i.dim() != 1 or i.dtype != torch.long for i in indices):
            self._refuse(1)
        if not slot.shape == source.shape == weight.shape:
            self._refuse(1)
        return breaches(self.keep, slot, source, weight, self.num_source)

    def _refuse(self, breaches: int) -> None:
        if breaches:
            k, n = len(self), self.num_source
            raise RuntimeError(f"unlawful reduction: {k} survivors of {n} tokens must be ascending indices below {n}")

    def apply(self, features: Tensor) -> Tensor:
        """[N, C] -> [K, C] in the dtype of `features`; sums run in fp32. Differentiable in `features`."""
        if features.shape[0] != self.num_source:
            raise ValueError(f"this reduction maps {self.num_source} tokens, got {features.shape[0]}")
        if self.slot is None:
            return features[self.keep]
        assert self.source is not None and self.weight is not None
        with full_precision(features.device):
            return merge(features, self.keep, self.slot, self.source, self.weight)

    def then(self, later: Reduction) -> Reduction:
        """This reduction followed by `later` (a map of this one's K survivors), as one map of the N sources."""
        if later.num_source != len(self):
            raise ValueError(f"cannot follow a map to {len(self)} tokens by a map of {later.num_source}")
        keep = self.keep[later.keep]
        if self.slot is None and later.slot is None:
            return Reduction(keep, self.num_source)
        slot, source, weight = compose(self._map(), later._map(), self.num_source)
        return Reduction(keep, self.num_source, slot, source, weight) if len(slot) else Reduction(keep, self.num_source)

    def through_means(self, alone: int, replaced: Tensor, segments: Sequence[tuple[int, int]]) -> Reduction:
        """This reduction of tokens that `ops.with_means` replaced, as one of the tokens themselves, checked.

        Args:
            alone: so many triplets, the first ones, only say that a survivor is handed on as it is.
            replaced, segments: as for `ops.with_means`.
        """
        _, slot, source, weight = self._map()
        # One wait tells how many triplets there are and whether those they come from are lawful.
        asked = self._breaches()
        slot, source, weight, wrong = through_means(slot, source, weight, alone, replaced, segments, asked)
        self._refuse(wrong)
        if not len(slot):
            return replace(self, slot=None, source=None, weight=None, lawful=True)
        return replace(self, slot=slot, source=source, weight=weight, lawful=True)

    def _map(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(keep, slot, source, weight), empty where there are no triplets."""
        if self.slot is None:
            return self.keep, self.keep[:0], self.keep[:0], self.keep[:0].float()
        assert self.source is not None and self.weight is not None
        return self.keep, self.slot, self.source, self.weight

    def to_dict(self) -> dict[str, Any]:
        """JSON-serialisable: keep, num_source, merge triplets (or None) and notes."""
        triplets = None
        if self.slot is not None:
            assert self.source is not None and self.weight is not None
            triplets = {name: getattr(self, name).tolist() for name in ("slot", "source", "weight")}
        facts = {"keep": self.keep.tolist(), "num_source": self.num_source}
        return facts | {"merge": triplets, "notes": _plain(self.notes)}


def _signal(signals: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in signals:
        raise KeyError(f"signal {name!r} was not computed; list it in `needs` (has: {[*signals]})")
    return signals[name]


def _plain(value: Any) -> Any:
    """Tensors, tuples and mappings as JSON types."""
    if isinstance(value, Tensor):
        return value.tolist()
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value
