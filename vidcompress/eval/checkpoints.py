"""The tiny trained video-LLMs that ship with the library; scripts/train_tiny.py makes them."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

NAMES = {"llava_onevision": "tiny-llava-onevision", "qwen2_vl": "tiny-qwen2-vl"}
"""By `model_type`."""


def path(model_type: str = "llava_onevision") -> Path:
    """The folder of a checkpoint, to be handed to `from_pretrained`.

    Raises ValueError for a backbone of which none ships.
    """
    if model_type not in NAMES:
        raise ValueError(f"no tiny {model_type!r} ships; there are: {', '.join(NAMES)}")
    return Path(str(files("vidcompress.eval") / "models" / NAMES[model_type]))


def located(name: str) -> str:
    """What `from_pretrained` takes for a name: the folder of a tiny model that ships, or the name itself."""
    shipped = {tiny: model_type for model_type, tiny in NAMES.items()}
    return str(path(shipped[name])) if name in shipped and not Path(name).exists() else name
