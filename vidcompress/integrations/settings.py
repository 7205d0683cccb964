"""The `--model_args` of an evaluation: checked before anything is loaded, and written down beside every answer."""

from __future__ import annotations

import numbers
from collections.abc import Mapping
from dataclasses import dataclass, fields
from importlib import metadata
from typing import Any

from vidcompress.config import load
from vidcompress.method import Method, Pipeline

SCHEMA = 1
"""Of what is written beside an answer. `vidcompress table` reads this one and refuses others."""

DTYPES = ("auto", "bfloat16", "float16", "float32")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a model is loaded and how videos are shown to it.

    Attributes:
        pretrained: folder or hub id of the checkpoint.
        compression: None runs the plain model.
        max_num_frames: frames of a video, evenly spaced; all frames of a shorter one. None with `fps`.
        fps: frames a second instead.
        images_as_video: a prompt without video, with this many images or more, shows them as frames of one (MVBench
            hands the frames of a task over as images).
        batch_size: prompts answered together, where their videos have equally many frames.
        device, device_map: where the model goes; a process of several takes the GPU of its local rank.
        record: folder in which every answer is written down at once, and from which a repeated run takes those that
            are there; None keeps no record, and what was interrupted starts anew.
    """

    pretrained: str
    compression: Method | Pipeline | None = None
    max_num_frames: int | None = 32
    fps: float | None = None
    images_as_video: int = 16
    batch_size: int = 1
    dtype: str = "auto"
    attn_implementation: str | None = None
    device: str | None = None
    device_map: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False
    record: str | None = None

    def __post_init__(self) -> None:
        for name in ("max_num_frames", "images_as_video", "batch_size"):
            value = getattr(self, name)
            if value is None and name == "max_num_frames":
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value!r}: a whole number of at least 1 is needed")
        if (self.fps is None) == (self.max_num_frames is None):
            raise ValueError(f"fps={self.fps} and max_num_frames={self.max_num_frames}: give one of the two")
        if self.fps is not None and not (isinstance(self.fps, numbers.Real) and self.fps > 0):
            raise ValueError(f"fps={self.fps!r} is no positive number of frames a second")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype={self.dtype!r} is unknown; one of: {', '.join(DTYPES)}")
        if self.device is not None and self.device_map is not None:
            raise ValueError(f"device={self.device!r} and device_map={self.device_map!r}: give one of the two")

    @classmethod
    def parse(cls, arguments: Mapping[str, Any]) -> Settings:
        """From `--model_args`, and what lmms-eval adds to them; what is not known here is a setting of the method.

        Raises:
            ValueError: nothing to load, a value that is not accepted, a setting without a method or unknown to it.
            FileNotFoundError: a YAML path that does not exist.
        """
        own = {f.name for f in fields(cls)}
        given = {name: value for name, value in arguments.items() if value is not None and name != "max_batch_size"}
        method = {name: given.pop(name) for name in list(given) if name not in own}
        if "pretrained" not in given:
            raise ValueError("pretrained=... is missing: a checkpoint's folder or hub id")
        size = str(given.get("batch_size", 1))
        if not size.isdecimal():
            raise ValueError(f"batch_size={size!r} is no whole number; batches are not sized automatically")
        given["batch_size"] = int(size)
        given["pretrained"] = str(given["pretrained"])
        if "fps" in given:
            given.setdefault("max_num_frames", None)
        given["compression"] = cls._method(given.get("compression"), method, own)
        return cls(**given)

    @staticmethod
    def _method(compression: Any, settings: dict[str, Any], own: set[str]) -> Method | Pipeline | None:
        if compression in (None, "none"):
            if settings:
                raise ValueError(
                    f"{', '.join(sorted(settings))}: unknown, and no setting of a method without compression=...; "
                    f"known: {', '.join(sorted(own))}"
                )
            return None
        try:
            return load(compression, **settings)
        except ValueError as error:
            raise ValueError(f"{error} (model_args of their own: {', '.join(sorted(own))})") from error

    def loading(self, device: str) -> dict[str, Any]:
        """For `from_pretrained`; `device` is that of this process."""
        options: dict[str, Any] = {
            "compression": self.compression,
            "dtype": self.dtype,
            "device_map": self.device_map or device,
        }
        if self.attn_implementation is not None:
            options["attn_implementation"] = self.attn_implementation
        return options | self.hub()

    def hub(self) -> dict[str, Any]:
        """What checkpoint and processor have in common."""
        options: dict[str, Any] = {"trust_remote_code": True} if self.trust_remote_code else {}
        return options if self.revision is None else options | {"revision": self.revision}

    def sampling(self) -> dict[str, Any]:
        """For `load_video`."""
        if self.fps is not None:
            return {"fps": self.fps}
        return {"max_frames": self.max_num_frames}

    def facts(self) -> dict[str, Any]:
        """What decides an answer, ready for JSON: the settings, every field of every method, and the versions."""
        return {
            "schema": SCHEMA,
            "pretrained": self.pretrained,
            "revision": self.revision,
            "compression": methods_of(self.compression),
            "max_num_frames": self.max_num_frames,
            "fps": self.fps,
            "images_as_video": self.images_as_video,
            "dtype": self.dtype,
            "attn_implementation": self.attn_implementation,
            "versions": {name: metadata.version(name) for name in ("torch", "transformers")} | {"vidcompress": _own()},
        }


def methods_of(compression: Method | Pipeline | None) -> list[dict[str, Any]]:
    """Name and every field of every method, in order; empty for the plain model."""
    if compression is None:
        return []
    return [{"method": method.name} | method.settings() for method in Pipeline.of(compression)]


def _own() -> str:
    from vidcompress import __version__

    return __version__
