"""Models that transformers does not have, as small subclasses of models that it has."""

from __future__ import annotations

OLDEST = (5, 17)


def register_configs() -> None:
    """Lets AutoConfig read the checkpoints of this package's models. Does nothing the second time.

    Raises ImportError under a transformers that has not what they are built of.
    """
    import transformers
    from transformers import AutoConfig

    if tuple(int(part) for part in transformers.__version__.split(".")[:2]) < OLDEST:
        raise ImportError(
            f"vidcompress loads models with transformers 5.17 or newer, this is {transformers.__version__}; "
            "load a model of the llava package with its own load_pretrained_model, then call vidcompress.apply"
        )

    from vidcompress.models.llava_video_config import LlavaQwenConfig, LlavaVideoConfig

    for config in (LlavaVideoConfig, LlavaQwenConfig):
        AutoConfig.register(config.model_type, config, exist_ok=True)


def register() -> None:
    """Lets transformers' Auto classes find the models of this package. Does nothing the second time.

    Raises ImportError as `register_configs`.
    """
    register_configs()
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from vidcompress.models.llava_video import LlavaVideoForConditionalGeneration
    from vidcompress.models.llava_video_config import LlavaVideoConfig
    from vidcompress.models.llava_video_processor import LlavaVideoProcessor

    AutoModelForImageTextToText.register(LlavaVideoConfig, LlavaVideoForConditionalGeneration, exist_ok=True)
    AutoProcessor.register(LlavaVideoConfig, LlavaVideoProcessor, exist_ok=True)
