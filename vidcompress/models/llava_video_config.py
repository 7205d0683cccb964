"""Config of LLaVA-Video, also from checkpoints in the layout they were published in (`model_type: llava_qwen`).

Apart from the model: a config can be read where images and videos cannot.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Mapping
from typing import Any

from transformers import AutoConfig, LlavaOnevisionConfig

POOL_MODES = ("average", "bilinear", "max")
NEWLINE_POSITIONS = ("grid", "frame", "one_token", "no_token")

ORIGINAL_TYPE = "llava_qwen"

TEXT_FIELDS = (
    "attention_dropout",
    "bos_token_id",
    "eos_token_id",
    "hidden_act",
    "hidden_size",
    "initializer_range",
    "intermediate_size",
    "max_position_embeddings",
    "max_window_layers",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "rms_norm_eps",
    "rope_theta",
    "sliding_window",
    "tie_word_embeddings",
    "use_cache",
    "use_sliding_window",
    "vocab_size",
)

SO400M = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 26,
    "num_attention_heads": 16,
    "image_size": 384,
    "patch_size": 14,
}
"""The tower of all published checkpoints, google/siglip-so400m-patch14-384, without its last layer."""


class LlavaVideoConfig(LlavaOnevisionConfig):
    """LLaVA-OneVision's, and how frames are pooled and where newlines stand.

    Args:
        mm_spatial_pool_mode: average (27 x 27 patches become 13 x 13 tokens), bilinear (14 x 14) or max (13 x 13).
        mm_newline_position: grid (a newline after every row), frame (after every frame), one_token (after the video)
            or no_token.

    Other values are refused when a model is built: AutoProcessor, which reads the config of a checkpoint with the
    caller's own values first, takes a ValueError for a reason to load no more than the tokenizer.
    """

    model_type = "llava_video"
    mm_spatial_pool_mode: str = "bilinear"
    mm_newline_position: str = "grid"

    def frame_side(self) -> int:
        """Rows, and columns, of a frame's tokens."""
        side = self.vision_config.image_size // self.vision_config.patch_size
        return pooled_side(side, self.mm_spatial_pool_mode)

    def newline_line(self) -> int | None:
        """How many tokens a newline follows, 0 where there is no newline; None for the whole video."""
        return newline_line(self.mm_newline_position, self.frame_side())

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As in transformers; also from the config of a checkpoint as it was published."""
        if config_dict.get("model_type") == ORIGINAL_TYPE:
            config_dict = _translated(config_dict)
        # not cls: transformers finds a model's class by its config's
        return super(LlavaVideoConfig, LlavaVideoConfig).from_dict(config_dict, **kwargs)


class LlavaQwenConfig(LlavaVideoConfig):
    """By which transformers finds checkpoints as they were published; what it reads is a `LlavaVideoConfig`."""

    model_type = ORIGINAL_TYPE


def pooled_side(side: int, mode: str) -> int:
    """Rows, and columns, of a frame's tokens that `side` rows of patches are pooled to.

    Raises ValueError for a mode that is none of `POOL_MODES`.
    """
    if mode not in POOL_MODES:
        raise ValueError(f"mm_spatial_pool_mode must be one of {', '.join(POOL_MODES)}, got {mode!r}")
    return math.ceil(side / 2) if mode == "bilinear" else side // 2


def newline_line(position: str, side: int) -> int | None:
    """How many tokens a newline follows, 0 where there is no newline; None for the whole video.

    Raises ValueError for a position that is none of `NEWLINE_POSITIONS`.
    """
    if position not in NEWLINE_POSITIONS:
        raise ValueError(f"mm_newline_position must be one of {', '.join(NEWLINE_POSITIONS)}, got {position!r}")
    return {"grid": side, "frame": side**2, "one_token": None, "no_token": 0}[position]


def placeholders(frames: int, side: int, position: str) -> int:
    """Places that a video takes in the prompt, newlines included."""
    tokens, line = frames * side**2, newline_line(position, side)
    return tokens + (1 if line is None else tokens // line if line else 0)


def _translated(original: Mapping[str, Any]) -> dict[str, Any]:
    """The config of a checkpoint as it was published, in transformers' words.

    Raises ValueError for a tower, projector or layout that the published models do not have.
    """

    def refuse(key: str, accepted: str) -> None:
        raise ValueError(f"{key} = {original.get(key)!r} of this {ORIGINAL_TYPE} checkpoint: only {accepted} is known")

    if original.get("mm_projector_type") != "mlp2x_gelu":
        refuse("mm_projector_type", "'mlp2x_gelu'")
    if original.get("mm_resampler_type") is not None:
        refuse("mm_resampler_type", "None")
    if original.get("mm_patch_merge_type") != "spatial_unpad":
        refuse("mm_patch_merge_type", "'spatial_unpad'")
    if original.get("mm_spatial_pool_stride") not in (None, 2):
        refuse("mm_spatial_pool_stride", "2")
    if original.get("add_faster_video"):
        refuse("add_faster_video", "False")
    image = original.get("image_token_index", 151646)
    aspect = original.get("image_aspect_ratio", "anyres_max_9")
    if not str(aspect).startswith("anyres_max_"):
        warnings.warn(f"image_aspect_ratio {aspect!r} is not known; images are tiled as anyres_max_9", stacklevel=2)
        aspect = "anyres_max_9"
    pinpoints = original.get("image_grid_pinpoints")
    translated = {
        "model_type": LlavaVideoConfig.model_type,
        "architectures": ["LlavaVideoForConditionalGeneration"],
        "text_config": {"model_type": "qwen2"} | {k: original[k] for k in TEXT_FIELDS if k in original},
        "vision_config": _tower(original.get("mm_vision_tower")),
        "image_token_index": image,
        "video_token_index": image + 1,
        "vision_aspect_ratio": aspect,
        "image_grid_pinpoints": pinpoints if isinstance(pinpoints, list) else None,
        "mm_spatial_pool_mode": original.get("mm_spatial_pool_mode", "bilinear"),
        "mm_newline_position": original.get("mm_newline_position", "one_token"),
        "tie_word_embeddings": original.get("tie_word_embeddings", False),
    }
    newline_line(translated["mm_newline_position"], pooled_side(2, translated["mm_spatial_pool_mode"]))
    dtype = original.get("dtype", original.get("torch_dtype"))
    return translated | ({} if dtype is None else {"dtype": dtype})


def _tower(name: Any) -> dict[str, Any]:
    """Config of the SigLIP tower that a checkpoint names, without the last layer, which is not used."""
    if "siglip" not in os.path.basename(str(name)).lower():
        raise ValueError(f"the vision tower {name!r} is no SigLIP; only SigLIP towers are known")
    fields = dict(SO400M)
    if name != "google/siglip-so400m-patch14-384":
        tower = AutoConfig.from_pretrained(name)
        tower = getattr(tower, "vision_config", tower)
        if tower.model_type != "siglip_vision_model":
            raise ValueError(f"the vision tower {name!r} is a {tower.model_type}; only SigLIP towers are known")
        fields = {key: getattr(tower, key) for key in SO400M}
        fields["num_hidden_layers"] -= 1
    return {"model_type": "siglip_vision_model", "vision_use_head": False} | fields
