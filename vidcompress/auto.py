"""transformers' Auto class, with the word `compression`: change one import."""

from __future__ import annotations

from typing import Any

import transformers

from vidcompress import patches
from vidcompress.config import Compression, load
from vidcompress.engine.handle import Handle

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
    """Drop-in for `transformers.AutoModelForImageTextToText`."""

    @classmethod
    def from_pretrained(
        cls, name_or_path: Any, *args: Any, compression: Compression | None = None, **kwargs: Any
    ) -> Any:
        """As in transformers; `compression` is what `vidcompress.apply` takes. None loads the plain model.

        Raises ValueError for bad settings or a backbone without a patch before any weight is read.
        """
        if compression is None:
            return super().from_pretrained(name_or_path, *args, **kwargs)
        method = load(compression)
        config = kwargs.get("config")
        if config is None:
            hub = {k: kwargs[k] for k in HUB_ARGUMENTS if k in kwargs}
            config = transformers.AutoConfig.from_pretrained(name_or_path, **hub)
        patches.find(config)
        loaded = super().from_pretrained(name_or_path, *args, **kwargs)
        Handle(loaded[0] if isinstance(loaded, tuple) else loaded, method)
        return loaded
