"""Every model that `vidcompress.costs` names, from its published config: no weights, the meta device.

Of what the other tests check on single published models, this is what has to hold for all: sizes, depth, where methods
act, what a 32-frame video becomes, and what `vidcompress flops` says.
"""

from __future__ import annotations

import functools
import json
import math
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from tiny import anatomy, compress

from vidcompress import Site, list_methods, load, patches
from vidcompress.cli import main
from vidcompress.config import list_presets
from vidcompress.costs import MODELS, Dimensions
from vidcompress.models.llava_video import LlavaVideoForConditionalGeneration
from vidcompress.models.llava_video_config import LlavaVideoConfig

FRAMES = 32
PATCHES = (FRAMES // 2, 26, 46)
"""Of a video for Qwen: two frames become one."""

SIGLIP = {
    "model_type": "siglip_vision_model",
    "hidden_size": 1152,
    "image_size": 384,
    "intermediate_size": 4304,
    "num_attention_heads": 16,
    "num_hidden_layers": 26,
    "patch_size": 14,
    "vision_use_head": False,
}
CLIP = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "image_size": 336,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
    "patch_size": 14,
    "projection_dim": 768,
    "vocab_size": 32000,
}
VISION_2 = {"depth": 32, "embed_dim": 1280, "mlp_ratio": 4, "num_heads": 16, "patch_size": 14}
VISION_25 = {
    "depth": 32,
    "fullatt_block_indexes": [7, 15, 23, 31],
    "hidden_size": 1280,
    "intermediate_size": 3420,
    "num_heads": 16,
    "patch_size": 14,
    "window_size": 112,
}
VISION_3 = {"num_heads": 16, "num_position_embeddings": 2304, "patch_size": 16}
LARGE_3 = VISION_3 | {
    "deepstack_visual_indexes": [8, 16, 24],
    "depth": 27,
    "hidden_size": 1152,
    "intermediate_size": 4304,
}
SMALL_3 = VISION_3 | {
    "deepstack_visual_indexes": [5, 11, 17],
    "depth": 24,
    "hidden_size": 1024,
    "intermediate_size": 4096,
}


def decoder(of: Dimensions, vocabulary: int, **more: Any) -> dict[str, Any]:
    """A text config of these sizes."""
    return {
        "hidden_size": of.hidden,
        "intermediate_size": of.intermediate,
        "num_attention_heads": of.heads,
        "num_hidden_layers": of.layers,
        "num_key_value_heads": of.kv_heads,
        "vocab_size": vocabulary,
        **more,
    }


def llava_config(name: str) -> Any:
    of = MODELS[name]
    if "next" in name:
        text = decoder(of, 32064, model_type="llama")
        return transformers.LlavaNextVideoConfig(text_config=text, vision_config=CLIP, tie_word_embeddings=False)
    vocabulary = 152064 if "video" in name else 152000
    text = decoder(of, vocabulary, model_type="qwen2")
    config = LlavaVideoConfig if "video" in name else transformers.LlavaOnevisionConfig
    pool = {"mm_spatial_pool_mode": "average", "mm_newline_position": "grid"} if "video" in name else {}
    return config(text_config=text, vision_config=SIGLIP, tie_word_embeddings="0.5b" in name, **pool)


def qwen_config(name: str) -> Any:
    of = MODELS[name]
    tied = name in ("qwen2-vl-2b", "qwen2.5-vl-3b", "qwen3-vl-4b")
    vocabulary = 152064 if name.endswith("vl-7b") else 151936
    if name.startswith("qwen3"):
        rope = {"rope_type": "default", "mrope_interleaved": True, "mrope_section": [24, 20, 20], "rope_theta": 5e6}
        text = decoder(of, vocabulary, head_dim=of.head_dim, rope_parameters=rope)
        vision = (SMALL_3 if name == "qwen3-vl-4b" else LARGE_3) | {"out_hidden_size": of.hidden}
        if name == "qwen3-vl-30b-a3b":
            text |= {"moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8}
            return transformers.Qwen3VLMoeConfig(text_config=text, vision_config=vision, tie_word_embeddings=tied)
        return transformers.Qwen3VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=tied)
    rope = {"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1e6}
    text = decoder(of, vocabulary, rope_parameters=rope, tie_word_embeddings=tied)
    if name.startswith("qwen2.5"):
        vision = VISION_25 | {"out_hidden_size": of.hidden}
        return transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=tied)
    vision = VISION_2 | {"hidden_size": of.hidden}
    return transformers.Qwen2VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=tied)


BILLIONS = {
    "llava-onevision-0.5b": 0.9,
    "llava-onevision-7b": 8.0,
    "llava-onevision-72b": 73.2,
    "llava-video-7b": 8.0,
    "llava-video-72b": 73.2,
    "llava-next-video-7b": 7.1,
    "qwen2-vl-2b": 2.2,
    "qwen2-vl-7b": 8.3,
    "qwen2.5-vl-3b": 3.8,
    "qwen2.5-vl-7b": 8.3,
    "qwen3-vl-4b": 4.4,
    "qwen3-vl-8b": 8.8,
    "qwen3-vl-30b-a3b": 31.1,
}
"""10^9 parameters, tied embeddings counted once."""


