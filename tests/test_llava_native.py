"""LLaVA-Video in the authors' package and in `vidcompress.models` keeps the same tokens of the same videos.

The package needs an older transformers: tests/llava_native runs it in an environment of its own and leaves a folder
with its weights, its inputs and what it kept, of which `scripts/test_llava_native.sh` tells this file.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from tiny import compress, generate, new_tokens, step_logits
from tiny_llava_video import video_inputs
from torch import nn

import vidcompress

EXCHANGE = os.environ.get("VIDCOMPRESS_LLAVA_NATIVE")
FOLDERS = sorted(path.parent for path in Path(EXCHANGE).glob("*/answers.json")) if EXCHANGE else []

TOLERANCE = {"atol": 1e-4, "rtol": 1e-3}


def compare(mine: dict[str, Any], theirs: dict[str, Any]) -> None:
    """Two traces of one prompt: the same tokens kept at every site, and merged with the same weights."""
    for fact in ("before", "after", "length_before", "length_after", "layer_lengths"):
        assert mine[fact] == theirs[fact], fact
    assert len(mine["steps"]) == len(theirs["steps"]) > 0
    for own, other in zip(mine["steps"], theirs["steps"]):
        for fact in ("row", "video", "site", "method", "grid", "before", "after", "newlines", "keep"):
            assert own[fact] == other[fact], (own["site"], fact)
        assert (own["merge"] is None) == (other["merge"] is None)
        if own["merge"] is not None:
            assert own["merge"]["slot"] == other["merge"]["slot"]
            assert own["merge"]["source"] == other["merge"]["source"]
            assert own["merge"]["weight"] == pytest.approx(other["merge"]["weight"], abs=1e-4)


@pytest.mark.skipif(
    EXCHANGE is None,
    reason="the llava package needs an environment of its own: scripts/test_llava_native.sh PATH_TO_LLAVA_NEXT",
)
@pytest.mark.parametrize("folder", FOLDERS or [None], ids=lambda folder: folder and folder.name)
def test_the_same_is_kept_as_in_the_llava_package(folder):
    assert folder is not None, f"nothing was left in {EXCHANGE}"
    model = vidcompress.from_pretrained(folder, attn_implementation="eager")
    model.generation_config.eos_token_id = None
    facts = json.loads((folder / "answers.json").read_text())
    pixels, logits = (load_file(folder / f"{name}.safetensors") for name in ("pixels", "logits"))
    assert facts["answers"]
    for i, theirs in enumerate(facts["answers"]):
        on = theirs["prompt"]
        inputs = video_inputs(model, facts["prompts"][on], facts["frames"])
        given = {name.removeprefix(f"{on}."): x for name, x in pixels.items() if name.startswith(f"{on}.")}
        assert given.keys() == {name for name in inputs if name.startswith("pixel")}
        inputs |= given
        with compress(model, theirs["compression"]) as handle:
            mine = generate(model, inputs, len(theirs["tokens"][0]))
            compare(handle.trace.last.to_dict(), theirs["trace"])
        assert new_tokens(mine, inputs).tolist() == theirs["tokens"]
        torch.testing.assert_close(step_logits(mine), logits[str(i)], **TOLERANCE)


def test_a_model_of_the_package_under_this_transformers():
    model = nn.Linear(1, 1)
    model.config = SimpleNamespace(model_type="llava_qwen")
    with pytest.raises(ValueError, match=rf"need transformers 4\.48 or 4\.49 here, this is {transformers.__version__}"):
        vidcompress.apply(model, "random")
