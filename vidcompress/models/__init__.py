"""Models that transformers does not have, as small subclasses of models that it has."""

from __future__ import annotations


def register() -> None:
    """Lets transformers' Auto classes find the models of this package. Does nothing the second time."""
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

    from vidcompress.models.llava_video import (
        LlavaQwenConfig,
        LlavaVideoConfig,
        LlavaVideoForConditionalGeneration,
    )
    from vidcompress.models.llava_video_processor import LlavaVideoProcessor

    for config in (LlavaVideoConfig, LlavaQwenConfig):
        AutoConfig.register(config.model_type, config, exist_ok=True)
    AutoModelForImageTextToText.register(LlavaVideoConfig, LlavaVideoForConditionalGeneration, exist_ok=True)
    AutoProcessor.register(LlavaVideoConfig, LlavaVideoProcessor, exist_ok=True)
