"""LLaVA-Video (Zhang et al., 2024, arXiv:2410.02713) on transformers' LLaVA-OneVision classes.

Only the video path differs: frames are pooled with stride 2 in one of three ways, and newline tokens stand in one of
four places. Checkpoints in the layout they were published in (`model_type: llava_qwen`) load as they are, those of
LLaVA-OneVision too; what is saved has transformers' layout and `model_type: llava_video`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlavaOnevisionForConditionalGeneration, LlavaOnevisionModel
from transformers.models.llava_onevision.modeling_llava_onevision import LlavaOnevisionPreTrainedModel
from transformers.utils.generic import can_return_tuple

from vidcompress.models.llava_video_config import LlavaVideoConfig, pooled_side

ORIGINAL_KEYS = {
    r"^model\.vision_tower\.vision_tower\.vision_model\.": "model.vision_tower.",
    r"^model\.mm_projector\.0\.": "model.multi_modal_projector.linear_1.",
    r"^model\.mm_projector\.2\.": "model.multi_modal_projector.linear_2.",
    r"^model\.embed_tokens\.": "model.language_model.embed_tokens.",
    r"^model\.layers\.": "model.language_model.layers.",
    r"^model\.norm\.": "model.language_model.norm.",
}
"""Names of tensors as they were published, and in transformers. Tensors of the latter are left alone."""


class LlavaVideoModel(LlavaOnevisionModel):
    """LLaVA-OneVision's, with the video's own pooling and newlines."""

    config: LlavaVideoConfig

    def apply_pooling(self, image_features: Tensor) -> Tensor:
        """[F, patches, C] -> [F, side * side, C]."""
        side = math.isqrt(image_features.shape[1])
        x = image_features.unflatten(1, (side, side)).permute(0, 3, 1, 2)
        mode = self.config.mm_spatial_pool_mode
        if mode == "bilinear":
            x = functional.interpolate(x.contiguous(), size=[pooled_side(side, mode)] * 2, mode="bilinear")
        else:
            x = (functional.avg_pool2d if mode == "average" else functional.max_pool2d)(x.contiguous(), 2)
        return x.flatten(2).transpose(1, 2)

    @can_return_tuple
    def get_video_features(
        self,
        pixel_values_videos: Tensor,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        **kwargs: Any,
    ) -> Any:
        """As in LLaVA-OneVision: `pooler_output` [videos, placeholders, C] holds tokens and newlines."""
        output = super().get_video_features(
            pixel_values_videos,
            vision_feature_layer=vision_feature_layer,
            vision_feature_select_strategy=vision_feature_select_strategy,
            **kwargs,
            return_dict=True,
        )
        own = pixel_values_videos.shape[1] * self.config.frame_side() ** 2
        given = output.pooler_output
        features = self._with_newlines(given[:, :own])
        if given.shape[1] == own:  # older transformers put a last newline there themselves, afterwards
            if self.config.mm_newline_position == "no_token":
                raise ValueError(
                    f"transformers {transformers.__version__} puts a newline after every video, so that "
                    "mm_newline_position 'no_token' cannot be had; 5.23 does not"
                )
            features = features[:, :-1]
        output.pooler_output = features
        return output

    def _with_newlines(self, x: Tensor) -> Tensor:
        """[videos, tokens, C] -> [videos, placeholders, C]."""
        line = self.config.newline_line()
        if line == 0:
            return x
        x = x.unflatten(1, (-1, x.shape[1] if line is None else line))
        newline = self.image_newline.to(x.device, x.dtype).expand(*x.shape[:2], 1, -1)
        return torch.cat([x, newline], 2).flatten(1, 2)


class LlavaVideoForConditionalGeneration(LlavaOnevisionForConditionalGeneration):
    """LLaVA-OneVision's, on `LlavaVideoModel`."""

    config: LlavaVideoConfig
    config_class = LlavaVideoConfig
    _keys_to_ignore_on_load_unexpected = (r"vision_model\.head\.", r"vision_tower\.head\.")

    def __init__(self, config: LlavaVideoConfig) -> None:
        config.newline_line()
        LlavaOnevisionPreTrainedModel.__init__(self, config)
        self.model = LlavaVideoModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; also from a checkpoint as it was published.

        Raises ValueError, with all names, if tensors are missing or of no use.
        """
        mapping = ORIGINAL_KEYS | (kwargs.pop("key_mapping", None) or {})
        wanted = kwargs.pop("output_loading_info", False)
        model, info = super().from_pretrained(
            pretrained_model_name_or_path, *args, key_mapping=mapping, output_loading_info=True, **kwargs
        )
        problems = {kind: sorted(map(str, info[f"{kind}_keys"])) for kind in ("missing", "unexpected", "mismatched")}
        if any(problems.values()) and not kwargs.get("ignore_mismatched_sizes"):
            listed = "; ".join(f"{kind}: {', '.join(names)}" for kind, names in problems.items() if names)
            raise ValueError(f"{pretrained_model_name_or_path} is no complete {cls.config_class.model_type}: {listed}")
        model._weight_conversions = []  # so that save_pretrained does not write the published names again
        return (model, info) if wanted else model
