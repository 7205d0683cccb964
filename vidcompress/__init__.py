"""Training-free compression of video tokens in Hugging Face video-LLMs.

Importing this package imports neither torch nor transformers and changes nothing anywhere: the public names below are
looked up on first use.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

# In a checkout patches/ and configs/ lie beside this folder; installed, they lie inside it.
if not (Path(__file__).parent / "patches").is_dir():
    __path__.append(str(Path(__file__).parent.parent))

__version__ = "0.1.0"

if TYPE_CHECKING:
    from vidcompress.api import apply, disable, enable, from_pretrained, handle_of, list_backbones
    from vidcompress.auto import AutoModelForImageTextToText, AutoProcessor
    from vidcompress.config import load
    from vidcompress.engine.handle import Handle
    from vidcompress.method import Method, list_methods
    from vidcompress.tokens import Reduction, Site, VideoTokens
    from vidcompress.video import Video, load_video, prepare_inputs

_HOME = {
    "apply": "api",
    "disable": "api",
    "enable": "api",
    "from_pretrained": "api",
    "handle_of": "api",
    "list_backbones": "api",
    "AutoModelForImageTextToText": "auto",
    "AutoProcessor": "auto",
    "load": "config",
    "Handle": "engine.handle",
    "Method": "method",
    "list_methods": "method",
    "Reduction": "tokens",
    "Site": "tokens",
    "VideoTokens": "tokens",
    "Video": "video",
    "load_video": "video",
    "prepare_inputs": "video",
}

__all__ = [*_HOME, "__version__"]


def __getattr__(name: str) -> object:
    if name in _HOME:
        from importlib import import_module

        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
