"""One forward of the text decoder between its hooks: a sequence that gets shorter on its way through the layers.

A *stage* is a run of decoder layers that see the same tokens. The decoder hands every layer what its first one gets;
from the second stage on, hidden states, rotary tables, mask and positions are the stage's own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from vidcompress.engine import sequence
from vidcompress.engine.cache import CachedPrefix, CacheState
from vidcompress.engine.decoder_signals import LayerView
from vidcompress.engine.eviction import Due, cached_videos, due
from vidcompress.engine.first_look import FirstLook
from vidcompress.engine.plan import Plan
from vidcompress.engine.sequence import Sequence
from vidcompress.tokens import Site


@dataclass
class Stage:
    """What the decoder layers from `start` on see, up to the next stage's start.

    Attributes:
        start: a decoder layer.
        tokens: the sequence, without its embeddings.
        index: [B, n] the caller's column of every token; None if it is the caller's own sequence.
        differs: whether it sees or finds stored other tokens than the stage before.
        rotary: (cos, sin) of its tokens; None if they are those that the decoder hands to the layers.
        own_mask: whether it needs another mask than the decoder hands to the layers.
        mask, masked: that mask, which may be None, and whether it was made.
        columns: [B, n] 0, 1, 2, ..: what the layers get as positions, which gappy ones would make look packed.
        marks: [B, n, 2] whose tokens these are, as `CachedPrefix.marks`; None where nothing can be evicted.
    """

    start: int
    tokens: Sequence
    index: Tensor | None
    differs: bool = True
    rotary: tuple[Tensor, Tensor] | None = None
    own_mask: bool = False
    mask: Any = None
    masked: bool = False
    columns: Tensor | None = None
    marks: Tensor | None = None

    @property
    def length(self) -> int:
        """Tokens a row, padding included."""
        return self.tokens.length


@dataclass
class Running:
    """A forward of the decoder.

    Attributes:
        decoder: the text decoder.
        cache: its cache, or None.
        plan: what is to become of the videos in this forward, if there are any.
        length: the caller's length.
        past: tokens before this forward, in the caller's terms.
        following: [B, n] bool, the mask of what every layer's cache stores after its compressed prefix.
        whole: whether no mask was given, nor is one needed.
        state: the cache's compressed prefix, if there is one.
        causal_mask: makes a layer's mask (`Patch.causal_mask`).
        look: the first look for which this forward is made, or None.
        due: what may be evicted after this forward.
        views: input of the layers whose attention tells what.
        stages: those that were entered; the first is what the decoder itself sees.
        changed: whether anything was removed or merged.
        placed: whether the rotary embedding got the true positions.
    """

    decoder: Any
    cache: Any
    plan: Plan | None
    length: int
    past: int
    following: Tensor
    whole: bool
    state: CacheState | None
    causal_mask: Callable[..., Any]
    look: FirstLook | None = None
    due: list[Due] = field(default_factory=list)
    views: dict[int, LayerView] = field(default_factory=dict)
    stages: list[Stage] = field(default_factory=list)
    changed: bool = False
    placed: bool = False
    _starts: frozenset[int] = frozenset()
    _looked_at: frozenset[int] = frozenset()
    _asked: frozenset[int] = frozenset()
    _previous: LayerView | None = None

    def __post_init__(self) -> None:
        later = () if self.state is None else (prefix.start for prefix in self.state.prefixes[1:])
        planned = {} if self.plan is None else {s.layer: m for s, m in self.plan.stages.items() if s.layer >= 0}
        self._starts = frozenset(planned) | frozenset(later)
        asks = (layer for layer, m in planned.items() if "last_query_attention.previous" in m.needs)
        self._looked_at = frozenset(layer - 1 for layer in asks)
        if self.decodes and self.state is not None:
            self.due = due(self.state)
            self._asked = frozenset(layer for one in self.due for layer in one.layers().values())

    @property
    def has_inner_sites(self) -> bool:
        """Whether some layer sees another sequence than the first, or may."""
        return bool(self._starts)

    @property
    def concerns_layers(self) -> bool:
        """Whether `layer` has to be asked about every layer."""
        return self.has_inner_sites or bool(self._asked) or self.look is not None

    @property
    def decodes(self) -> bool:
        """Whether this is a decoding step: one token a row behind a prompt."""
        return self.plan is None and self.look is None and self.length == 1 and self.past > 0

    @property
    def rotary_positions(self) -> Tensor | None:
        """The survivors' position ids, for the rotary embedding; None if it is to use those it is given."""
        first = self.stages[0]
        return None if first.index is None else first.tokens.position_ids

    def begin(self, tokens: Sequence) -> Sequence:
        """The sequence that the decoder is to run over."""
        index = None
        shorter = None if self.plan is None else self.plan.carry_out(Site.projector(), tokens)
        if shorter is not None:
            tokens, index = shorter
            self.changed = True
        marks = None if self.plan is None else self.plan.marks(tokens)
        self.stages.append(Stage(0, _without_embeds(tokens), index, marks=marks))
        return tokens

    def arguments(self, tokens: Sequence, given: Mapping[str, Any]) -> dict[str, Any]:
        """What the decoder is to get instead of some of the arguments it was given, to run over `tokens`."""
        if self.state is None and not self.changed:
            return {}
        device, stored, n = tokens.mask.device, tokens.past_mask.shape[1], tokens.length
        found = {"inputs_embeds": tokens.embeds, "attention_mask": None if self.whole else tokens.full_mask}
        if "cache_position" in given:  # of transformers 4, which builds its masks by it
            found["cache_position"] = torch.arange(stored, stored + n, device=device)
        columns = torch.arange(n, device=device).expand(len(tokens.mask), -1)
        return found | {"position_ids": columns if self.changed else tokens.position_ids}

    def narrow_deepstack(self, kwargs: dict[str, Any]) -> None:
        """Lets the features that Qwen3-VL adds at its first layers follow the reduction before the LLM."""
        first = self.stages[0]
        assert self.plan is not None and first.index is not None
        visual = kwargs["visual_pos_masks"].to(first.index.device)
        row_of = (visual.flatten().cumsum(0) - 1).view_as(visual)
        left = sequence.take(visual, first.index) & first.tokens.mask
        rows = sequence.take(row_of, first.index)[left]
        features = [self.plan.narrow(f, row_of) for f in kwargs["deepstack_visual_embeds"]]
        kwargs["deepstack_visual_embeds"] = [f[rows.to(f.device)] for f in features]
        kwargs["visual_pos_masks"] = left

    def layer(
        self, i: int, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of decoder layer `i` as its stage has them."""
        hidden = args[0] if args else kwargs["hidden_states"]
        rotary = kwargs["position_embeddings"]
        if i in self._starts:
            hidden = self._enter(i, layer, hidden, rotary)
        stage = self.stages[-1]
        rotary = rotary if stage.rotary is None else stage.rotary
        if i in self._looked_at:
            self._previous = LayerView(layer, i, replace(stage.tokens, embeds=hidden), rotary, self.cache)
        if i in self._asked:
            self.views[i] = LayerView(layer, i, replace(stage.tokens, embeds=hidden), rotary, self.cache)
        if self.look is not None:
            self.look.at(LayerView(layer, i, replace(stage.tokens, embeds=hidden), rotary))
        if stage.rotary is None and not stage.own_mask:
            return args, kwargs
        kwargs["position_embeddings"] = rotary
        if stage.own_mask:
            kwargs["attention_mask"] = self._mask(stage, hidden)
        if kwargs.get("position_ids") is not None:
            if stage.columns is None:
                batch, n = stage.tokens.mask.shape
                stage.columns = torch.arange(n, device=hidden.device).expand(batch, -1)
            kwargs["position_ids"] = stage.columns
        if args:
            return (hidden, *args[1:]), kwargs
        kwargs["hidden_states"] = hidden
        return args, kwargs

    def new_state(self) -> CacheState:
        """What the cache holds after this forward, if something was removed or merged, or may be evicted later."""
        last = self.stages[-1]
        tail = self.length
        if last.index is not None:
            tail = sequence.untouched(last.index, last.tokens.mask, self.length)
        videos = () if self.state is None else self.state.videos
        if last.marks is not None:
            tail = min(tail, last.length - 1 - int((last.marks[..., 0] >= 0).any(0).nonzero().max()))
        prefixes = []
        for stage in self.stages:
            if not stage.differs:
                continue
            tokens = stage.tokens
            stored = tokens.full_mask.shape[1] - tail
            following = None if tokens.renumbered is None else tokens.following
            marks = self._marks(stage, len(videos))
            prefixes.append(
                CachedPrefix(
                    stage.start,
                    tokens.full_mask[:, :stored],
                    following,
                    end=self.past + self.length,
                    marks=None if marks is None else marks[:, :stored],
                )
            )
        if self.plan is not None and self.plan.evictions:
            videos = (*videos, *cached_videos(self.plan))
        return CacheState(self.past + self.length - tail, tuple(prefixes), videos)

    def _marks(self, stage: Stage, videos: int) -> Tensor | None:
        """[B, n, 2] whose tokens a stage and what lies before it in the cache are, behind so many earlier videos."""
        earlier = None if self.state is None else self.state.at(stage.start).marks
        if earlier is None and stage.marks is None:
            return None
        marks = torch.full((*stage.tokens.full_mask.shape, 2), -1)
        if earlier is not None:
            marks[:, : earlier.shape[1]] = earlier
        if stage.marks is not None:
            marks[:, -stage.length :] = stage.marks
            marks[:, -stage.length :, 0] += videos * (stage.marks[..., 0] >= 0)
        return marks

    def lengths(self) -> list[int]:
        """Tokens that every decoder layer ran over, padding included."""
        return [self.stage_of(i).length for i in range(len(self.decoder.layers))]

    def stage_of(self, layer: int) -> Stage:
        """The stage a decoder layer belongs to."""
        return next(stage for stage in reversed(self.stages) if stage.start <= layer)

    def refuse_skipped_sites(self) -> None:
        """RuntimeError if a layer at which a method acts was not called through its hooks."""
        skipped = self._starts - {stage.start for stage in self.stages[1:]}
        if skipped:
            raise RuntimeError(
                f"decoder layers {sorted(skipped)} of {type(self.decoder).__name__} were not called through their "
                "hooks, so nothing was reduced there (were layers replaced after compression was applied?)"
            )

    def back(self, hidden: Tensor, stage: Stage) -> Tensor:
        """Hidden states of a stage at the caller's length, zeros where a token is gone."""
        if stage.index is None:
            return hidden
        return sequence.scatter(hidden, stage.index, stage.tokens.mask, self.length)

    def _enter(self, i: int, layer: Any, hidden: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        """Begins a stage at layer `i`, whose cache may store another prefix, and where a method may act."""
        before = self.stages[-1]
        past_mask, shift, renumbered, differs = before.tokens.past_mask, None, None, False
        if self.state is not None:
            past_mask, total = sequence.after(self.state.at(i), self.following)
            shift = self._further(before.start, total)
            renumbered = self.state.at(i).renumbered
            differs = any(prefix.start == i for prefix in self.state.prefixes[1:])
        tokens = before.tokens.entering(hidden, past_mask, shift, renumbered)
        index = None if before.index is None else before.index.to(hidden.device)
        own = before.rotary if shift is None else self.decoder.rotary_emb(hidden, tokens.position_ids)
        if self.plan is not None:
            view = LayerView(layer, i, tokens, own or rotary, self.cache, self._previous)
            shorter = self.plan.carry_out(Site.decoder(i), tokens, view)
            self._previous = None
            if shorter is not None:
                tokens, local = shorter
                index = local if index is None else sequence.take(index, local)
                own = self.decoder.rotary_emb(tokens.embeds, tokens.position_ids)
                differs = self.changed = True
        own_mask = before.own_mask or differs
        marks = None if self.plan is None else self.plan.marks(tokens)
        self.stages.append(Stage(i, _without_embeds(tokens), index, differs, own, own_mask, marks=marks))
        return tokens.embeds

    def _further(self, start: int, total: Tensor | None) -> Tensor | None:
        """How much more earlier turns shifted the positions at a stage than at the stage before; None: nothing more."""
        assert self.state is not None
        earlier = self.state.at(start).shift
        if total is None or total is earlier:
            return None
        return total if earlier is None else total - earlier.to(total.device)

    def _mask(self, stage: Stage, hidden: Tensor) -> Any:
        """The attention mask of a stage, made once."""
        if not stage.masked:
            mask = None if self.whole else stage.tokens.full_mask
            stage.mask = self.causal_mask(self.decoder, hidden, mask, self.cache, stage.start)
            stage.masked = True
        return stage.mask


def _without_embeds(tokens: Sequence) -> Sequence:
    """So that a layer's hidden states do not outlive it."""
    return replace(tokens, embeds=tokens.embeds[:, :0])
