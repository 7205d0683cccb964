"""`Method`, the base class of every compression method, and discovery of the methods in `vidcompress/methods/`."""

from __future__ import annotations

import difflib
import importlib
import itertools
import math
import numbers
import os
import pkgutil
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from vidcompress.precision import full_precision
from vidcompress.tokens import CachedTokens, Grid, Reduction, Site, VideoTokens

DEPTH = 28
"""Decoder layers of the 7B models that the papers measure, assumed where no model is at hand."""

USUAL_DEPTHS = (DEPTH, 24, 80)
"""Decoder layers of the 7B, 0.5B and 72B models."""


def setting(
    default: Any, doc: str, *, low: float | None = None, high: float | None = None, above: float | None = None
) -> Any:
    """A dataclass field that says what it means and which values it takes: from `low` (or above `above`) to `high`."""
    return field(default=default, metadata={"doc": doc, "low": low, "high": high, "above": above})


@dataclass(kw_only=True)
class Method:
    """One published compression method. Its fields are its configuration; it decides and never moves data.

    A subclass writes `reduce`, and `sites` and `count` if it acts inside the LLM; or `evict`, if it acts between
    decoding steps. Class attributes say what it needs (`needs`: signals by name) and how it counts before the LLM
    (`budget_rule`). Raises ValueError or TypeError on construction when a field is out of range or of the wrong type.
    """

    name: ClassVar[str] = ""
    needs: ClassVar[frozenset[str]] = frozenset()
    budget_rule: ClassVar[Literal["exact", "frame_floor", "frame_round"]] = "exact"
    looks_ahead: ClassVar[bool] = False
    """Whether `reduce` is called at the first site even if nothing is to be removed: later ones need its notes."""
    slow: ClassVar[bool] = False
    """Whether a real video takes minutes: benchmarks leave it out unless it is asked for."""
    costly: ClassVar[str] = ""
    """Why it takes more than twice as long as FastVID, if it does (`vidcompress bench`)."""

    retention_ratio: float = setting(0.10, "fraction of the video tokens that is kept, in (0, 1]", above=0, high=1)
    positions: Literal["keep", "renumber"] = setting(
        "keep", "survivors keep their own RoPE positions, or the shortened sequence is numbered anew"
    )

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        package, _, stem = cls.__module__.rpartition(".")
        cls.name = stem if package == "vidcompress.methods" else cls.__name__

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for f in fields(self):
            setattr(self, f.name, _checked(self.name, f.name, hints[f.name], getattr(self, f.name), f.metadata))

    # -- what a method says of itself --------------------------------------------------------------------------------
    def sites(self, depth: int = DEPTH) -> list[Site]:
        """Where it acts in an LLM of `depth` decoder layers, in order. The default is the projector's output."""
        return [Site.projector()]

    def looks(self, depth: int = DEPTH) -> tuple[int, ...]:
        """Decoder layers that give the signal `first_look`: the LLM runs up to them over the whole prompt before this
        method reduces it. The default is none."""
        return ()

    @property
    def exact(self) -> bool:
        """True if `budget` and `count` say what will be kept; False if they only say the most that can be."""
        return True

    @property
    def loose(self) -> bool:
        """True if fewer tokens than `count` may be kept even where it covers all: then `reduce` is always called, and
        answers with the identity itself where nothing is to go."""
        return False

    def rests(self, site: Site, notes: Mapping[str, Any]) -> bool:
        """Whether nothing goes at `site`, whatever the tokens are, after the `notes` of the sites before it. Then no
        signal is taken for it either."""
        return False

    def count(self, site: Site, grid: Grid, entered: int, before: int) -> int:
        """Number of tokens kept at `site`, known before any feature is (D3).

        Args:
            grid: (t, h, w) of the whole video.
            entered: its tokens that entered the LLM; all of them where `site` is the projector.
            before: its tokens that reach this site.
        """
        if site == Site.projector():
            return self.budget(grid)
        return min(before, max(1, floor(self.retention_ratio * before)))

    def on(self, model_type: str) -> Method:
        """This method as a model of that type needs it; itself unless a subclass says otherwise."""
        return self

    def wanted(self, tokens: VideoTokens, site: Site) -> int:
        """`count` for the tokens that reached `site`."""
        return self.count(site, tokens.grid, tokens.entered, len(tokens))

    def budget(self, grid: Grid) -> int:
        """Tokens kept of a (t, h, w) video before the LLM: a pure function of the grid and the fields (D3)."""
        if Site.projector() not in self.sites():
            return math.prod(grid)
        t, h, w = grid
        per_frame = h * w
        total = t * per_frame
        if self.budget_rule == "exact":
            count = max(1, floor(self.retention_ratio * total))
        elif self.budget_rule == "frame_floor":
            count = t * max(1, floor(self.retention_ratio * per_frame))
        else:
            count = t * max(1, round(self.retention_ratio * per_frame))
        return min(count, total)

    # -- what a method does ------------------------------------------------------------------------------------------
    def reduce(self, tokens: VideoTokens, site: Site) -> Reduction:
        """The decision for one video. Called only when there is something to remove."""
        raise NotImplementedError

    def decide(self, tokens: VideoTokens, site: Site) -> Reduction:
        """`reduce`, with the promises kept: a budget that covers all tokens changes nothing, and the count is exact."""
        count = self.wanted(tokens, site)
        asked = self.loose or (self.looks_ahead and site.stage == 0)
        if self.rests(site, tokens.notes) or (count >= len(tokens) and not asked):
            return Reduction.identity(len(tokens), tokens.features.device)
        with torch.no_grad(), full_precision(tokens.features.device):
            reduction = self.reduce(tokens, site).check()
        if len(reduction) > count or (self.exact and len(reduction) != count):
            raise RuntimeError(f"{self.name} kept {len(reduction)} tokens of {len(tokens)} at {site}, not {count}")
        return reduction

    def evict(self, tokens: CachedTokens, site: Site) -> Tensor:
        """[K] ascending indices of the cached tokens that stay. Called after a decoding step, and only when there is
        something to remove; what goes is gone for all later ones."""
        raise NotImplementedError

    def retain(self, tokens: CachedTokens, site: Site) -> Tensor:
        """`evict`, with the promises kept."""
        count = self.count(site, tokens.grid, tokens.entered, len(tokens))
        with torch.no_grad(), full_precision(tokens.index.device):
            keep = Reduction(self.evict(tokens, site), len(tokens)).check().keep
        if len(keep) > count or (self.exact and len(keep) != count):
            raise RuntimeError(f"{self.name} kept {len(keep)} cached tokens of {len(tokens)} at {site}, not {count}")
        return keep

    def settings(self) -> dict[str, Any]:
        """The fields as plain values, ready for YAML or JSON."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


class TwoHalves:
    """A method made of two, to be named first among the bases: the one that acts before the LLM, then the one inside.

    A subclass gives both their names, and the fraction `keep_ratio` that the inner half keeps.
    """

    outer: ClassVar[type[Method]]
    inner: ClassVar[type[Method]]
    keep_ratio: float

    @property
    def inner_ratio(self) -> float:
        """What the inner half takes for its own `retention_ratio`."""
        return self.keep_ratio

    def sites(self: Any, depth: int = DEPTH) -> list[Site]:
        """Both halves'."""
        return [*self.outer.sites(self, depth), *self.inner.sites(self, depth)]

    def count(self: Any, site: Site, grid: Grid, entered: int, before: int) -> int:
        """That of the half that acts there."""
        return self._half(site).count(self, site, grid, entered, before)

    def reduce(self: Any, tokens: VideoTokens, site: Site) -> Reduction:
        """That of the half that acts there."""
        return self._half(site).reduce(self, tokens, site)

    def _half(self, site: Site) -> type[Method]:
        return self.inner if site.is_inner else self.outer


