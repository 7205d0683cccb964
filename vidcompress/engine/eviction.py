"""Between decoding steps: cached tokens of a video that a method gives up leave the KV cache, whose memory is freed.

While a prompt is read, every stored token that belongs to a video is marked (`CachedPrefix.marks`). After a forward of
one token a row the methods are asked what stays; from the layer on that they name, keys and values of the rest are cut
out of the cache, and later steps run over what is left. Positions stay as they are: keys are cached rotated.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vidcompress.engine.cache import CachedPrefix, CacheState
from vidcompress.engine.sequence import left_pad, take
from vidcompress.method import Method
from vidcompress.tokens import CachedTokens, Grid, Site
from vidcompress.trace import Eviction, Prompt

if TYPE_CHECKING:
    from vidcompress.engine.plan import Plan
    from vidcompress.engine.stages import Running

SIGNALS = {"last_query_attention": 0, "last_query_attention.previous": 1}
"""What a method can be told between decoding steps, and how many layers before its own that is taken."""


@dataclass(frozen=True)
class CachedVideo:
    """One video of which tokens may yet be evicted. Copies of a cache share it.

    Attributes:
        number: index of the video within its prompt.
        grid: (t, h, w) of its tokens.
        line: tokens that a newline follows, each time; 0 if none does.
        entered: how many tokens of it entered the LLM.
        methods: by site, in order.
        notes: what these methods noted while the prompt was read, by site.
        prompt: the trace's record, or None if the trace is off.
    """

    number: int
    grid: Grid
    line: int
    entered: int
    methods: Mapping[Site, Method]
    notes: Mapping[Site, Mapping[str, Any]]
    prompt: Prompt | None

    def __deepcopy__(self, memo: dict[int, Any]) -> CachedVideo:
        return self

    def may_lose(self, site: Site, stored: int) -> bool:
        """Whether the method at `site` gives up any of so many tokens."""
        method = self.methods.get(site)
        return method is not None and (method.loose or method.count(site, self.grid, self.entered, stored) < stored)


def cached_videos(plan: Plan) -> tuple[CachedVideo, ...]:
    """The videos of a prompt, in order."""
    found = {}
    for v in plan.followed:  # beams of a sample share theirs
        notes = {site: v.notes.get(id(method), {}) for site, method in plan.evictions.items()}
        found[v.number] = CachedVideo(
            v.number, v.video.grid, v.video.line, v.entered, plan.evictions, notes, plan.prompt
        )
    return tuple(found[number] for number in sorted(found))


def refuse_fixed_cache(cache: Any, methods: Mapping[Site, Method]) -> None:
    """ValueError for a cache out of which tokens cannot be cut."""
    names = ", ".join(f"{method.name} at {site}" for site, method in methods.items())
    if not hasattr(cache, "layers"):
        raise ValueError(
            f"{names} removes tokens from the KV cache between decoding steps, which is known for caches of "
            f"transformers 5 only; this {type(cache).__name__} is of transformers 4"
        )
    others = {type(layer).__name__ for layer in cache.layers} - {"DynamicLayer"}
    if others or getattr(cache, "offloading", False):
        raise ValueError(
            f"{names} removes tokens from the KV cache between decoding steps; this {type(cache).__name__} "
            f"({', '.join(sorted(others)) or 'offloaded'}) is allocated as a whole, does not keep keys as they are, or "
            "keeps them elsewhere, so that nothing could be cut out of it. Use a DynamicCache"
        )


@dataclass(frozen=True)
class Due:
    """One video of one row of which the method at a site may give something up after this step."""

    site: Site
    method: Method
    row: int
    number: int

    def layers(self) -> dict[str, int]:
        """By signal, the layer in which it is taken."""
        found = {name: self.site.layer - back for name, back in SIGNALS.items() if name in self.method.needs}
        return {name: layer for name, layer in found.items() if layer >= 0}  # nothing is before layer 0


def due(state: CacheState) -> list[Due]:
    """All that is due after the next step, in the order of the sites."""
    found = []
    for number, video in enumerate(state.videos):
        for site, method in video.methods.items():
            stored = _places(state, site.layer, number).sum(1).tolist()
            found += [Due(site, method, row, number) for row, n in enumerate(stored) if n and video.may_lose(site, n)]
    return sorted(found, key=lambda one: one.site.order)


def evict(running: Running, traced: bool) -> None:
    """Asks the methods after a decoding step, and cuts what they give up out of the cache."""
    state = running.state
    assert state is not None
    waiting = [one for one in running.due if bool(running.stages[0].tokens.mask[one.row, -1])]
    signals = [_signals(running, state, one) for one in waiting]  # of what the step saw: all, before anything is cut
    for site, ones in itertools.groupby(zip(waiting, signals, strict=True), lambda pair: pair[0].site):
        stays = {}
        for one, seen in ones:
            index = _index(state, site.layer, one)
            if state.videos[one.number].may_lose(site, len(index)):
                stays[one.row, one.number] = _decide(running, one, index, seen, traced)
        if stays:
            _cut(running, site.layer, stays)


def _places(state: CacheState, layer: int, number: int) -> Tensor:
    """[B, physical] bool: where the prefix of a layer holds tokens of a video."""
    prefix = state.at(layer)
    if prefix.marks is None:
        return torch.zeros(prefix.mask.shape, dtype=torch.bool)
    return (prefix.marks[..., 0] == number) & (prefix.marks[..., 1] >= 0)


def _index(state: CacheState, layer: int, one: Due) -> Tensor:
    """[M] places in the grid of the tokens that a layer still holds."""
    marks = state.at(layer).marks
    assert marks is not None
    return marks[one.row, _places(state, layer, one.number)[one.row], 1]


def _signals(running: Running, state: CacheState, one: Due) -> dict[str, tuple[Tensor, Tensor]]:
    """By name: places in the grid [M], ascending, and what the token just decoded pays to each [M]."""
    found = {}
    for name, layer in one.layers().items():
        columns = _places(state, layer, one.number)[one.row].nonzero().squeeze(1)
        found[name] = _index(state, layer, one), running.views[layer].attention_to_cached(one.row, columns)
    return found


def _decide(
    running: Running, one: Due, index: Tensor, signals: Mapping[str, tuple[Tensor, Tensor]], traced: bool
) -> Tensor:
    """[K] those of the places `index` that stay."""
    assert running.state is not None
    video, start = running.state.videos[one.number], time.perf_counter()
    here = {name: paid[torch.searchsorted(places, index).to(paid.device)] for name, (places, paid) in signals.items()}
    device = next((paid.device for paid in here.values()), index.device)
    seen = CachedTokens(video.grid, index.to(device), here, video.notes[one.site], video.entered)
    kept = index[one.method.retain(seen, one.site).cpu()]
    if traced and video.prompt is not None:
        length, seconds = int(running.cache.get_seq_length()), time.perf_counter() - start
        facts = (one.row, video.number, one.site, one.method.name, length)
        video.prompt.evictions.append(Eviction(*facts, len(index), len(kept), seconds, kept))
    return kept


def _cut(running: Running, layer: int, stays: Mapping[tuple[int, int], Tensor]) -> None:
    """Cuts out of the caches of the layers from `layer` on what does not stay of the videos in these rows."""
    state = running.state
    assert state is not None
    prefixes = list(state.prefixes)
    if all(prefix.start != layer for prefix in prefixes):
        prefixes.append(replace(state.at(layer), start=layer))
    prefixes.sort(key=lambda prefix: prefix.start)
    ends = [prefix.start for prefix in prefixes[1:]] + [len(running.cache.layers)]
    for i, (prefix, end) in enumerate(zip(prefixes, ends, strict=True)):
        if prefix.start >= layer:
            index, prefixes[i] = _shortened(prefix, stays, state.videos)
            for cached in running.cache.layers[prefix.start : end]:
                cached.keys, cached.values = (
                    _without(t, index, prefix.mask.shape[1]) for t in (cached.keys, cached.values)
                )
    state.prefixes = tuple(prefixes)


def _shortened(
    prefix: CachedPrefix, stays: Mapping[tuple[int, int], Tensor], videos: tuple[CachedVideo, ...]
) -> tuple[Tensor, CachedPrefix]:
    """[B, n] the column that each token of the shortened prefix came from, and that prefix."""
    marks, real = prefix.marks, prefix.mask.cpu()
    assert marks is not None
    kept = real.clone()
    for (row, number), places in stays.items():
        own, place = marks[row, :, 0] == number, marks[row, :, 1]
        alive = torch.isin(place, places)
        line = videos[number].line
        if line and int((own & (place < 0)).sum()) > 1:  # a newline stays as long as a token of its line does
            alive |= torch.isin(-1 - place, place[own & alive] // line) & (place < 0)
        else:
            alive |= place < 0
        kept[row] &= ~own | alive
    index, real = left_pad([row.nonzero().squeeze(1) for row in kept], real)
    return index, replace(
        prefix, mask=real.to(prefix.mask.device), marks=take(marks, index).masked_fill(~real[..., None], -1)
    )


def _without(stored: Tensor, index: Tensor, prefix: int) -> Tensor:
    """Keys or values [B, G, n, D], of whose first `prefix` only those at `index` [B, k] stay: a new tensor."""
    index = index.to(stored.device)[:, None, :, None].expand(-1, stored.shape[1], -1, stored.shape[3])
    return torch.cat([stored[:, :, :prefix].gather(2, index), stored[:, :, prefix:]], 2)
