"""Qwen2-VL, Qwen2.5-VL, Qwen3-VL: patches of any number merged 2 x 2 into a token, two frames into one; no newline.

Qwen2.5-VL's tower looks through windows in all but a few blocks, its tokens in window order meanwhile. Qwen3-VL
puts a timestamp before every frame and adds tower features to the video tokens at its first decoder layers (deepstack).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from vidcompress.patches.base import EncodedVideo, Patch

from vidcompress.engine.saliency import MergedPatchSignals, TowerSignals


class Qwen2VLPatch(Patch):
    model_types = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe")
    provides = frozenset({"frame_features", "saliency.head", "saliency.received", "tower_keys"})
    anchors = (*Patch.anchors, "visual.blocks")
    rotary_axes = 3
    has_siglip = False

    def check_call(self, model: nn.Module, arguments: Mapping[str, Any]) -> None:
        merge = self.vision_config(model).spatial_merge_size
        for t, h, w in arguments["video_grid_thw"].tolist():
            if min(t, h, w) < 1 or h % merge or w % merge:
                raise ValueError(
                    f"video_grid_thw holds {[t, h, w]} (frames, rows, columns of patches); {merge} x {merge} patches "
                    f"become a token, so rows and columns must be multiples of {merge}, and there must be a frame"
                )

    def encoded(
        self, model: nn.Module, arguments: Mapping[str, Any], signals: Mapping[str, Tensor]
    ) -> list[EncodedVideo]:
        grids = arguments["video_grid_thw"]  # [videos, 3]: frames, rows and columns of patches
        config = self.vision_config(model)
        merge = config.spatial_merge_size
        if signals and hasattr(config, "fullatt_block_indexes"):
            from transformers.vision_utils import get_vision_window_index

            order, _ = get_vision_window_index(grids, merge, config.window_size, config.patch_size)
            back = order.argsort()
            signals = {name: s[back.to(s.device)] for name, s in signals.items()}
        grid = [(t, h // merge, w // merge) for t, h, w in grids.tolist()]
        sizes = [t * h * w for t, h, w in grid]
        parts = {name: s.split(sizes) for name, s in signals.items()}
        return [
            EncodedVideo(g, signals={name: part[v].unflatten(0, (g[0], -1)) for name, part in parts.items()})
            for v, g in enumerate(grid)
        ]

    def tower_signals(self, model: nn.Module) -> TowerSignals:
        return MergedPatchSignals(self.base(model).visual.blocks, self.vision_config(model).spatial_merge_size ** 2)

    def signal_layer(self, model: nn.Module, arguments: Mapping[str, Any]) -> int:
        config = self.vision_config(model)
        return max(getattr(config, "fullatt_block_indexes", None) or [config.depth - 1])

    def deepstack_layers(self, model: nn.Module) -> int:
        return len(getattr(self.vision_config(model), "deepstack_visual_indexes", None) or ())
