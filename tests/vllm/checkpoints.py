"""Tiny random checkpoints with tokenizer and processor, as vLLM and transformers both load them; clips to show them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
    SiglipVisionConfig,
    SiglipVisionModel,
)

KINDS = ["llava_onevision", "qwen2_vl", "qwen2_5_vl"]
SIDE, PATCH = 84, 14  # LLaVA-OneVision: 6 x 6 patches, 3 x 3 tokens a frame
SIZE = (112, 168)  # of a clip's frames; Qwen: 4 x 6 tokens for every two frames
HIDDEN = 128
BEGIN, END = "<|im_start|>", "<|im_end|>"

_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] in ('image', 'image_url') %}IMAGE{% elif part['type'] in ('video', 'video_url') %}VIDEO"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_PLACES = {
    "llava_onevision": ("<image>\n", "<video>\n"),
    "qwen2_vl": ("<|vision_start|><|image_pad|><|vision_end|>", "<|vision_start|><|video_pad|><|vision_end|>"),
}
_PLACES["qwen2_5_vl"] = _PLACES["qwen2_vl"]
_TEXT: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": HIDDEN,  # 32 a head, the least that vLLM's CPU attention takes
    "intermediate_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
    "bos_token_id": None,
}
_VISION = {"depth": 3, "num_heads": 4, "patch_size": PATCH, "spatial_merge_size": 2, "temporal_patch_size": 2}


def places(kind: str) -> dict[str, str]:
    """The text that stands for an image and a video in a prompt."""
    return dict(zip(("image", "video"), _PLACES[kind], strict=True))


def save(kind: str, folder: Path) -> Path:
    """A checkpoint of that `model_type` with random weights, and in `siglip/` the head for LLaVA-OneVision's tower."""
    model, processor = _llava() if kind == "llava_onevision" else _qwen(kind)
    _randomise(model)
    model.generation_config.suppress_tokens = None
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    if kind == "llava_onevision":
        _as_published(folder / "model.safetensors")
        siglip = SiglipVisionModel(SiglipVisionConfig(**_siglip()))
        _randomise(siglip)
        siglip.save_pretrained(folder / "siglip")
    return folder


def clip(frames: int, seed: int = 0) -> np.ndarray:
    """uint8 [frames, *SIZE, 3]: a bright square crosses noise, before another background in the second half."""
    generator = np.random.default_rng(seed)
    video = generator.integers(0, 60, (frames, *SIZE, 3)).astype(np.uint8)
    video[frames // 2 :] += np.uint8(100 + 10 * (seed % 8))
    for f in range(frames):
        column = (f * 9 + seed * 17) % (SIZE[1] - 30)
        video[f, 30:60, column : column + 30] = (250, 20 * (seed % 10), 50)
    return video


def write_mp4(path: Path, video: np.ndarray, rate: int = 2) -> Path:
    """The frames as an mp4."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=rate)
        stream.height, stream.width = video.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for frame in video:
            for packet in stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return path


def _randomise(model: torch.nn.Module) -> None:
    """Weights large enough that every token matters to the output; norms keep their ones."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            scale = 1.0 if "embed_tokens" in name else 0.15
        elif "bias" in name or "newline" in name:
            scale = 0.1
        else:
            continue
        parameter.data = torch.randn(parameter.shape, generator=generator) * scale


def _tokenizer(*special: str) -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token=END, pad_token="<pad>", additional_special_tokens=[BEGIN, *special]
    )


def _template(kind: str) -> str:
    image, video = _PLACES[kind]
    return (
        _TEMPLATE.replace("IMAGE", image.replace("\n", "\\n"))
        .replace("VIDEO", video.replace("\n", "\\n"))
        .replace("\\n", "\n")
    )


def _siglip() -> dict[str, Any]:
    return {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "image_size": SIDE,
        "patch_size": PATCH,
    }


def _llava() -> tuple[Any, Any]:
    tokenizer = _tokenizer("<image>", "<video>")
    image, video, end = tokenizer.convert_tokens_to_ids(["<image>", "<video>", END])
    pinpoints = [[SIDE, SIDE], [SIDE, 2 * SIDE]]
    config = LlavaOnevisionConfig(
        text_config={"model_type": "qwen2", "eos_token_id": end, **_TEXT},
        vision_config={"model_type": "siglip_vision_model", "vision_use_head": False, **_siglip()},
        image_token_id=image,
        video_token_id=video,
        image_token_index=image,
        video_token_index=video,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        image_grid_pinpoints=pinpoints,
        tie_word_embeddings=False,
    )
    size = {"height": SIDE, "width": SIDE}
    processor = LlavaOnevisionProcessor(
        image_processor=LlavaOnevisionImageProcessor(size=size, image_grid_pinpoints=pinpoints),
        video_processor=LlavaOnevisionVideoProcessor(size=size),
        tokenizer=tokenizer,
        num_image_tokens=(SIDE // PATCH) ** 2,
        vision_feature_select_strategy="full",
        vision_aspect_ratio="anyres_max_9",
        chat_template=_template("llava_onevision"),
    )
    return LlavaOnevisionForConditionalGeneration(config), processor


def _qwen(kind: str) -> tuple[Any, Any]:
    names = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
    tokenizer = _tokenizer(*names)
    ids = dict(zip(names, tokenizer.convert_tokens_to_ids(list(names)), strict=True))
    vision = {
        "qwen2_vl": {**_VISION, "embed_dim": 64, "hidden_size": HIDDEN, "mlp_ratio": 2},
        "qwen2_5_vl": {
            **_VISION,
            "hidden_size": 64,
            "out_hidden_size": HIDDEN,
            "intermediate_size": 96,
            "window_size": 56,
            "fullatt_block_indexes": [0, 2],
            "tokens_per_second": 2,
        },
    }[kind]
    config_class, model_class, processor_class = {
        "qwen2_vl": (Qwen2VLConfig, Qwen2VLForConditionalGeneration, Qwen2VLProcessor),
        "qwen2_5_vl": (Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor),
    }[kind]
    rope = {"rope_type": "default", "type": "mrope", "mrope_section": [4, 6, 6], "rope_theta": 10000.0}
    end = tokenizer.convert_tokens_to_ids(END)
    config = config_class(
        text_config={**_TEXT, "rope_parameters": rope, "eos_token_id": end},
        vision_config=vision,
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        tie_word_embeddings=False,
    )
    size = {"shortest_edge": 4 * 28 * 28, "longest_edge": 64 * 28 * 28}
    processor = processor_class(
        image_processor=Qwen2VLImageProcessor(size=size),
        video_processor=Qwen2VLVideoProcessor(size={**size, "longest_edge": 2000 * 28 * 28}),
        tokenizer=tokenizer,
        chat_template=_template(kind),
    )
    return model_class(config), processor


def _as_published(path: Path) -> None:
    """The tower's names as in the hub's checkpoints; those that transformers 5 writes vLLM 0.32 does not know."""
    old, new = "vision_tower.", "vision_tower.vision_model."
    renamed = {name.replace(old, new, 1) if name.startswith(old) else name: x for name, x in load_file(path).items()}
    save_file(renamed, path, {"format": "pt"})


if __name__ == "__main__":
    print(save(sys.argv[1], Path(sys.argv[2])))
