"""Tiny random LLaVA-NeXT-Video models: a CLIP tower, a Llama decoder, no newline."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tiny import (
    EOS,
    FRAMES,
    HIDDEN,
    IMAGE,
    IMAGE_SIZE,
    PAD,
    PATCH_SIZE,
    VIDEO,
    VOCABULARY,
    Text,
    left_padded,
    llava_inputs,
    randomise,
)
from torch import Tensor
from transformers import CLIPVisionConfig, LlamaConfig, LlavaNextVideoConfig, LlavaNextVideoForConditionalGeneration

TOKENS = (IMAGE_SIZE // PATCH_SIZE // 2) ** 2
"""Of a frame."""


def next_video(attn: str = "sdpa", layers: int = 6) -> LlavaNextVideoForConditionalGeneration:
    """A model with random weights, the same for the same arguments, in eval mode."""
    text = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=96,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        bos_token_id=2,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
    )
    config = LlavaNextVideoConfig(
        text_config=text.to_dict(),
        vision_config=vision.to_dict(),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        image_grid_pinpoints=[[IMAGE_SIZE, IMAGE_SIZE], [IMAGE_SIZE, 2 * IMAGE_SIZE]],
    )
    torch.manual_seed(0)  # for the class token, which is neither weight nor bias
    model = LlavaNextVideoForConditionalGeneration(config)
    model.set_attn_implementation(attn)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = PAD
    return randomise(model).eval()


def next_inputs(texts: Sequence[Text], frames: int = FRAMES, seed: int = 0) -> dict[str, Tensor]:
    """Arguments for `model(**inputs)`, of prompts with videos only: as `tiny.llava_inputs`."""
    place: list[Any] = [VIDEO] * (frames * TOKENS)
    rows = [[i for x in text for i in (place if x == "V" else [x])] for text in texts]
    return llava_inputs(texts, frames, seed) | left_padded(rows)
