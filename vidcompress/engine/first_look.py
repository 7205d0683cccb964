"""A first look: the decoder runs over the whole prompt, up to the last layer that a method wants to look at.

Nothing is reduced and nothing stored in that run. In every layer that is looked at, what the prompt's last token pays
to the tokens of each video is noted; before the last of them runs, the run is broken off.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from vidcompress.engine.decoder_signals import LayerView
from vidcompress.engine.plan import Plan
from vidcompress.engine.saliency import synchronise


class SeenEnough(Exception):
    """Breaks a first look off; never leaves the engine."""


@dataclass
class FirstLook:
    """One first look at a prompt.

    Attributes:
        plan: its videos.
        layers: ascending decoder layers that are looked at, at least one.
        paid: by the video's number, the sum [M] over the layers so far.
    """

    plan: Plan
    layers: tuple[int, ...]
    paid: dict[int, Tensor] = field(default_factory=dict)

    def at(self, view: LayerView) -> None:
        """Looks at one layer, if it is one of those; `SeenEnough` if it is the last."""
        if view.number not in self.layers:
            return
        seen = set()
        for video in self.plan.followed:  # beams of a sample are the same
            if video.number not in seen:
                seen.add(video.number)
                paid = view.look(video.row, video.places, self.plan.last[video.row]).to(video.places.device)
                self.paid[video.number] = paid + self.paid.get(video.number, 0)
        if view.number == self.layers[-1]:
            raise SeenEnough

    @torch.no_grad()
    def take(self, run: Callable[[], Any]) -> None:
        """Lets `run` run the decoder, and adds the signal `first_look` [t, P], a mean over layers, to every video.

        Raises RuntimeError if the layers were not called through their hooks.
        """
        started = time.perf_counter()
        try:
            run()
        except SeenEnough:
            pass
        else:
            raise RuntimeError(
                f"decoder layer {self.layers[-1]} was not called through its hooks in the first look (were layers "
                "replaced after compression was applied?); remove the compression and apply it again"
            )
        grids = {video.number: video.video.grid for video in self.plan.followed}
        looks = {number: (paid / len(self.layers)).view(grids[number][0], -1) for number, paid in self.paid.items()}
        note(self.plan, looks, self.layers, started)


def note(plan: Plan, looks: Mapping[int, Tensor], layers: Sequence[int], started: float) -> None:
    """Adds the signal `first_look` [t, P] to every video of a plan, and what it took to the record of the prompt.

    Args:
        looks: by the video's number. Of tokens that another model has cut the frames into, their mean is given to all.
        layers: that were looked at.
        started: when, by `time.perf_counter`.
    """
    for video in plan.followed:
        look, (t, h, w) = looks[video.number], video.video.grid
        if look.shape[1] != h * w:
            look = look.mean(1, keepdim=True).expand(t, h * w)
        video.video = replace(video.video, signals={**video.video.signals, "first_look": look})
    if plan.prompt is not None:
        synchronise(plan.followed[0].places.device)
        plan.prompt.looked_at, plan.prompt.look_seconds = [*layers], time.perf_counter() - started
        plan.prompt.seconds += plan.prompt.look_seconds


def lent(cache: Any) -> Any:
    """A cache that holds what `cache` does and to which a forward can add without `cache` noticing.

    Raises ValueError for one that is written in place or kept elsewhere (static, quantised, offloaded).
    """
    from transformers.cache_utils import DynamicCache

    layers = getattr(cache, "layers", [])
    plain = all(type(layer).__name__ == "DynamicLayer" for layer in layers) and not getattr(cache, "offloading", False)
    if not isinstance(cache, DynamicCache) or not plain:
        raise ValueError(
            f"a first look at a video behind earlier turns must not write into their {type(cache).__name__}, which is "
            "changed in place or kept elsewhere; use a DynamicCache"
        )
    twin = copy.copy(cache)
    for name, value in vars(cache).items():
        if isinstance(value, list):
            setattr(twin, name, [part if torch.is_tensor(part) else copy.copy(part) for part in value])
    return twin
