"""The public verbs: load a compressed model, compress a loaded one, teach transformers the word `compression`."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from vidcompress import patches
from vidcompress.auto import AutoModelForImageTextToText, chosen
from vidcompress.config import Compression, load
from vidcompress.engine.handle import Handle, handle_of
from vidcompress.models import register

if TYPE_CHECKING:
    from torch import nn

__all__ = ["apply", "disable", "enable", "from_pretrained", "handle_of", "list_backbones"]


def apply(model: nn.Module, compression: Compression, *, trace: bool = True, **settings: Any) -> Handle:
    """Compresses the video tokens of a loaded model, in place.

    Args:
        model: a transformers video-LLM that has a patch (`list_backbones()`).
        compression: a method's name, a YAML path, a mapping, a `Method`, or a list of these.
        trace: record what is kept (`handle.trace`); off costs nothing.
        settings: override fields of the method, e.g. `retention_ratio=0.1`.

    Returns:
        A `Handle`; `handle.remove()`, or leaving its `with` block, undoes everything bit-exactly.

    Raises:
        ValueError, TypeError: bad settings, an unsupported model, or a model that is already compressed; the model is
            untouched then.
    """
    return Handle(model, load(compression, **settings), trace)


def from_pretrained(
    pretrained_model_name_or_path: Any,
    *args: Any,
    compression: Compression | None = None,
    retention_ratio: float | None = None,
    **kwargs: Any,
) -> Any:
    """`AutoModelForImageTextToText.from_pretrained` of transformers, with the word `compression`.

    Args:
        compression: what `apply` takes; None loads the plain model.
        retention_ratio: fraction of the video tokens kept; overrides the method's. Other settings go into
            `compression`, as a mapping or a YAML path.
        kwargs: for transformers.

    Returns the model, or (model, loading info) with `output_loading_info=True`. `handle_of(model)` is its handle.
    Bad settings and unsupported backbones are refused before any weight is read.
    """
    return AutoModelForImageTextToText.from_pretrained(
        pretrained_model_name_or_path, *args, compression=compression, retention_ratio=retention_ratio, **kwargs
    )


def enable() -> None:
    """From now on every transformers class, Auto class and `pipeline(model_kwargs=...)` accepts `compression=...`.

    `retention_ratio=...` beside it, too. Patches `PreTrainedModel.from_pretrained` once; `disable()` takes it back. The
    Auto classes also learn to load LLaVA-Video (`vidcompress.models`), which they do not forget.
    """
    from transformers import PreTrainedModel

    register()
    original = PreTrainedModel.__dict__["from_pretrained"]
    if hasattr(original.__func__, "_vidcompress_original"):
        return

    @functools.wraps(original.__func__)
    def from_pretrained(
        cls: Any,
        *args: Any,
        compression: Compression | None = None,
        retention_ratio: float | None = None,
        **kwargs: Any,
    ) -> Any:
        method = chosen(compression, retention_ratio)
        if method is not None:
            patches.find(cls.config_class)
        loaded = original.__func__(cls, *args, **kwargs)
        if method is not None:
            Handle(loaded[0] if isinstance(loaded, tuple) else loaded, method)
        return loaded

    from_pretrained._vidcompress_original = original  # type: ignore[attr-defined]
    PreTrainedModel.from_pretrained = classmethod(from_pretrained)  # type: ignore[method-assign,assignment]


def disable() -> None:
    """Undoes `enable()`; models that are compressed stay so. Does nothing if it is not in force."""
    from transformers import PreTrainedModel

    current = PreTrainedModel.__dict__["from_pretrained"]
    original = getattr(current.__func__, "_vidcompress_original", None)
    if original is not None:
        PreTrainedModel.from_pretrained = original  # type: ignore[method-assign]


def list_backbones() -> list[str]:
    """The `model_type`s that can be compressed."""
    return list(patches.backbones())
