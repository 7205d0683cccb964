"""LLaVA-Video and LLaVA-OneVision in their authors' own package (`llava` of LLaVA-NeXT), on transformers 4.48 or 4.49.

There the decoder is the base model, prompts reach it as embeddings that `prepare_inputs_labels_for_multimodal` built
from ids (-200 where an image or a video goes), and the tower is SigLIP without its last layer.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from vidcompress.patches.base import EncodedVideo, Patch

from vidcompress.engine.embedded_prompt import PLACEHOLDER, FreshGenerate, PreparePrompt, kinds
from vidcompress.engine.overrides import Override
from vidcompress.engine.saliency import SiglipSignals, TowerSignals

if TYPE_CHECKING:
    from vidcompress.engine.hooks import Engine

VERSIONS = ((4, 48), (4, 50))


class LlavaNativePatch(Patch):
    model_types = ("llava_qwen",)
    provides = frozenset({"frame_features", "saliency.head", "saliency.received", "tower_keys"})

    def check(self, model: nn.Module) -> None:
        """ValueError for a model or a transformers that this patch does not know."""
        import transformers

        version = tuple(int(part) for part in transformers.__version__.split(".")[:2])
        if not VERSIONS[0] <= version < VERSIONS[1]:
            raise ValueError(
                f"models of the llava package need transformers 4.48 or 4.49 here, this is {transformers.__version__} "
                "(before 4.48 decoder layers compute rotary tables themselves, from 4.50 on the package does not run)"
            )
        if not hasattr(model, "prepare_inputs_labels_for_multimodal"):
            raise ValueError(f"{type(model).__name__} is no model of the llava package")
        if not hasattr(self._tower(model), "vision_tower"):
            raise ValueError("the vision tower of this model is not loaded; use load_pretrained_model")
        if "siglip" not in type(self._tower(model)).__name__.lower():
            raise ValueError(f"the vision tower is a {type(self._tower(model)).__name__}; only SigLIP towers are known")
        if getattr(model.config, "use_sliding_window", False):
            raise ValueError(
                "use_sliding_window=True: a window counts stored tokens, and compression changes their number; only "
                "full attention is supported"
            )
        if getattr(model.config, "add_faster_video", False):
            raise ValueError("add_faster_video=True mixes tokens of two poolings; only False is known")

    def base(self, model: nn.Module) -> Any:
        return getattr(model, "model", model)

    def decoder(self, model: nn.Module) -> Any:
        return self.base(model)

    def video_token(self, model: nn.Module) -> int:
        return PLACEHOLDER

    def image_token(self, model: nn.Module) -> int | None:
        return PLACEHOLDER

    def overrides(self, model: nn.Module, engine: Engine) -> list[Override]:
        return [PreparePrompt(model, engine), FreshGenerate(model, engine)]

    def new_cache(self, decoder: Any) -> Any:
        from transformers.cache_utils import DynamicCache

        return DynamicCache()

    def causal_mask(self, decoder: Any, hidden: Tensor, mask: Tensor | None, cache: Any, layer: int) -> Any:
        past = 0 if cache is None or layer >= len(cache.key_cache) else cache.key_cache[layer].shape[-2]
        column = torch.arange(past, past + hidden.shape[1], device=hidden.device)
        given = None if mask is None else mask.to(torch.long)
        return decoder._update_causal_mask(given, hidden, column, cache, False)

    def encoded(
        self, model: nn.Module, arguments: Mapping[str, Any], signals: Mapping[str, Tensor]
    ) -> list[EncodedVideo]:
        videos, start = [], 0
        for item, kind in zip(arguments["images"], kinds(arguments), strict=True):
            frames = len(item) if item.ndim == 4 else 1
            if kind == "video":
                side, line = self._layout(model)
                tokens = frames * side**2
                own = {name: s[start : start + frames] for name, s in signals.items()}
                videos.append(EncodedVideo((frames, side, side), tokens if line is None else line, own))
            start += frames
        return videos

    def tower_signals(self, model: nn.Module) -> TowerSignals:
        layers = self._tower(model).vision_tower.vision_model.encoder.layers
        return SiglipSignals(layers, functools.partial(self.pool_saliency, model))

    def signal_layer(self, model: nn.Module, arguments: Mapping[str, Any]) -> int:
        return len(self._tower(model).vision_tower.vision_model.encoder.layers) - 1

    def pool_saliency(self, model: Any, scores: Tensor) -> Tensor:
        """[F, patches] -> [F, P], exactly as the features are pooled."""
        return model.get_2dPool(scores[..., None])[..., 0]

    def default_head(self, model: nn.Module) -> str | None:
        config = self.vision_config(model)
        so400m = (config.hidden_size, config.patch_size, config.image_size) == (1152, 14, 384)
        return "google/siglip-so400m-patch14-384" if so400m else None

    def vision_config(self, model: nn.Module) -> Any:
        return self._tower(model).vision_tower.config

    def _tower(self, model: Any) -> Any:
        return model.get_vision_tower()

    def _layout(self, model: Any) -> tuple[int, int | None]:
        """Tokens a side of a frame, and how many a newline follows (0: there is none, None: the whole video)."""
        config, patches = model.config, self._tower(model).num_patches_per_side
        side = -(-patches // 2) if config.mm_spatial_pool_mode == "bilinear" else patches // 2
        merge = getattr(config, "mm_patch_merge_type", "flat")
        position = getattr(config, "mm_newline_position", "one_token")
        if merge == "flat" or position == "no_token" or (position == "one_token" and "unpad" not in merge):
            return side, 0
        return side, {"grid": side, "frame": side**2}.get(position)
