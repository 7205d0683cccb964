"""LLaVA-NeXT-Video (transformers): CLIP patches pooled with stride 2 before the projector; no newline."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional
from vidcompress.patches.base import Patch
from vidcompress.patches.llava_onevision import LlavaOnevisionPatch


class LlavaNextVideoPatch(LlavaOnevisionPatch):
    model_types = ("llava_next_video",)
    anchors = (*Patch.anchors, "vision_tower.encoder.layers", "vision_resampler")
    has_siglip = False

    def frame_grid(self, config: Any) -> tuple[int, int] | None:
        side = config.vision_config.image_size // config.vision_config.patch_size // config.spatial_pool_stride
        return side, side

    def newline_line(self, model: nn.Module, tokens: int) -> int:
        return 0

    def pool_saliency(self, model: nn.Module, scores: Tensor) -> Tensor:
        config = self.base(model).config
        if config.vision_feature_select_strategy == "default":
            scores = scores[:, 1:]
        side = config.vision_config.image_size // config.vision_config.patch_size
        pool = functional.max_pool2d if config.spatial_pool_mode == "max" else functional.avg_pool2d
        return pool(scores.unflatten(1, (side, side))[:, None], config.spatial_pool_stride).flatten(1)

    def default_head(self, model: nn.Module) -> str | None:
        return None
