"""`Method`, the base class of every compression method, and discovery of the methods in `vidcompress/methods/`."""

from __future__ import annotations

import difflib
import importlib
import math
import numbers
import os
import pkgutil
import types
import typing
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal

import torch

from vidcompress.precision import full_precision
from vidcompress.tokens import Grid, Reduction, Site, VideoTokens


def setting(
    default: Any, doc: str, *, low: float | None = None, high: float | None = None, above: float | None = None
) -> Any:
    """A dataclass field that says what it means and which values it takes: from `low` (or above `above`) to `high`."""
    return field(default=default, metadata={"doc": doc, "low": low, "high": high, "above": above})


@dataclass(kw_only=True)
class Method:
    """One published compression method. Its fields are its configuration; it decides and never moves data.

    A subclass writes `reduce`. Class attributes say what it needs (`needs`: signals by name) and how it counts
    (`budget_rule`). Raises ValueError or TypeError on construction when a field is out of range or of the wrong type.
    """

    name: ClassVar[str] = ""
    needs: ClassVar[frozenset[str]] = frozenset()
    budget_rule: ClassVar[Literal["exact", "frame_floor", "frame_round"]] = "exact"

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
    def sites(self) -> list[Site]:
        """Where it acts. The default is the projector's output, before the LLM."""
        return [Site.projector()]

    @property
    def exact(self) -> bool:
        """True if `budget` is the count that will be kept; False if it is only the most that can be."""
        return True

    def budget(self, grid: Grid) -> int:
        """Number of tokens kept of a (t, h, w) video: a pure function of the grid and the fields (D3)."""
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
        if site == Site.projector() and self.budget(tokens.grid) >= len(tokens):
            return Reduction.identity(len(tokens), tokens.features.device)
        with torch.no_grad(), full_precision(tokens.features.device):
            reduction = self.reduce(tokens, site).check()
        budget = self.budget(tokens.grid)
        if site == Site.projector() and (len(reduction) > budget or (self.exact and len(reduction) != budget)):
            raise RuntimeError(f"{self.name} kept {len(reduction)} tokens of {len(tokens)}, its budget is {budget}")
        return reduction

    def settings(self) -> dict[str, Any]:
        """The fields as plain values, ready for YAML or JSON."""
        return {f.name: getattr(self, f.name) for f in fields(self)}


class Pipeline:
    """Several methods at different sites: at most one before the LLM, at most one at each decoder layer.

    Raises ValueError when two methods meet at one site, or disagree on `positions`.
    """

    def __init__(self, methods: Iterable[Method]) -> None:
        self.methods = tuple(methods)
        if not self.methods:
            raise ValueError("a pipeline needs at least one method")
        self.stages: dict[Site, Method] = {}
        for method in self.methods:
            for site in method.sites():
                if site in self.stages:
                    raise ValueError(f"{self.stages[site].name} and {method.name} both act at {site}; one is allowed")
                self.stages[site] = method
        policies = {m.positions for m in self.methods}
        if len(policies) > 1:
            raise ValueError(f"the methods of a pipeline must agree on `positions`, got {sorted(policies)}")

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
    def positions(self) -> str:
        """The policy all methods agree on."""
        return self.methods[0].positions


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


def nearest(word: str, words: Iterable[str]) -> str:
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
            hint_text = nearest(value, choices) if isinstance(value, str) else ""
            raise ValueError(f"{where} must be one of {', '.join(map(repr, choices))}, got {value!r}{hint_text}")
        return value
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
