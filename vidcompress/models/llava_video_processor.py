"""Processor of LLaVA-Video: LLaVA-OneVision's, counting the placeholders of other poolings and newlines."""

from __future__ import annotations

import math
from typing import Any

from tokenizers import AddedToken
from transformers import (
    AutoConfig,
    AutoTokenizer,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
)

from vidcompress.models.llava_video_config import LlavaVideoConfig, placeholders, pooled_side

CHAT_TEMPLATE = (
    "{%- if messages[0]['role'] != 'system' %}"
    "{{- '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}"
    "{%- endif %}"
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message['role'] + '\n' }}"
    "{%- if message['content'] is string %}"
    "{{- message['content'] }}"
    "{%- else %}"
    "{%- for part in message['content'] %}"
    "{%- if part['type'] == 'image' %}{{- '<image>\n' }}"
    "{%- elif part['type'] == 'video' %}{{- '<video>\n' }}"
    "{%- elif part['type'] == 'text' %}{{- part['text'] }}"
    "{%- endif %}"
    "{%- endfor %}"
    "{%- endif %}"
    "{{- '<|im_end|>\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
"""ChatML with a line break after every image and video, as these models were trained (conversation qwen_1_5)."""


class LlavaVideoProcessor(LlavaOnevisionProcessor):
    """LLaVA-OneVision's, for `mm_spatial_pool_mode` and `mm_newline_position` (see `LlavaVideoConfig`)."""

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        video_processor: Any = None,
        num_image_tokens: int | None = None,
        vision_feature_select_strategy: str | None = None,
        chat_template: str | None = None,
        image_token: str = "<image>",
        video_token: str = "<video>",
        vision_aspect_ratio: str = "anyres_max_9",
        mm_spatial_pool_mode: str = "bilinear",
        mm_newline_position: str = "grid",
        **kwargs: Any,
    ) -> None:
        self.mm_spatial_pool_mode, self.mm_newline_position = mm_spatial_pool_mode, mm_newline_position
        super().__init__(
            image_processor,
            tokenizer,
            video_processor,
            num_image_tokens,
            vision_feature_select_strategy,
            chat_template,
            image_token,
            video_token,
            vision_aspect_ratio,
            **kwargs,
        )
        self.video_tokens(1)

    def video_tokens(self, frames: int) -> int:
        """Placeholders of a video of so many frames, newlines included."""
        side = pooled_side(math.isqrt(self.num_image_tokens), self.mm_spatial_pool_mode)
        return placeholders(frames, side, self.mm_newline_position)

    def replace_video_token(self, video_inputs: dict[str, Any], video_idx: int, **kwargs: Any) -> str:
        """The placeholders that a <video> in a prompt becomes."""
        return self.video_token * self.video_tokens(len(video_inputs["pixel_values_videos"][video_idx]))

    def _get_num_multimodal_tokens(self, image_sizes: Any = None, video_sizes: Any = None, **kwargs: Any) -> Any:
        data = super()._get_num_multimodal_tokens(image_sizes, video_sizes, **kwargs)
        if video_sizes is not None:
            data.num_video_tokens = [self.video_tokens(frames) for frames, _, _ in video_sizes]
        return data

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        """As in transformers. A checkpoint as it was published has a tokenizer only: the rest follows from its config.

        Raises ValueError if its tokenizer has no room for the placeholders where the model expects them.
        """
        settings = {k: kwargs.pop(k) for k in ("mm_spatial_pool_mode", "mm_newline_position") if k in kwargs}
        try:
            processor = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        except OSError:
            hub = {k: v for k, v in kwargs.items() if k in ("cache_dir", "revision", "token", "local_files_only")}
            config = AutoConfig.from_pretrained(pretrained_model_name_or_path, **hub)
            if not isinstance(config, LlavaVideoConfig):
                raise
            tokenizer = AutoTokenizer.from_pretrained(pretrained_model_name_or_path, **hub)
            return cls.of(config, tokenizer, **settings)
        for name, value in settings.items():
            setattr(processor, name, value)
        processor.video_tokens(1)
        return processor

    @classmethod
    def of(cls, config: LlavaVideoConfig, tokenizer: Any, **settings: str) -> LlavaVideoProcessor:
        """The processor that fits a model, around a tokenizer, which learns the two placeholders.

        Args:
            settings: `mm_spatial_pool_mode` and `mm_newline_position`, where the model was given others.
        """
        words = [AddedToken(word, special=True, normalized=False) for word in ("<image>", "<video>")]
        tokenizer.add_tokens(words, special_tokens=True)
        found = tokenizer.convert_tokens_to_ids(["<image>", "<video>"])
        expected = [config.image_token_id, config.video_token_id]
        if found != expected:
            raise ValueError(f"the tokenizer gives <image> and <video> the ids {found}, the model expects {expected}")
        vision = config.vision_config
        size = {"height": vision.image_size, "width": vision.image_size}
        look: dict[str, Any] = {"size": size, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
        modes = {
            "mm_spatial_pool_mode": config.mm_spatial_pool_mode,
            "mm_newline_position": config.mm_newline_position,
        }
        return cls(
            LlavaOnevisionImageProcessor(**look, image_grid_pinpoints=config.image_grid_pinpoints),
            tokenizer,
            LlavaOnevisionVideoProcessor(**look),
            num_image_tokens=(vision.image_size // vision.patch_size) ** 2,
            vision_feature_select_strategy=config.vision_feature_select_strategy,
            chat_template=CHAT_TEMPLATE,
            vision_aspect_ratio=config.vision_aspect_ratio,
            **(modes | settings),
        )
