"""LLaVA-Video (vidcompress.models): LLaVA-OneVision with other pooling, and newlines after rows, frames or none."""

from __future__ import annotations

from typing import Any

from torch import nn
from vidcompress.patches.llava_onevision import LlavaOnevisionPatch


class LlavaVideoPatch(LlavaOnevisionPatch):
    model_types = ("llava_video",)

    def frame_grid(self, config: Any) -> tuple[int, int] | None:
        side = config.frame_side()
        return side, side

    def newline_line(self, model: nn.Module, tokens: int) -> int:
        line = self.base(model).config.newline_line()
        return tokens if line is None else line
