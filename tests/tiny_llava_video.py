"""Tiny LLaVA-Video models with random weights, and checkpoints in the layout the real ones were published in."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from tiny import FRAMES, IMAGE, IMAGE_SIZE, PAD, VIDEO, Text, image_length, left_padded, llava, llava_inputs, randomise
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast, SiglipVisionConfig, SiglipVisionModel

from vidcompress.models.llava_video import LlavaVideoForConditionalGeneration
from vidcompress.models.llava_video_config import LlavaVideoConfig, placeholders, pooled_side

ORIGINAL = {
    "model.language_model.": "model.",
    "model.vision_tower.": "model.vision_tower.vision_tower.vision_model.",
    "model.multi_modal_projector.linear_1.": "model.mm_projector.0.",
    "model.multi_modal_projector.linear_2.": "model.mm_projector.2.",
}
"""Beginnings of the names of tensors here, and as the `llava` package has them."""


def llava_video(
    pool: str = "average", newline: str = "grid", attn: str = "sdpa", image_size: int = IMAGE_SIZE, **text: Any
) -> LlavaVideoForConditionalGeneration:
    """A model with random weights, the same for the same arguments, in eval mode; `text` overrides the text config."""
    like = llava(image_size=image_size, **text).config.to_dict()
    fields = {key: value for key, value in like.items() if key not in ("model_type", "architectures")}
    config = LlavaVideoConfig(**fields, mm_spatial_pool_mode=pool, mm_newline_position=newline)
    model = LlavaVideoForConditionalGeneration(config)
    model.set_attn_implementation(attn)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = PAD
    return randomise(model).eval()


def video_inputs(model: Any, texts: Sequence[Text], frames: int = FRAMES, seed: int = 0) -> dict[str, Tensor]:
    """Arguments for `model(**inputs)` and `model.generate(**inputs)`: as `tiny.llava_inputs`."""
    config, size = model.config, model.config.vision_config.image_size
    side = pooled_side(size // config.vision_config.patch_size, config.mm_spatial_pool_mode)
    places = {"V": [VIDEO] * placeholders(frames, side, config.mm_newline_position), "I": [IMAGE] * image_length(size)}
    rows = [[i for x in text for i in (places[x] if isinstance(x, str) else [x])] for text in texts]
    return llava_inputs(texts, frames, seed, image_size=size) | left_padded(rows)


def original_name(name: str) -> str:
    """What the `llava` package calls a tensor."""
    for here, there in ORIGINAL.items():
        if name.startswith(here):
            return there + name.removeprefix(here)
    return name


def save_original(model: Any, folder: Path, shards: int = 3, drop: str = "", **changes: Any) -> Path:
    """Writes a checkpoint as the `llava` package would: its config, tensor names, shards and a tokenizer.

    Args:
        drop: leave tensors out whose name here holds this.
        changes: of the config.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config, vision = model.config, model.config.vision_config
    tower = SiglipVisionConfig(**vision.to_dict() | {"num_hidden_layers": vision.num_hidden_layers + 1})
    SiglipVisionModel(tower).save_pretrained(folder / "tiny-siglip")
    text = config.text_config.to_dict()
    text["rope_theta"] = text.pop("rope_parameters")["rope_theta"]
    original = {key: text[key] for key in text if not key.startswith(("_", "layer_types", "dtype", "model_type"))} | {
        "model_type": "llava_qwen",
        "architectures": ["LlavaQwenForCausalLM"],
        "mm_vision_tower": str(folder / "tiny-siglip"),
        "mm_vision_select_layer": -2,
        "mm_hidden_size": vision.hidden_size,
        "mm_projector_type": "mlp2x_gelu",
        "mm_resampler_type": None,
        "mm_patch_merge_type": "spatial_unpad",
        "mm_spatial_pool_mode": config.mm_spatial_pool_mode,
        "mm_newline_position": config.mm_newline_position,
        "image_aspect_ratio": "anyres_max_9",
        "image_grid_pinpoints": config.image_grid_pinpoints,
        "image_token_index": IMAGE,
        "use_mm_proj": True,
        "add_faster_video": False,
        "tokenizer_model_max_length": 2048,
        "tokenizer_padding_side": "right",
        "torch_dtype": "float32",
        "tie_word_embeddings": False,
    }
    (folder / "config.json").write_text(json.dumps(original | changes))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 3], "pad_token_id": PAD}))
    state = {name: value.contiguous() for name, value in model.state_dict().items()}
    tensors = {original_name(name): value for name, value in state.items() if not drop or drop not in name}
    names, index = sorted(tensors), {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        mine = names[i::shards]
        save_file({name: tensors[name] for name in mine}, folder / file, {"format": "pt"})
        index |= dict.fromkeys(mine, file)
    total = sum(t.numel() * t.element_size() for t in tensors.values())
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": index})
    )
    tokenizer().save_pretrained(folder)
    return folder


def tokenizer() -> PreTrainedTokenizerFast:
    """Words w2..w189 with those ids, so that <image> and <video> get the two that follow."""
    words = {f"w{i}": i for i in range(IMAGE)} | {"<pad>": PAD, "<unk>": 3, "<|im_start|>": 10, "<|im_end|>": 11}
    by_id = {i: word for word, i in words.items()}
    inner = Tokenizer(models.WordLevel({word: i for i, word in by_id.items()}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", unk_token="<unk>", eos_token="<|im_end|>")
