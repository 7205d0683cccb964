"""LLaVA-OneVision (transformers): projected SigLIP patches, pooled bilinearly to half the side; one newline a video."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from vidcompress.patches.base import EncodedVideo, Patch

from vidcompress.engine.saliency import SiglipSignals, TowerSignals


class LlavaOnevisionPatch(Patch):
    model_types = ("llava_onevision",)
    provides = frozenset({"frame_features", "saliency.head", "saliency.received", "tower_keys"})
    anchors = (*Patch.anchors, "vision_tower.encoder.layers", "apply_pooling")

    def frame_grid(self, config: Any) -> tuple[int, int] | None:
        vision = config.vision_config
        side = math.ceil((vision.image_size // vision.patch_size) / 2)  # 27 -> 14 for the real models
        return side, side

    def newline_line(self, model: nn.Module, tokens: int) -> int:
        """How many tokens of a video with so many a newline follows; 0 if none does."""
        return tokens

    def encoded(
        self, model: nn.Module, arguments: Mapping[str, Any], signals: Mapping[str, Tensor]
    ) -> list[EncodedVideo]:
        # [videos, frames, channels, height, width]; the argument was renamed within 5.x
        pixels = next(arguments[k] for k in ("pixel_values_videos", "pixel_values") if k in arguments)
        videos, frames = pixels.shape[:2]
        frame = self.frame_grid(self.base(model).config)
        assert frame is not None
        return [
            EncodedVideo(
                grid=(frames, *frame),
                line=self.newline_line(model, frames * math.prod(frame)),
                signals={name: s.unflatten(0, (videos, frames))[v] for name, s in signals.items()},
            )
            for v in range(videos)
        ]

    def tower_signals(self, model: nn.Module) -> TowerSignals:
        layers = self.base(model).vision_tower.encoder.layers
        return SiglipSignals(layers, functools.partial(self.pool_saliency, model))

    def signal_layer(self, model: nn.Module, arguments: Mapping[str, Any]) -> int:
        selected = arguments.get("vision_feature_layer")
        selected = self.base(model).config.vision_feature_layer if selected is None else selected
        depth = len(self.base(model).vision_tower.encoder.layers)
        # hidden_states[0] is what enters the first layer, so that hidden_states[i] leaves layer i - 1
        last = max(i % (depth + 1) for i in ([selected] if isinstance(selected, int) else selected)) - 1
        if last < 0:
            raise ValueError(f"vision_feature_layer {selected} uses no layer of the vision tower; saliency needs one")
        return last

    def pool_saliency(self, model: nn.Module, scores: Tensor) -> Tensor:
        """[F, patches] -> [F, P], exactly as the features are pooled."""
        base = self.base(model)
        if base.config.vision_feature_select_strategy == "default":
            scores = scores[:, 1:]
        return base.apply_pooling(scores[..., None])[..., 0]

    def default_head(self, model: nn.Module) -> str | None:
        beside = Path(getattr(model.config, "_name_or_path", "")) / "siglip"
        if (beside / "model.safetensors").is_file():
            return str(beside)
        config = self.vision_config(model)
        so400m = (config.hidden_size, config.patch_size, config.image_size) == (1152, 14, 384)
        return "google/siglip-so400m-patch14-384" if so400m else None