class Pipeline:
    """Several methods at different sites, in the order in which they act: at most one before the LLM, at most one at
    the input of each decoder layer, and at most one at each between decoding steps. Each follows its own `positions`.

    Raises ValueError when two methods meet at one site, or are listed in another order than they act in, at every usual
    depth of an LLM; `stages` tells for one depth.
    """

    def __init__(self, methods: Iterable[Method]) -> None:
        self.methods = tuple(methods)
        if not self.methods:
            raise ValueError("a pipeline needs at least one method")
        refused = []
        for depth in USUAL_DEPTHS:
            try:
                _check([(method, method.sites(depth)) for method in self.methods])
            except ValueError as error:
                refused.append(error)
        if len(refused) == len(USUAL_DEPTHS):
            raise refused[0]

    def __repr__(self) -> str:
        return f"Pipeline({', '.join(map(repr, self.methods))})"

    @classmethod
    def of(cls, compression: Method | Pipeline) -> Pipeline:
        """A pipeline of one, or the pipeline itself."""
        return compression if isinstance(compression, Pipeline) else cls([compression])

    def __iter__(self) -> Iterator[Method]:
        return iter(self.methods)

    @property
    def name(self) -> str:
        """The methods' names, joined."""
        return "+".join(m.name for m in self.methods)

    @property
    def needs(self) -> frozenset[str]:
        """Every signal some method needs."""
        return frozenset().union(*(m.needs for m in self.methods))

    @property
    def evicts(self) -> bool:
        """Whether some method acts between decoding steps."""
        return any(site.is_decoding for method in self.methods for site in method.sites())

    def on(self, model_type: str) -> Pipeline:
        """Its methods, each as a model of that type needs it."""
        return Pipeline(method.on(model_type) for method in self.methods)

    def stages(self, depth: int = DEPTH) -> dict[Site, Method]:
        """The method at every site that a prompt passes in an LLM of `depth` decoder layers, in order of the layers.

        Raises ValueError if a site lies beyond the depth, two methods meet, or they are not listed in order.
        """
        return {site: method for site, method in self._acting(depth).items() if not site.is_decoding}

    def evictions(self, depth: int = DEPTH) -> dict[Site, Method]:
        """The method at every site between decoding steps, in the order of the layers; raises as `stages`."""
        return {site: method for site, method in self._acting(depth).items() if site.is_decoding}

    def _acting(self, depth: int) -> dict[Site, Method]:
        """The method at every site, in order."""
        acting = [(method, method.sites(depth)) for method in self.methods]
        _check(acting)
        stages = {site: method for method, sites in acting for site in sites}
        for site, method in stages.items():
            if site.layer >= depth:
                raise ValueError(
                    f"{method.name} acts at the input of layer {site.layer}; this decoder has {depth} layers, "
                    f"0 to {depth - 1}"
                )
        return dict(sorted(stages.items(), key=lambda stage: stage[0].order))

    def looks(self, depth: int = DEPTH) -> tuple[int, ...]:
        """Ascending decoder layers at which the whole prompt is looked at before it is reduced.

        Raises ValueError for a layer that an LLM of this depth does not have.
        """
        layers = {layer: method for method in self.methods for layer in method.looks(depth)}
        for layer, method in layers.items():
            if not 0 <= layer < depth:
                raise ValueError(
                    f"{method.name} looks at layer {layer}; this decoder has {depth} layers, 0 to {depth - 1}"
                )
        return tuple(sorted(layers))

    def counts(self, grid: Grid, depth: int = DEPTH) -> dict[Site, int]:
        """Tokens of a (t, h, w) video that are kept at every site (at most, if some method is not `exact`)."""
        entered = now = math.prod(grid)
        counts = {}
        for site, method in self.stages(depth).items():
            now = counts[site] = min(now, method.count(site, grid, entered, now))
            if site == Site.projector():
                entered = now
        stored = self._by_layer(counts, grid, depth)
        for site, method in self.evictions(depth).items():
            before = stored[site.layer]
            now = counts[site] = min(before, method.count(site, grid, entered, before))
            stored[site.layer :] = [min(now, n) for n in stored[site.layer :]]
        return counts

    def lengths(self, grid: Grid, depth: int = DEPTH) -> list[int]:
        """Tokens of a (t, h, w) video in a prompt that every decoder layer runs over: `depth` numbers."""
        return self._by_layer(self.counts(grid, depth), grid, depth)

    def stored(self, grid: Grid, depth: int = DEPTH) -> list[int]:
        """Tokens of a (t, h, w) video that each decoder layer's cache holds once decoding has begun; at most so many in
        layers that ran over fewer than the one whose tokens were chosen from."""
        counts, lengths = self.counts(grid, depth), self.lengths(grid, depth)
        for site in self.evictions(depth):
            lengths[site.layer :] = [min(counts[site], n) for n in lengths[site.layer :]]
        return lengths

    def _by_layer(self, counts: Mapping[Site, int], grid: Grid, depth: int) -> list[int]:
        now, lengths = counts.get(Site.projector(), math.prod(grid)), []
        for layer in range(depth):
            now = counts.get(Site.decoder(layer), now)
            lengths.append(now)
        return lengths


