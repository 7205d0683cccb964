"""An mp4 and a LLaVA-OneVision of tiny size with random weights, complete with tokenizer, processor and SigLIP head.

The checkpoint is real in everything but its weights: transformers' classes, safetensors, tokenizer, processor and chat
template, saved and loaded as any other.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

SIDE, PATCH = 112, 14  # 8 x 8 patches, pooled to 4 x 4 tokens a frame
QUESTION = "What happens in this video?"
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% elif part['type'] == 'video' %}<video>"
    "{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_clip(path: Path, frames: int = 48, side: int = 128) -> Path:
    """An mp4 of two shots: a red square crossing a gradient, then a blue one rising before a plain background."""
    import av

    ramp = np.linspace(40, 160, side, dtype=np.uint8)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=12)
        stream.width = stream.height = side
        stream.pix_fmt = "yuv420p"
        for i in range(frames):
            image = np.zeros((side, side, 3), np.uint8)
            first = i < frames // 2
            image[:] = ramp[None, :, None] if first else (30, 90, 40)
            step = i * 4 % (side - 32)
            row, column = (48, step) if first else (side - 32 - step, 48)
            image[row : row + 32, column : column + 32] = (220, 40, 40) if first else (40, 60, 220)
            for packet in stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return path


def make_checkpoint(folder: Path, seed: int = 0) -> Path:
    """Saves the tiny model, its processor, and in `siglip/` a SigLIP of the same width for the pooling head."""
    from transformers import (
        LlavaOnevisionConfig,
        LlavaOnevisionForConditionalGeneration,
        LlavaOnevisionImageProcessor,
        LlavaOnevisionProcessor,
        LlavaOnevisionVideoProcessor,
        Qwen2Config,
        SiglipVisionConfig,
        SiglipVisionModel,
    )

    torch.manual_seed(seed)
    tokenizer = _tokenizer()
    ids = {name: tokenizer.convert_tokens_to_ids(name) for name in ("<image>", "<video>", "<|im_end|>", "<pad>")}
    vision = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "image_size": SIDE,
        "patch_size": PATCH,
    }
    text = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=8192,
        bos_token_id=None,
        eos_token_id=ids["<|im_end|>"],
        pad_token_id=ids["<pad>"],
    )
    config = LlavaOnevisionConfig(
        text_config=text.to_dict(),
        vision_config=SiglipVisionConfig(**vision, vision_use_head=False).to_dict(),
        image_token_index=ids["<image>"],
        video_token_index=ids["<video>"],
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        image_grid_pinpoints=[[SIDE, SIDE], [SIDE, 2 * SIDE], [2 * SIDE, SIDE]],
    )
    model = LlavaOnevisionForConditionalGeneration(config).eval()
    model.generation_config.pad_token_id = ids["<pad>"]
    model.generation_config.suppress_tokens = [ids["<image>"], ids["<video>"]]
    model.save_pretrained(folder)
    size = {"height": SIDE, "width": SIDE}
    LlavaOnevisionProcessor(
        image_processor=LlavaOnevisionImageProcessor(size=size, image_grid_pinpoints=config.image_grid_pinpoints),
        video_processor=LlavaOnevisionVideoProcessor(size=size),
        tokenizer=tokenizer,
        num_image_tokens=(SIDE // PATCH) ** 2,
        vision_feature_select_strategy="full",
        chat_template=TEMPLATE,
    ).save_pretrained(folder)
    SiglipVisionModel(SiglipVisionConfig(**vision)).save_pretrained(folder / "siglip")
    return folder


def _tokenizer() -> Any:
    """A byte-level BPE trained on a few words, with LLaVA-OneVision's special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    words = "user assistant system what happens in this video describe the a red blue square moves rises crosses before"
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<pad>", "<|im_start|>", "<|im_end|>", "<image>", "<video>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([words, QUESTION] * 2, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<pad>", eos_token="<|im_end|>", padding_side="left")
