"""What a report is about: one question to one model, answered without compression and with one or more."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

from vidcompress.config import list_presets, load
from vidcompress.method import Method, Pipeline
from vidcompress.report.frames import Field, field_of
from vidcompress.report.tokens import TokenMap
from vidcompress.trace import Prompt
from vidcompress.video import Video

MOST = 6
"""Compressions that one report can show."""


@dataclass(frozen=True)
class Choice:
    """A compression to be shown, and what it is called."""

    label: str
    compression: Method | Pipeline


@dataclass(frozen=True)
class Side:
    """One compression's answer.

    Attributes:
        letter: "A" for the first one.
        result: a `measure.Result`.
        record: the trace's record of the prompt.
        tokens: what became of every token.
    """

    letter: str
    label: str
    result: Any
    record: Prompt
    tokens: TokenMap

    @classmethod
    def of(cls, model: Any, result: Any, letter: str = "A", label: str = "") -> Side:
        """The last prompt of a compressed model, which held one video.

        Args:
            result: what `measure.ask` returned for it.

        Raises ValueError if the model is not compressed, records nothing, or saw no or several videos.
        """
        from vidcompress.engine.handle import handle_of

        handle = handle_of(model)
        if handle is None:
            raise ValueError(
                f"this {type(model).__name__} is not compressed, so there is nothing to draw; vidcompress.apply(model, "
                "...) first"
            )
        record = handle.trace.last
        if record is None:
            state = "it has seen no video yet" if handle.trace.enabled else "it is off (handle.trace.enabled = True)"
            raise ValueError(f"the trace of this {type(model).__name__} holds nothing to draw: {state}")
        tokens = TokenMap.of(record.steps)
        return cls(letter, label or handle.compression.name, result, record, tokens)


@dataclass(frozen=True)
class Report:
    """Everything a page shows.

    Attributes:
        model: what the model is called.
        note: a caution to be read before everything else; empty for none.
        plain: the `measure.Result` without compression.
        field: which part of a frame its tokens cover.
    """

    video: Video
    prompt: str
    model: str
    note: str
    plain: Any
    sides: list[Side]
    field: Field


def choose(text: str, retention_ratio: float | None = None, siglip_head: str | None = None) -> list[Choice]:
    """The compressions of "infomerge@0.1,infomerge@0.02,two.yaml": names, presets and YAML files, by comma.

    Args:
        retention_ratio: for methods without an `@ratio`; presets and files bring their own.
        siglip_head: for all methods that take one and name none.

    Raises ValueError for an unknown method, a ratio that is none, or more than six of them.
    """
    words = [word.strip() for word in text.split(",") if word.strip()]
    if not 1 <= len(words) <= MOST:
        raise ValueError(
            f"--compression {text!r} names {len(words)} compressions; accepted: 1 to {MOST}, by comma, such as "
            "infomerge@0.1,infomerge@0.02"
        )
    return [_choice(word, retention_ratio, siglip_head) for word in words]


def _choice(word: str, retention_ratio: float | None, siglip_head: str | None) -> Choice:
    name, at, ratio = word.partition("@")
    if name == "none":
        raise ValueError("'none' is no compression; the answer without any is always shown beside the others")
    fixed = word.endswith((".yaml", ".yml")) or word in list_presets()
    if fixed:
        method = load(word)
    elif at:
        try:
            value = float(ratio)
        except ValueError:
            raise ValueError(f"{word!r}: behind the @ comes a retention ratio in (0, 1], got {ratio!r}") from None
        method = load(name, retention_ratio=value)
    else:
        method = load(name, **({} if retention_ratio is None else {"retention_ratio": retention_ratio}))
    if siglip_head is not None:
        parts = [_with_head(m, siglip_head) for m in Pipeline.of(method)]
        method = load(parts[0] if isinstance(method, Method) else parts)
    if fixed:
        return Choice(Path(word).stem, method)
    assert isinstance(method, Method)
    return Choice(f"{method.name} @ {method.retention_ratio:g}", method)


def _with_head(method: Method, source: str) -> Any:
    """The method with that SigLIP head, where it takes one and was left at "auto"."""
    if "siglip_head" in {f.name for f in fields(method)} and getattr(method, "siglip_head", None) == "auto":
        return load(method, siglip_head=source)
    return method


def collect(
    model: Any,
    processor: Any,
    video: Video,
    prompt: str,
    choices: Sequence[Choice],
    *,
    max_new_tokens: int = 64,
    decode_seconds: float = 0.0,
    name: str = "",
    note: str = "",
    status: Callable[[str], AbstractContextManager[Any]] = lambda message: nullcontext(),
) -> Report:
    """Asks `prompt` about `video` without compression and with each of `choices`, every one warmed up before.

    Args:
        model: a loaded video-LLM that is not compressed; it is left as it was.
        name: what to call it; its class if empty.
        status: shows what is being done.

    Raises ValueError for what `measure.ask` and `vidcompress.apply` refuse.
    """
    from vidcompress.api import apply
    from vidcompress.engine.handle import handle_of
    from vidcompress.measure import ask

    if handle_of(model) is not None:
        raise ValueError(
            "this model is compressed already; a report compares with the plain one: handle.remove() first"
        )
    question = partial(ask, model, processor, video, prompt, decode_seconds=decode_seconds)
    sides: list[Side] = []
    with status("answering without compression"):
        question(max_new_tokens=1)
        plain = question(max_new_tokens=max_new_tokens)
    for i, choice in enumerate(choices):
        with status(f"answering with {choice.label}"), apply(model, choice.compression):
            question(max_new_tokens=1)
            result = question(max_new_tokens=max_new_tokens)
            sides.append(Side.of(model, result, "ABCDEF"[i], choice.label))
    field = field_of(processor, model.config, sides[0].tokens.grid, *video.frames.shape[1:3])
    return Report(video, prompt, name or type(model).__name__, note, plain, sides, field)
