"""Leaves what models of the `llava` package keep and answer, for tests/test_llava_native.py in the other environment.

A folder for every model: its weights as the package saves them, `pixels.safetensors` with images and videos, and
`answers.json` and `logits.safetensors` with what came of every prompt under every compression.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from native import COMPRESSIONS, FRAMES, IMAGE, ONE, TWO, VIDEO, Prompt, Text, build, compress, generate, prompt
from safetensors.torch import save_file
from torch import nn
from transformers import SiglipVisionConfig, SiglipVisionModel

PROMPTS: dict[str, list[Text]] = {"videos": [ONE, TWO], "image": [[5, "I", 6, "V", 7, 8]]}
HEADED = ("infomerge", "fastvid official")
"""Compressions that are also tried with a SigLIP head."""

SIGLIP = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size")


def save(model: nn.Module, folder: Path) -> None:
    """As a published checkpoint, but for the tower's config and pooling head, which lie beside it."""
    model.save_pretrained(folder)
    tower = {**model.get_vision_tower().config.to_dict(), "num_hidden_layers": 4}
    torch.manual_seed(1)
    siglip = SiglipVisionModel(SiglipVisionConfig(**{key: tower[key] for key in SIGLIP}))
    for parameter in siglip.parameters():
        parameter.data = 0.3 * torch.randn(parameter.shape)
    siglip.save_pretrained(folder / "tiny-siglip")
    config = json.loads((folder / "config.json").read_text())
    config["mm_vision_tower"] = str(folder / "tiny-siglip")
    (folder / "config.json").write_text(json.dumps(config))


def pixels(given: Prompt) -> dict[str, torch.Tensor]:
    """`pixel_values_videos` and `pixel_values` as transformers has them."""
    named = {"video": "pixel_values_videos", "image": "pixel_values"}
    found = {name: [x for x, kind in zip(given.images, given.kinds) if kind == own] for own, name in named.items()}
    return {name: torch.stack(each) for name, each in found.items() if each}


@pytest.mark.parametrize(
    "pool, newline, names, headed",
    [
        ("average", "grid", list(COMPRESSIONS), HEADED),
        ("average", "frame", ["hieravid", "infomerge and text_aware_merge"], ()),
        ("bilinear", "one_token", ["fastvid", "unified"], ("infomerge",)),
        ("max", "no_token", ["infomerge", "pyramiddrop"], ()),
    ],
)
def test_what_is_kept_is_left_for_comparison(pool, newline, names, headed, exchange):
    model = build(pool, newline, "eager", tokenizer_padding_side="left")
    folder = exchange / f"{pool}-{newline}"
    save(model, folder)
    cases = [("videos", name, COMPRESSIONS[name]) for name in names]
    cases += [("image", name, COMPRESSIONS[name]) for name in names if "text_aware_merge" in name]
    head = {"siglip_head": str(folder / "tiny-siglip")}
    cases += [("videos", f"{name}, with head", [each | head for each in COMPRESSIONS[name]]) for name in headed]
    prompts = {name: prompt(texts, "left", tiles=2) for name, texts in PROMPTS.items()}
    answers: list[dict[str, Any]] = []
    logits = {}
    for on, name, compression in cases:
        with compress(model, compression) as handle:
            got = generate(model, prompts[on], suppress_tokens=[IMAGE, VIDEO])
            told = handle.trace.last.to_dict()
        assert told["after"] < told["before"] and (told["head"] is not None) == name.endswith("with head")
        answers.append({"prompt": on, "name": name, "compression": compression, "trace": told})
        answers[-1]["tokens"] = got.sequences.tolist()
        logits[str(len(answers) - 1)] = torch.stack(got.logits, 1)
    given = {f"{on}.{name}": x for on, p in prompts.items() for name, x in pixels(p).items()}
    save_file(given, folder / "pixels.safetensors")
    save_file(logits, folder / "logits.safetensors")
    facts = {"frames": FRAMES, "prompts": PROMPTS, "answers": answers}
    (folder / "answers.json").write_text(json.dumps(facts))
