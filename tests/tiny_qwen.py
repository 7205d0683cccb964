"""Tiny random Qwen2-VL, Qwen2.5-VL, Qwen3-VL and Qwen3-VL-MoE models, and prompts for them.

A token is 2 x 2 patches of two frames. Before every video, and in Qwen3-VL before every frame, comes `START`, behind it
`END`; Qwen3-VL tells the time of every frame by a word.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from tiny import EOS, HIDDEN, IMAGE, PAD, VIDEO, VOCABULARY, Text, compress, left_padded, randomise
from torch import Tensor
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
)

from vidcompress import Handle, Method
from vidcompress.method import Pipeline

START, END = 192, 193
TIME = 20  # the word for the time of a video's first frame
DEPTH = 6
DEEPSTACK = 2
"""Decoder layers at which Qwen3-VL adds features of its tower."""

PATCH = 3 * 2 * 14 * 14  # values: channels, frames, rows, columns

Grid = tuple[int, int, int]
"""Frames (after two were merged), rows and columns of patches."""

GRIDS: list[Grid] = [(4, 4, 6), (3, 8, 4), (2, 4, 4)]
ONE: Text = [5, 6, "V", 7, 8, 9]
TWO: Text = [5, "V", 17, 18, "V", 9, 10]
KINDS = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"]

_TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 96,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "bos_token_id": 2,
    "eos_token_id": EOS,
    "pad_token_id": PAD,
    "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0},
}
_TEXT_3: dict[str, Any] = {
    **_TEXT,
    "head_dim": 16,
    "rope_parameters": {
        "rope_type": "default",
        "mrope_section": [4, 2, 2],
        "rope_theta": 10000.0,
        "mrope_interleaved": True,
    },
}
_VISION: dict[str, Any] = {
    "depth": 3,
    "num_heads": 4,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}
_VISION_25: dict[str, Any] = {
    **_VISION,
    "hidden_size": 32,
    "out_hidden_size": HIDDEN,
    "intermediate_size": 48,
    "window_size": 56,
    "fullatt_block_indexes": [0, 2],
}
_VISION_3: dict[str, Any] = {
    **_VISION,
    "hidden_size": 32,
    "out_hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_position_embeddings": 64,
    "deepstack_visual_indexes": list(range(DEEPSTACK)),
}
_MOE: dict[str, Any] = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "decoder_sparse_step": 1,
}
_MODELS: dict[str, tuple[Any, Any, dict[str, Any], dict[str, Any]]] = {
    "qwen2_vl": (
        Qwen2VLConfig,
        Qwen2VLForConditionalGeneration,
        _TEXT,
        {**_VISION, "embed_dim": 32, "hidden_size": HIDDEN, "mlp_ratio": 2},
    ),
    "qwen2_5_vl": (Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, _TEXT, _VISION_25),
    "qwen3_vl": (Qwen3VLConfig, Qwen3VLForConditionalGeneration, _TEXT_3, _VISION_3),
    "qwen3_vl_moe": (Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration, {**_TEXT_3, **_MOE}, _VISION_3),
}


def qwen(kind: str, attn: str = "sdpa") -> Any:
    """A model with random weights, the same for the same arguments, in eval mode."""
    config, model_class, text, vision = _MODELS[kind]
    special = {"vision_start_token_id": START, "vision_end_token_id": END}
    model = model_class(
        config(text_config=dict(text), vision_config=vision, image_token_id=IMAGE, video_token_id=VIDEO, **special)
    )
    model.set_attn_implementation(attn)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = PAD
    return randomise(model).eval()


def pair(kind: str, method: Method | Pipeline, attn: str = "sdpa") -> tuple[Any, Any, Handle]:
    """A plain model, an equal one that is compressed, and its handle."""
    plain, compressed = qwen(kind, attn), qwen(kind, attn)
    return plain, compressed, compress(compressed, method)


def tokens(grid: Grid) -> Grid:
    """(t, h, w) of a video's tokens."""
    t, h, w = grid
    return t, h // 2, w // 2


def length(grid: Grid) -> int:
    """Tokens of a video."""
    t, h, w = tokens(grid)
    return t * h * w


def qwen_inputs(
    kind: str, texts: Sequence[Text], grids: Sequence[Grid] = GRIDS, *, image: Grid = (1, 4, 8), seed: int = 0
) -> dict[str, Tensor]:
    """Arguments for `model(**inputs)` and `model.generate(**inputs)`: rows padded on the left, random pixels.

    Every "V" is a video of the next of the grids; it shows two scenes with some noise. Every "I" is an image.
    """
    generator = torch.Generator().manual_seed(seed)
    marks = [x for text in texts for x in text if isinstance(x, str)]
    grids = grids[: marks.count("V")]
    following = iter(grids)
    rows: list[list[int]] = []
    for text in texts:
        rows.append([])
        for x in text:
            if x == "V":
                rows[-1] += _video_ids(kind, next(following))
            else:
                rows[-1] += [START, *[IMAGE] * length(image), END] if isinstance(x, str) else [x]
    inputs = left_padded(rows)
    if grids:
        inputs["pixel_values_videos"] = torch.cat([_pixels(grid, generator) for grid in grids])
        inputs["video_grid_thw"] = torch.tensor(grids)
    if "I" in marks:
        inputs["pixel_values"] = torch.cat([_pixels(image, generator) for _ in range(marks.count("I"))])
        inputs["image_grid_thw"] = torch.tensor([image] * marks.count("I"))
    inputs["mm_token_type_ids"] = types_of(inputs["input_ids"])
    return inputs


def types_of(ids: Tensor) -> Tensor:
    """`mm_token_type_ids`: 1 for images, 2 for video."""
    return (ids == IMAGE).int() + 2 * (ids == VIDEO).int()


def longer(inputs: Mapping[str, Tensor], sequences: Tensor, words: Sequence[int] = ()) -> dict[str, Tensor]:
    """The prompt that goes on, with its videos: `sequences` [B, L], and `words` in every row."""
    ids = torch.cat([sequences, torch.tensor([list(words)] * len(sequences), dtype=torch.long)], 1)
    real = torch.ones(len(ids), ids.shape[1] - inputs["input_ids"].shape[1], dtype=torch.long)
    mask = torch.cat([inputs["attention_mask"], real], 1)
    return {**inputs, "input_ids": ids, "attention_mask": mask, "mm_token_type_ids": types_of(ids)}


def without_videos(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a later turn, all of whose videos are in the cache, is called with."""
    return {key: inputs[key] for key in ("input_ids", "attention_mask")}


def _video_ids(kind: str, grid: Grid) -> list[int]:
    if not kind.startswith("qwen3"):
        return [START, *[VIDEO] * length(grid), END]
    frames = grid[0]
    return [x for f in range(frames) for x in (TIME + f, START, *[VIDEO] * (length(grid) // frames), END)]


def _pixels(grid: Grid, generator: torch.Generator) -> Tensor:
    """[patches, values], a new scene halfway."""
    t, h, w = grid
    scenes = torch.randn(2, h * w, PATCH, generator=generator)
    noise = torch.randn(t, h * w, PATCH, generator=generator)
    return (scenes[torch.arange(t) * 2 // t] + 0.2 * noise).flatten(0, 1)
