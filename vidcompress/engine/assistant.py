"""A smaller model that takes the first look at a prompt in the place of the model that answers (DyToK's assistant)."""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from vidcompress import patches
from vidcompress.engine.first_look import note
from vidcompress.engine.hooks import Engine
from vidcompress.engine.plan import Pending, Plan
from vidcompress.first_look import FirstLook
from vidcompress.method import Method, Pipeline
from vidcompress.trace import Trace

OWN = ("self", "inputs_embeds", "past_key_values", "position_ids", "mm_encoder_outputs", "use_cache", "cache_position")
"""Arguments of a forward that are the model's own, and no part of the prompt."""

OUTPUTS = ("output_", "return_")
"""So are all that begin with these."""


@dataclass(kw_only=True)
class Look(FirstLook, Method):
    """Asks for a first look at every prompt."""

    needs = frozenset({"first_look"})
    loose = True


class Seen(Exception):
    """Ends a run of the assistant, with what it saw; never leaves this module."""

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self.plan = plan


class Looking(Engine):
    """An engine whose prompts end with the first look at them."""

    def look(self, running: Any, *args: Any) -> None:
        super().look(running, *args)
        raise Seen(running.look.plan)


class Assistant:
    """One loaded assistant.

    Args:
        name: folder or hub id of a checkpoint that reads the prompts of `model` as they are.
        model: the model that answers.

    Raises:
        ValueError: the assistant is of another type than the model, or writes videos in another way.
        OSError: the checkpoint cannot be read.
    """

    def __init__(self, name: str, model: Any) -> None:
        from transformers import AutoConfig

        found, own = AutoConfig.from_pretrained(name).model_type, model.config.model_type
        if found != own:
            raise ValueError(f"assistant {name!r} is a {found}, the model a {own}; both have to read the same prompt")
        loaded = type(model).from_pretrained(name, dtype=model.dtype)
        patch = patches.find(loaded.config)
        theirs, ours = patch.video_token(loaded), patch.video_token(model)
        if theirs != ours:
            raise ValueError(
                f"assistant {name!r} writes videos as token {theirs}, the model as {ours}; both have to read the same "
                "prompt, so their processors must be the same"
            )
        self.name, self.model = name, loaded.to(model.device).eval()
        self.decoder: Any = patch.decoder(loaded)
        self._engine = Looking(loaded, patch, Trace(False))
        self._pipeline: Pipeline

    def looking_at(self, layers: tuple[int, ...] | None) -> Assistant:
        """The same, which looks at these layers; None: the last third of its own.

        Raises ValueError for layers that it does not have.
        """
        other = copy.copy(self)
        other._pipeline = Pipeline([Look(layers=layers, retention_ratio=1.0)])
        other._layers()
        return other

    def _layers(self) -> tuple[int, ...]:
        return self._pipeline.looks(len(self.decoder.layers))

    @torch.no_grad()
    def look(self, plan: Plan, pending: Pending, past: int) -> None:
        """Adds the signal `first_look` to every video of a plan.

        Args:
            pending: the forward that holds them, as the model that answers was called.
            past: tokens that its cache holds.

        Raises ValueError if the prompt does not come whole: as ids, with the pixels of its videos and images. (Where
        generate() has images encoded beforehand, their pixels are gone by now.)
        """
        assert pending.encoding is not None
        started = time.perf_counter()
        given = dict(pending.given)
        if given.get("pixel_values_videos") is None:  # generate() has had them encoded before
            pixels = {"pixel_values": "pixel_values_videos"}  # as older transformers call them there
            given |= {pixels.get(name, name): value for name, value in pending.encoding.given.items()}
        given = {k: v for k, v in given.items() if v is not None and k not in OWN and not k.startswith(OUTPUTS)}
        images = pending.images is not None and bool(pending.images.any())
        needed = ("input_ids", "pixel_values_videos", *(("pixel_values",) if images else ()))
        missing = [name for name in needed if name not in given]
        if missing or past:
            raise ValueError(
                f"assistant {self.name!r} reads the prompt from its first token on and with its own eyes: "
                + (f"it needs {' and '.join(missing)}" if missing else f"a cache of {past} tokens is the model's own")
                + "; give a whole prompt, or let the model look itself (assistant=None)"
            )
        copies = sum(video.number == plan.followed[0].number for video in plan.followed)  # beams; rows of one sample
        each = max(1, copies * len(given["input_ids"]) // len(plan.text))
        self._engine.configure(self._pipeline, None, None)
        try:
            self._engine.base(**self._moved(given, each, pending.limit), use_cache=False)
        except Seen as seen:
            looks = {v.number: v.video.signals["first_look"] for v in seen.plan.followed}
            device = plan.followed[0].places.device
            note(plan, {number: look.to(device) for number, look in looks.items()}, self._layers(), started)
            return
        raise RuntimeError(f"assistant {self.name!r} went through a prompt without looking at it")

    def _moved(self, given: Mapping[str, Any], each: int, limit: int) -> dict[str, Any]:
        """The arguments on its own device: of a sample's rows (beams) the first, of columns those of the prompt."""
        shape, moved = given["input_ids"].shape, dict(given)
        for name, value in given.items():
            if torch.is_tensor(value):
                moved[name] = (value[::each, :limit] if value.shape == shape else value).to(self.model.device)
        return moved