def _check(acting: Sequence[tuple[Method, Sequence[Site]]]) -> None:
    """ValueError if two methods act at one site, or one of them begins before the one listed before it."""
    taken: dict[Site, Method] = {}
    for method, sites in acting:
        for site in sites:
            if site in taken:
                raise ValueError(f"{taken[site].name} and {method.name} both act at {site}; one is allowed")
            taken[site] = method
    begins = [(method, sites[0]) for method, sites in acting]
    for (method, site), (later, earlier_site) in itertools.pairwise(begins):
        if earlier_site.order < site.order:
            raise ValueError(
                f"{later.name} acts at {earlier_site}, before {method.name} at {site}; list the methods of a pipeline "
                "in the order in which they act"
            )


def list_methods() -> dict[str, type[Method]]:
    """Every shipped method, by name. The folder `vidcompress/methods/` is the list."""
    import vidcompress.methods as folder

    found = {}
    for info in pkgutil.iter_modules(folder.__path__, folder.__name__ + "."):
        module = importlib.import_module(info.name)
        own = [c for c in vars(module).values() if isinstance(c, type) and c.__module__ == info.name]
        for cls in own:
            if issubclass(cls, Method):
                found[cls.name] = cls
    return dict(sorted(found.items()))


def floor(x: float) -> int:
    """floor with a guard for products such as 0.29 * 100, which binary floats put just below the integer."""
    return math.floor(x + 1e-9)


