"""What the commands share: the application, its consoles, and reading what was typed."""

from __future__ import annotations

import time
from typing import Any

import typer
from rich.console import Console

from vidcompress.compat import ensure_torchvision

app = typer.Typer(
    help="Training-free compression of video tokens in Hugging Face video-LLMs.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
out, err = Console(), Console(stderr=True)


def load_compression(name: str, retention_ratio: float | None) -> Any:
    """The compression of that name, at that ratio if one was typed."""
    from vidcompress.config import load

    return load(name, **({} if retention_ratio is None else {"retention_ratio": retention_ratio}))


def sides_of(grid: str) -> tuple[int, int, int]:
    """(t, h, w) of "32x14x14"."""
    try:
        t, h, w = (int(side) for side in grid.split("x"))
    except ValueError:
        t = h = w = 0
    if min(t, h, w) < 1:
        raise ValueError(f"--grid must look like 32x14x14, all sides at least 1, got {grid!r}")
    return t, h, w


def decode(video: str, num_frames: int | None, fps: float | None) -> tuple[Any, float]:
    """The clip, and the seconds that reading it took."""
    from vidcompress.video import load_video

    start = time.perf_counter()
    with err.status("decoding the video"):
        clip = load_video(video, num_frames=num_frames, fps=fps)
    return clip, time.perf_counter() - start


def loading_options(device: str | None, dtype: str, attn: str | None) -> dict[str, Any]:
    """What is handed to `from_pretrained`; refused before anything is decoded or loaded."""
    import torch

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"--device {device}: this torch ({torch.__version__}) sees no GPU; use cpu")
    known = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16")}
    if dtype != "auto" and dtype not in known:
        raise ValueError(f"--dtype must be auto, {', '.join(known)}, got {dtype!r}")
    options = {"device_map": device, "dtype": known.get(dtype, dtype)}
    return options if attn is None else {**options, "attn_implementation": attn}


def load_model(name: str, options: dict[str, Any]) -> tuple[Any, Any]:
    """Model and processor; ValueError, before any weights are read, for a backbone that is not supported and for a
    checkpoint without a processor."""
    ensure_torchvision()
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

    from vidcompress import patches
    from vidcompress.models import register

    register()
    with err.status(f"loading {name}"):
        config = AutoConfig.from_pretrained(name)
        patches.find(config)  # an unsupported backbone is refused before its weights are read
        try:
            processor = AutoProcessor.from_pretrained(name)
        except (OSError, ValueError) as error:
            raise ValueError(f"{name} has no processor that can be loaded: {error}") from error
        return AutoModelForImageTextToText.from_pretrained(name, config=config, **options).eval(), processor
