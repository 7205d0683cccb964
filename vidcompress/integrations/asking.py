"""From what a benchmark asks to what a model is given: conversations, generation settings, answers cut where told."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vidcompress.answering import Question
from vidcompress.video import Video, load_video

IGNORED = frozenset({"image_aspect_ratio"})
"""Generation settings of tasks that speak to other models' image processing."""


def generation_of(asked: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """A task's `generation_kwargs` as arguments for `generate`, and the strings at which an answer ends.

    A temperature of 0 means greedy decoding. Settings that are not known are handed on, for transformers to refuse.
    """
    options = {name: value for name, value in asked.items() if name not in IGNORED}
    until = options.pop("until", None) or []
    options["max_new_tokens"] = options.pop("max_gen_toks", None) or options.get("max_new_tokens") or 64
    temperature = options.get("temperature")
    sampled = options.setdefault("do_sample", bool(temperature))
    if not sampled or not temperature:
        options["do_sample"] = False
        for name in ("temperature", "top_p", "top_k"):
            options.pop(name, None)
    return {name: value for name, value in options.items() if value is not None}, _listed(until)


def _listed(until: str | Sequence[str]) -> list[str]:
    return [until] if isinstance(until, str) else list(until)


def cut(text: str, until: Sequence[str]) -> str:
    """The text before the first of some strings."""
    ends = [text.index(end) for end in until if end and end in text]
    return text[: min(ends)] if ends else text


@dataclass(frozen=True)
class Draft:
    """A question whose videos are not decoded yet.

    Attributes:
        conversation: as in `Question`.
        films: what each video is: a path, or a list of frames.
        pictures: the images.
    """

    conversation: list[dict[str, Any]]
    films: list[Any]
    pictures: list[Any]

    def question(self, load: Callable[[Any], Video] = load_video) -> Question:
        """With its videos; raises what `load` raises."""
        return Question(self.conversation, [load(film) for film in self.films], self.pictures)


def draft_of(messages: Sequence[Mapping[str, Any]], images_as_video: int) -> Draft:
    """lmms-eval's messages, with what they show beside them, in their order.

    Args:
        messages: `content` a string, or parts of the types text, image and video, whose `url` is what is shown.
        images_as_video: so many images or more, without any video, become the frames of one.

    Raises ValueError for audio, and for a part of a video (`start_time`, `end_time`).
    """
    parts = [part for message in messages for part in _parts(message)]
    pictures = [part["url"] for part in parts if part["type"] == "image"]
    films = [part["url"] for part in parts if part["type"] == "video"]
    as_video = not films and len(pictures) >= images_as_video
    conversation, shown = [], False
    for message in messages:
        content: list[dict[str, Any]] = []
        for part in _parts(message):
            if part["type"] == "text":
                content.append({"type": "text", "text": part["text"]})
            elif part["type"] == "image" and as_video:
                content += [] if shown else [{"type": "video"}]
                shown = True
            else:
                content.append({"type": part["type"]})
        conversation.append({"role": message["role"], "content": content})
    return Draft(conversation, [pictures] if as_video else films, [] if as_video else pictures)


def _parts(message: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    content = message["content"]
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else list(content)
    for part in parts:
        if part["type"] not in ("text", "image", "video"):
            raise ValueError(f"a message shows {part['type']}; vidcompress answers about text, images and videos")
        if part.get("start_time") is not None or part.get("end_time") is not None:
            raise ValueError("a message shows a part of a video (start_time, end_time), which is not supported")
    return parts