def decay_for(mean: float) -> float:
    """q in [0, 1] such that 1, q, q^2, q^3 have this mean, 0.25 to 1: a schedule over four quarters of the layers."""
    low, high = 0.0, 1.0
    for _ in range(60):
        q = (low + high) / 2
        low, high = (q, high) if 1 + q + q**2 + q**3 < 4 * mean else (low, q)
    return high


def did_you_mean(word: str, words: Iterable[str]) -> str:
    """' (did you mean ...?)' for an unknown word, or nothing."""
    close = difflib.get_close_matches(word, list(words), 1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _checked(method: str, name: str, hint: Any, value: Any, meta: typing.Mapping[str, Any]) -> Any:
    """`value` as `hint` wants it; TypeError or ValueError that names method, field, value and choices."""
    where = f"{method}: {name}"
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if value is None:
        if type(None) in options:
            return None
        raise TypeError(f"{where} must be given, got None")
    hint = next(o for o in options if o is not type(None))
    if typing.get_origin(hint) is Literal:
        choices = typing.get_args(hint)
        if value not in choices:
            hint_text = did_you_mean(value, choices) if isinstance(value, str) else ""
            raise ValueError(f"{where} must be one of {', '.join(map(repr, choices))}, got {value!r}{hint_text}")
        return value
    if typing.get_origin(hint) is tuple:
        if not isinstance(value, (list, tuple)) or not value:
            raise TypeError(f"{where} must be a list of {typing.get_args(hint)[0].__name__}, got {value!r}")
        return tuple(_checked(method, name, typing.get_args(hint)[0], part, meta) for part in value)
    kinds: dict[Any, Any] = {float: numbers.Real, int: numbers.Integral, bool: bool, str: (str, os.PathLike)}
    accepted = kinds.get(hint)
    if accepted is None:
        return value
    if not isinstance(value, accepted) or (isinstance(value, bool) and hint is not bool):
        remedy = " (YAML reads a number in exponent form only with a dot: 1.0e-6)" if _looks_exponential(value) else ""
        raise TypeError(f"{where} must be of type {hint.__name__}, got {value!r}{remedy}")
    if hint is str:
        return os.fspath(value)
    if hint in (int, float):
        low, above, high = (meta.get(name) for name in ("low", "above", "high"))
        within = (low is None or value >= low) and (above is None or value > above) and (high is None or value <= high)
        if not within or not (isinstance(value, numbers.Integral) or math.isfinite(value)):
            if high is not None:
                bounds = f"in ({above}, {high}]" if low is None else f"in [{low}, {high}]"
            else:
                bounds = "finite" if low is None else f"at least {low}"
            raise ValueError(f"{where} must be {bounds}, got {value!r}")
        return hint(value)
    return value


def _looks_exponential(value: Any) -> bool:
    try:
        float(value)
    except (TypeError, ValueError):
        return False
    return isinstance(value, str) and "e" in value.lower()
