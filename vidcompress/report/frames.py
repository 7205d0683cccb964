"""The frames of a report: small pictures of them, and which part of them the tokens cover."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from typing import Any

from vidcompress.tokens import Grid
from vidcompress.video import Video

PICTURE_BYTES = 1_400_000
"""Most that all pictures of a page take together, before base64."""

SIDES = (360, 288, 224, 176, 136, 104)
"""Longest sides that are tried until they fit."""


@dataclass(frozen=True)
class Field:
    """The rectangle of a frame that its tokens cover, in fractions of the frame's width and height."""

    left: float = 0.0
    top: float = 0.0
    width: float = 1.0
    height: float = 1.0

    @property
    def whole(self) -> bool:
        """Whether it is all of the frame."""
        return (self.width, self.height) == (1.0, 1.0)


@dataclass(frozen=True)
class Thumbnails:
    """Small pictures of all frames.

    Attributes:
        uris: one data URI a frame.
        width, height: of each, in pixels.
        bytes: of all together, before base64.
    """

    uris: list[str]
    width: int
    height: int
    bytes: int


def field_of(processor: Any, config: Any, grid: Grid, height: int, width: int) -> Field:
    """What of a frame [height, width] the tokens of `grid` see.

    A processor may cut out the centre (LLaVA-NeXT-Video); patches and pooling leave out what is no whole step on the
    right and at the bottom (SigLIP: 378 of 384 pixels).
    """
    across, down = _crop(getattr(processor, "video_processor", None), height, width)
    vision = getattr(config, "vision_config", None)
    image, patch = getattr(vision, "image_size", None), getattr(vision, "patch_size", None)
    shares = [1.0, 1.0]
    if isinstance(image, int) and isinstance(patch, int):
        side = image // patch
        steps = [n * max(1, round(side / n)) for n in grid[1:]]
        shares = [min(side, n) * patch / image for n in steps]
    return Field((1 - across) / 2, (1 - down) / 2, across * shares[1], down * shares[0])


def _crop(processor: Any, height: float, width: float) -> tuple[float, float]:
    """The fractions of width and height that the processor's centre crop leaves."""
    crop = getattr(processor, "crop_size", None)
    if not getattr(processor, "do_center_crop", False) or not crop:
        return 1.0, 1.0
    size = processor.size
    if size.get("shortest_edge"):
        scale = size["shortest_edge"] / min(height, width)
        height, width = height * scale, width * scale
    else:
        height, width = size["height"], size["width"]
    return min(1.0, crop["width"] / width), min(1.0, crop["height"] / height)


def frames_of(row: int, grid: Grid, frames: int) -> range:
    """The frames that row `row` of the grid was made of: one, or two (Qwen2-VL), of which the last may be missing."""
    each = -(-frames // grid[0])
    return range(row * each, min((row + 1) * each, frames))


def thumbnails(video: Video, most: int = PICTURE_BYTES) -> Thumbnails:
    """WebP pictures of all frames, as large as fits into `most` bytes; the smallest size where none does."""
    from PIL import Image

    pictures = [Image.fromarray(frame) for frame in video.frames]
    for side in SIDES:
        width, height = _fitting(pictures[0].size, side)
        encoded = []
        for picture in pictures:
            buffer = io.BytesIO()
            picture.resize((width, height), Image.Resampling.LANCZOS, reducing_gap=3).save(buffer, "WEBP", quality=72)
            encoded.append(buffer.getvalue())
        total = sum(map(len, encoded))
        if total <= most:
            break
    uris = [f"data:image/webp;base64,{base64.b64encode(data).decode()}" for data in encoded]
    return Thumbnails(uris, width, height, total)


def _fitting(size: tuple[int, int], side: int) -> tuple[int, int]:
    """(width, height) with the longer one at most `side`, never larger than it was."""
    scale = min(1.0, side / max(size))
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))
