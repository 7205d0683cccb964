"""transformers' Auto classes, with the word `compression`: change one import."""

from __future__ import annotations

from typing import Any

import transformers

from vidcompress import patches
from vidcompress.compat import ensure_torchvision
from vidcompress.config import Compression, load
from vidcompress.engine.handle import Handle
from vidcompress.models import register

HUB_ARGUMENTS = (
    "cache_dir",
    "force_download",
    "local_files_only",
    "proxies",
    "revision",
    "subfolder",
    "token",
    "trust_remote_code",
)


class AutoModelForImageTextToText(transformers.AutoModelForImageTextToText):
    """Drop-in for `transformers.AutoModelForImageTextToText`, which also knows the models of `vidcompress.models`."""

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: Any,
        *args: Any,
        compression: Compression | None = None,
        retention_ratio: float | None = None,
        **kwargs: Any,
    ) -> Any:
        """As in transformers; `compression` is what `vidcompress.apply` takes. None loads the plain model.

        Raises ValueError for bad settings or a backbone without a patch before any weight is read, and for a
        SigLIP head that does not fit after that. On a CPU-only torch `compat.ensure_torchvision` is called first.
        """
        ensure_torchvision()
        register()
        method = chosen(compression, retention_ratio)
        if method is not None:
            config = kwargs.get("config")
            if config is None:
                hub = {k: kwargs[k] for k in HUB_ARGUMENTS if k in kwargs}
                config = transformers.AutoConfig.from_pretrained(pretrained_model_name_or_path, **hub)
            patches.find(config)
        loaded = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        if method is not None:
            Handle(loaded[0] if isinstance(loaded, tuple) else loaded, method)
        return loaded


class AutoProcessor:
    """`transformers.AutoProcessor`, which also knows the models of `vidcompress.models`.

    transformers' own gives a bare tokenizer for a checkpoint of LLaVA-Video, unless a model of this package was loaded
    or `vidcompress.enable()` called before.
    """

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        """As in transformers, on a CPU-only torch after `vidcompress.compat.ensure_torchvision`."""
        ensure_torchvision()
        register()
        return transformers.AutoProcessor.from_pretrained(pretrained_model_name_or_path, **kwargs)


def chosen(compression: Compression | None, retention_ratio: float | None) -> Any:
    """The method that the two arguments of `from_pretrained` name; None for the plain model.

    Raises ValueError for a ratio without a method.
    """
    if compression is not None:
        return load(compression, **({} if retention_ratio is None else {"retention_ratio": retention_ratio}))
    if retention_ratio is not None:
        raise ValueError(f"retention_ratio={retention_ratio} needs a method: give compression=..., too")
    return None
