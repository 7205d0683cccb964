"""What was kept, where, and what it cost: read by the CLI, by tests and by anyone who wants to look."""

from __future__ import annotations

import json
import os
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from vidcompress.tokens import Grid, Reduction, Site

SPANS = ("segments", "windows", "scenes")
"""Notes under which a method records runs of frames, by what its paper calls them."""


@dataclass(frozen=True)
class Step:
    """One reduction of one video at one site.

    Attributes:
        row, video: batch row and index of the video within the prompt.
        before, after: video tokens, newlines not counted.
        newlines: newline tokens of this video that stay beside the survivors.
        seconds: wall time of the decision (the device is synchronised around it); carrying it out is in the prompt's.
    """

    row: int
    video: int
    site: Site
    method: str
    grid: Grid
    before: int
    after: int
    newlines: int
    seconds: float
    reduction: Reduction

    @property
    def spans(self) -> list[tuple[int, int]] | None:
        """Runs of the grid's frames [first, behind the last) that the method told apart; None where it noted none."""
        found = next((self.reduction.notes[name] for name in SPANS if name in self.reduction.notes), None)
        return None if found is None else [(int(start), int(end)) for start, end in found]

    def to_dict(self) -> dict[str, Any]:
        """JSON-serialisable; `kept`, `merge` and `notes` come from the reduction."""
        facts = {k: getattr(self, k) for k in ("row", "video", "method", "before", "after", "newlines", "seconds")}
        return facts | {"site": str(self.site), "grid": list(self.grid)} | self.reduction.to_dict()


@dataclass(frozen=True)
class Eviction:
    """Cached tokens of one video that were given up between two decoding steps.

    Attributes:
        row, video: batch row at that time, and index of the video within the prompt.
        length: tokens in the cache by then, in the caller's terms, the one just decoded included.
        before, after: tokens of the video, newlines not counted, in the caches from the site's layer on.
        seconds: wall time of the decision.
        kept: [after] their places in the video's grid.
    """

    row: int
    video: int
    site: Site
    method: str
    length: int
    before: int
    after: int
    seconds: float
    kept: Tensor

    def to_dict(self) -> dict[str, Any]:
        """JSON-serialisable."""
        names = ("row", "video", "method", "length", "before", "after", "seconds")
        return {k: getattr(self, k) for k in names} | {"site": str(self.site), "kept": self.kept.tolist()}


@dataclass
class Prompt:
    """One prefill: its reductions, and the sequence lengths before and after them.

    Attributes:
        compression: name and settings of every method.
        head: where the SigLIP pooling head came from; None if none was used (see docs/decisions.md, D6).
        length_before, length_after: tokens the decoder would have run over, and those that entered its first layer,
            padding included.
        layer_lengths: tokens that every decoder layer ran over, padding included.
        seconds: wall time of everything the library did at this prefill: decisions, merging, shortening. The signals
            from the tower come on top.
        inner_seconds: the part of `seconds` that was spent between decoder layers.
        look_seconds: the part of `seconds` that a first look inside the decoder took, for methods that ask for one.
        looked_at: decoder layers that it looked at; it ran over `length_before` tokens up to the last of them.
        video_tokens: of all videos and rows before compression, newlines not counted.
        evictions: what decoding steps behind this prompt removed from its cache, in order.
        signal_seconds: wall time of the saliency and frame features taken from the vision tower.
    """

    steps: list[Step] = field(default_factory=list)
    length_before: int = 0
    length_after: int = 0
    seconds: float = 0.0
    signal_seconds: float = 0.0
    compression: list[dict[str, Any]] = field(default_factory=list)
    head: str | None = None
    layer_lengths: list[int] = field(default_factory=list)
    inner_seconds: float = 0.0
    look_seconds: float = 0.0
    looked_at: list[int] = field(default_factory=list)
    video_tokens: int = 0
    evictions: list[Eviction] = field(default_factory=list)

    @property
    def before(self) -> int:
        """Video tokens in this prompt before compression, over all videos and rows, newlines not counted."""
        return sum({(s.row, s.video): s.before for s in reversed(self.steps)}.values()) or self.video_tokens

    @property
    def after(self) -> int:
        """Video tokens that are left after the last site of the prompt."""
        return sum({(s.row, s.video): s.after for s in self.steps}.values()) or self.video_tokens

    def to_dict(self) -> dict[str, Any]:
        """JSON-serialisable."""
        names = ["compression", "head", "before", "after", "length_before", "length_after", "layer_lengths"]
        names += ["seconds", "inner_seconds", "look_seconds", "looked_at", "signal_seconds"]
        lists = {"steps": [s.to_dict() for s in self.steps], "evictions": [e.to_dict() for e in self.evictions]}
        return {k: getattr(self, k) for k in names} | lists


class Trace:
    """The last prompts, newest last. `trace.enabled = False` stops recording and its device synchronisation.

    Args:
        history: how many prompts are remembered; older ones are forgotten, so that a server does not grow.
    """

    def __init__(self, enabled: bool = True, history: int = 16) -> None:
        self.enabled = enabled
        self.prompts: deque[Prompt] = deque(maxlen=history)

    def __len__(self) -> int:
        return len(self.prompts)

    def __iter__(self) -> Iterator[Prompt]:
        return iter(self.prompts)

    def __getitem__(self, i: int) -> Prompt:
        return self.prompts[i]

    @property
    def last(self) -> Prompt | None:
        """The newest prompt, or None if none with a video was seen."""
        return self.prompts[-1] if self.prompts else None

    def clear(self) -> None:
        """Forgets all prompts."""
        self.prompts.clear()

    def to_dict(self) -> dict[str, Any]:
        """JSON-serialisable: {"prompts": [...]}, oldest first."""
        return {"prompts": [p.to_dict() for p in self.prompts]}

    def save(self, path: str | os.PathLike) -> None:
        """Writes `to_dict()` as JSON."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=1), encoding="utf-8")

    def __repr__(self) -> str:
        if not self.enabled:
            return "Trace(off)"
        kept = ", ".join(f"{p.before} -> {p.after}" for p in self.prompts)
        noun = "prompt" if len(self.prompts) == 1 else "prompts"
        return f"Trace({len(self.prompts)} {noun}: {kept})" if kept else "Trace(no video seen yet)"
