"""Models that transformers does not have, as small subclasses of models that it has."""

from __future__ import annotations


def register_configs() -> None:
    """Lets AutoConfig read the checkpoints of this package's models. Does nothing the second time."""
    from transformers import AutoConfig

    from vidcompress.models.llava_video_config import LlavaQwenConfig, LlavaVideoConfig

    for config in (LlavaVideoConfig, LlavaQwenConfig):
        AutoConfig.register(config.model_type, config, exist_ok=True)


def register() -> None:
    """Lets transformers' Auto classes find the models of this package. Does nothing the second time."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from vidcompress.models.llava_video import LlavaVideoForConditionalGeneration
    from vidcompress.models.llava_video_config import LlavaVideoConfig
    from vidcompress.models.llava_video_processor import LlavaVideoProcessor

    register_configs()
    AutoModelForImageTextToText.register(LlavaVideoConfig, LlavaVideoForConditionalGeneration, exist_ok=True)
    AutoProcessor.register(LlavaVideoConfig, LlavaVideoProcessor, exist_ok=True)
