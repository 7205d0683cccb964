"""Where vidcompress takes hold of vLLM. Nothing changes for models whose config has no word `vidcompress`.

    any process          the compressed models are registered, under names of their own            (`install`)
    the one that starts  settings are checked, and the model's architecture becomes one of these   (`_prepare`)
    API server           counts placeholders by `Method.budget`                                    (`models`)
    every worker         reduces each video behind the encoder                                     (`models`)

A host without the plugin does not know the architecture and says so; one with another version is refused by its worker.
This file and `models.py` are all that names vLLM's insides.
"""

from __future__ import annotations

import functools
from typing import Any

from vidcompress.serving.settings import KEY, RESOLVED, Serving, resolve

SUPPORTED = ((0, 32), (0, 33))
"""vLLM releases from the first on, below the second; as in the extra [vllm]."""

ARCHITECTURES = {
    "llava_onevision": "VidcompressLlavaOnevision",
    "qwen2_vl": "VidcompressQwen2VL",
    "qwen2_5_vl": "VidcompressQwen25VL",
}
"""Classes of `models.py`, and the architectures they are registered as, by `config.model_type`."""


def install() -> None:
    """Registers the compressed models and has every engine's config looked at. Harmless when called again.

    With a vLLM outside the supported range stock models are served as ever, and a model that asks for compression is
    refused when its engine starts.

    Raises RuntimeError if not even that can be arranged, because this vLLM prepares its config otherwise.
    """
    import vllm
    from vllm.config import VllmConfig
    from vllm.logger import init_logger

    logger = init_logger("vllm.plugins.vidcompress")
    refusal = unsupported(vllm.__version__)
    if not hasattr(VllmConfig, "try_verify_and_update_config"):
        raise RuntimeError(refusal or f"vLLM {vllm.__version__} has no VllmConfig.try_verify_and_update_config")
    if refusal:
        logger.warning(refusal)
    else:
        from vllm import ModelRegistry

        for name in ARCHITECTURES.values():
            ModelRegistry.register_model(name, f"vidcompress.serving.models:{name}")
        _heal_cpu_runner()
    _look_at_configs(VllmConfig, refusal)


def unsupported(version: str) -> str | None:
    """Why this vLLM cannot serve compressed models; None if it can."""
    (low, high), parts = SUPPORTED, version.split(".")
    number = tuple(int(part) for part in parts[:2] if part.isdecimal())
    if len(number) == 2 and low <= number < high:
        return None
    low_text, high_text = (".".join(map(str, bound)) for bound in SUPPORTED)
    return (
        f"vidcompress serves with vLLM from {low_text} on, below {high_text}, and this is {version}: models are served "
        'without compression, and those that ask for it are refused (pip install "vidcompress-transformers[vllm]")'
    )


def _look_at_configs(config_class: Any, refusal: str | None) -> None:
    """Has `_prepare` called for every engine's config, in the process that makes it."""
    original = config_class.try_verify_and_update_config
    if hasattr(original, "_vidcompress"):
        return

    @functools.wraps(original)
    def try_verify_and_update_config(self: Any) -> Any:
        _prepare(self, refusal)
        return original(self)

    try_verify_and_update_config._vidcompress = True  # type: ignore[attr-defined]
    config_class.try_verify_and_update_config = try_verify_and_update_config


def _prepare(vllm_config: Any, refusal: str | None) -> None:
    """Checks the settings of an engine and turns its model into a compressed one; ValueError if that cannot be."""
    model_config = vllm_config.model_config
    config: Any = getattr(model_config, "hf_config", None)
    compression = getattr(config, KEY, None)
    if compression is None or hasattr(config, RESOLVED):
        return
    if refusal:
        raise ValueError(refusal)
    serving = resolve(compression, config)
    _refuse_setup(vllm_config, serving)
    setattr(config, RESOLVED, serving.to_dict())
    config.architectures = [ARCHITECTURES[config.model_type]]
    if model_config.uses_mrope and serving.method.positions == "keep":
        # Has the runners hand over positions that travel with the features, as vLLM's own pruning does; the rate
        # itself is read by models that are not in force.
        model_config.multimodal_config.video_pruning_rate = 0.5
    log_active("config", serving)


def _refuse_setup(vllm_config: Any, serving: Serving) -> None:
    """ValueError for options of the engine that compression does not go with."""
    model_config, name = vllm_config.model_config, serving.method.name
    media, compilation = model_config.multimodal_config, vllm_config.compilation_config
    keeps = model_config.uses_mrope and serving.method.positions == "keep"
    hooked = model_config.uses_mrope and "saliency.head" in serving.method.needs
    refused = {
        f"--model-impl {model_config.model_impl}: only vLLM's own models are compressed": (
            model_config.model_impl not in ("auto", "vllm")
        ),
        f"--runner {model_config.runner_type}: only generating models are compressed": (
            model_config.runner_type != "generate"
        ),
        "--video-pruning-rate: it prunes by vLLM's own methods, and one compression is allowed": bool(
            media and media.video_pruning_rate
        ),
        "cudagraph_mm_encoder: a captured encoder does not come by here": compilation.cudagraph_mm_encoder,
        f"compile_mm_encoder: {name} looks into the encoder, which a compiled one does not allow": (
            hooked and compilation.compile_mm_encoder
        ),
        f"--mm-encoder-tp-mode data: {name} looks into the encoder, of which a rank then sees its own videos only": (
            hooked and media is not None and media.mm_encoder_tp_mode == "data"
        ),
        "pipeline parallelism: only its first stage learns the positions of what is kept; say positions: renumber": (
            keeps and vllm_config.parallel_config.pipeline_parallel_size > 1
        ),
    }
    for reason, applies in refused.items():
        if applies:
            raise ValueError(f"vidcompress cannot be served together with {reason}")


def log_active(where: str, serving: Serving) -> None:
    """One line of this process's log that says what is active."""
    from vllm.logger import init_logger

    logger = init_logger("vllm.plugins.vidcompress")
    logger.info("vidcompress %s is active (%s): %s", serving.version, where, serving)


def _heal_cpu_runner() -> None:
    """Has the CPU runner notice models that hand positions over, which of all runners it alone forgets (vLLM 0.32)."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    original = CPUModelRunner.load_model
    if hasattr(original, "_vidcompress"):
        return

    @functools.wraps(original)
    def load_model(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        media = self.model_config.multimodal_config
        places = getattr(self.get_model(), "supports_multimodal_pruning", False)
        self.is_multimodal_pruning_enabled = bool(media and places and media.is_multimodal_pruning_enabled())

    load_model._vidcompress = True  # type: ignore[attr-defined]
    CPUModelRunner.load_model = load_model
