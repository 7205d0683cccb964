"""One file per backbone. `find(model)` picks the patch by the model's `config.model_type`; the folder is the list."""

from __future__ import annotations

import importlib
import pkgutil
from typing import TYPE_CHECKING, Any

from vidcompress.method import did_you_mean

if TYPE_CHECKING:
    from vidcompress.patches.base import Patch


def backbones() -> dict[str, type[Patch]]:
    """Every patch, by the `model_type` it serves."""
    from vidcompress.patches.base import Patch

    found: dict[str, type[Patch]] = {}
    for info in pkgutil.iter_modules(__path__, __name__ + "."):
        module = importlib.import_module(info.name)
        for cls in vars(module).values():
            if isinstance(cls, type) and issubclass(cls, Patch) and cls.__module__ == info.name:
                found |= dict.fromkeys(cls.model_types, cls)
    return dict(sorted(found.items()))


REFUSED = {
    "video_llama_3": "its processor drops video tokens of its own choice after they are encoded, so that features and "
    "placeholders do not match",
    "internvl": "its processor hands over frames as images, and the model cannot tell them from images",
    "video_llava": "its videos have a class token in every frame, and no grid",
}
"""Video models of transformers that the engine cannot serve honestly, and why."""


def find(config: Any) -> Patch:
    """The patch for a model's config; ValueError that lists the backbones there are."""
    kind, known = getattr(config, "model_type", None), backbones()
    if kind not in known:
        if kind in REFUSED:
            raise ValueError(f"{kind} cannot be compressed: {REFUSED[kind]}; vidcompress knows: {', '.join(known)}")
        raise ValueError(
            f"no patch for model_type {kind!r}{did_you_mean(str(kind), known)}; vidcompress knows: {', '.join(known)}"
        )
    return known[kind]()