@functools.cache
def real(name: str) -> Any:
    """The model on the meta device."""
    config = qwen_config(name) if name.startswith("qwen") else llava_config(name)
    with torch.device("meta"):
        if isinstance(config, LlavaVideoConfig):
            return LlavaVideoForConditionalGeneration(config)
        return transformers.AutoModelForImageTextToText.from_config(config)


models = pytest.mark.parametrize("name", MODELS)


def test_every_named_model_is_tested():
    assert set(BILLIONS) == set(MODELS)


@models
def test_sizes(name):
    model, of = real(name), MODELS[name]
    assert round(sum(p.numel() for p in model.parameters()) / 1e9, 1) == BILLIONS[name]
    assert Dimensions.of(model.config) == replace(of, frames=None, hub=None)
    patch = patches.find(model.config)
    patch.check(model)
    assert len(patch.decoder(model).layers) == of.layers


@models
def test_what_a_video_becomes(name):
    model, of = real(name), MODELS[name]
    pixels = torch.empty(1, FRAMES, 3, 384, 384, device="meta")
    asked = {"video_grid_thw": torch.tensor([PATCHES])} if of.frame is None else {"pixel_values_videos": pixels}
    (video,) = patches.find(model.config).encoded(model, asked, {})
    t, h, w = PATCHES
    assert video.grid == ((t, h // 2, w // 2) if of.frame is None else of.grid(FRAMES))
    newlines = {"llava-onevision": 1, "llava-video": 13 * FRAMES}
    assert video.newlines == next((n for series, n in newlines.items() if name.startswith(series)), 0)


INNER = {
    "cdpruner": lambda depth: [0],
    "fastv": lambda depth: [2],
    "framefusion": lambda depth: list(range(depth)),
    "streamingllm": lambda depth: [2],
}
INNER |= dict.fromkeys(("hieravid", "pyramiddrop"), lambda depth: [depth // 4, depth // 2, 3 * depth // 4])
INNER |= dict.fromkeys(("prunevid", "prunevid_inner"), lambda depth: [round(depth * 10 / 32)])
INNER |= dict.fromkeys(
    ("holitom", "holitom_inner", "text_aware_merge", "unified"), lambda depth: [round(depth * 9 / 14)]
)
"""Decoder layers at which methods act."""
DECODER_ONLY = {"cdpruner", "dycoke_decoding", "fastv", "framefusion", "holitom_inner", "prunevid_inner"}
DECODER_ONLY |= {"pyramiddrop", "streamingllm", "text_aware_merge"}


@models
def test_where_methods_act(name):
    """Those that go on a model without weights; they decide on values, so that none runs there."""
    model, depth = real(name), MODELS[name].layers
    model.set_attn_implementation("sdpa")
    before = anatomy(model)
    for method in [*list_methods(), *list_presets()]:
        layers = INNER.get(load(method).name, lambda depth: [])(depth)
        if name.startswith("qwen3") and layers and layers[0] < 3:
            with pytest.raises(ValueError, match=rf"{method} acts at decoder\[{layers[0]}\].*begin at layer 3"):
                compress(model, method)
            continue
        with compress(model, method) as handle:
            stages = handle.compression.stages(depth)
            assert [site.layer for site in stages if site.is_inner] == layers
            assert (Site.projector() in stages) == (load(method).name not in DECODER_ONLY)
            assert handle.active
    assert anatomy(model) == before


@models
def test_flops(monkeypatch, capsys, name):
    of = MODELS[name]
    t, h, w = grid = (PATCHES[0], PATCHES[1] // 2, PATCHES[2] // 2) if of.frame is None else of.grid(FRAMES)
    shape = ["--grid", f"{t}x{h}x{w}"] if of.frame is None else ["--frames", str(FRAMES)]
    arguments = ["--model", name, *shape, "--compression", "unified", "--json"]
    monkeypatch.setattr(sys, "argv", ["vidcompress", "flops", *arguments])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 0
    report = json.loads(capsys.readouterr().out)
    plain, short = report["results"]
    assert plain["grid"] == short["grid"] == list(grid)
    n, d, m, kv = math.prod(grid), of.hidden, of.intermediate, of.kv_heads * of.head_dim
    assert plain["flops"]["infomerge"] == of.layers * (n * (2 * d * d + 2 * d * kv) + 2 * n * n * d + 3 * n * d * m)
    assert plain["kv_bytes"] == of.layers * 4 * kv * n
    (layer,) = INNER["unified"](of.layers)
    entered = t * round(0.1 * h * w)
    assert short["sites"] == {"projector": entered, f"decoder[{layer}]": entered // 2}
    assert short["kv_bytes"] == 4 * kv * (layer * entered + (of.layers - layer) * (entered // 2))
    assert all(short["flops"][formula] < 0.2 * total for formula, total in plain["flops"].items())
