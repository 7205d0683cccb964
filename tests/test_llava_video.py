"""LLaVA-Video: pooling and newlines by hand, checkpoints as they were published, the real configs, the processor."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import IMAGE, ONE, TWO, VIDEO, compress, generate, step_logits
from tiny_llava_video import llava_video, original_name, save_original, tokenizer, video_inputs
from torch import Tensor
from torch.nn import functional
from transformers import AutoConfig, AutoModelForImageTextToText, CLIPVisionConfig, CLIPVisionModel

import vidcompress
from vidcompress import AutoProcessor, patches
from vidcompress.config import load
from vidcompress.costs import MODELS, Dimensions, dimensions
from vidcompress.method import list_methods
from vidcompress.models.llava_video import ORIGINAL_KEYS, LlavaVideoForConditionalGeneration
from vidcompress.models.llava_video_config import (
    NEWLINE_POSITIONS,
    POOL_MODES,
    LlavaVideoConfig,
    placeholders,
    pooled_side,
)
from vidcompress.models.llava_video_processor import LlavaVideoProcessor
from vidcompress.video import load_video, prepare_inputs

EVERY = [(pool, newline) for pool in POOL_MODES for newline in NEWLINE_POSITIONS]
SOME = [("average", "grid"), ("bilinear", "one_token"), ("max", "frame"), ("average", "no_token")]


@pytest.fixture(scope="module")
def model():
    """The one that is saved; not to be changed."""
    return llava_video()


@pytest.fixture(scope="module")
def checkpoint(model, tmp_path_factory):
    """As the `llava` package would have saved it."""
    return save_original(model, tmp_path_factory.mktemp("original"))


@pytest.fixture
def enabled():
    vidcompress.enable()
    yield
    vidcompress.disable()


def encoded(model: Any, pixels: Tensor) -> Tensor:
    """[videos, placeholders, C] of `get_video_features`; skips where this transformers cannot leave newlines away."""
    try:
        features = model.model.get_video_features(pixels, return_dict=True).pooler_output
    except ValueError as error:
        assert "'no_token' cannot be had" in str(error) and model.config.mm_newline_position == "no_token"
        pytest.skip(str(error))
    count = placeholders(pixels.shape[1], model.config.frame_side(), model.config.mm_newline_position)
    if features.shape[1] == count - 1:  # older transformers append the last newline later
        newline = model.model.image_newline.expand(len(pixels), 1, -1)
        features = torch.cat([features, newline], 1)
    return features


def same(a: Any, b: Any) -> bool:
    """Whether two models have the same tensors under the same names."""
    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


# -- pooling and newlines ----------------------------------------------------------------------------------------------
def pooled(x: list[list[float]], mode: str) -> list[list[float]]:
    """Rows of numbers pooled with stride 2, written out."""
    n = len(x)
    if mode != "bilinear":
        windows = [
            [[x[2 * i + a][2 * j + b] for a in (0, 1) for b in (0, 1)] for j in range(n // 2)] for i in range(n // 2)
        ]
        return [[sum(w) / 4 if mode == "average" else max(w) for w in row] for row in windows]
    m = (n + 1) // 2

    def weights(i: int) -> list[tuple[int, float]]:
        place = max(0.0, (i + 0.5) * n / m - 0.5)  # pixel centres, the border repeated
        low = min(int(place), n - 1)
        return [(low, 1 - (place - low)), (min(low + 1, n - 1), place - low)]

    return [[sum(x[a][b] * u * v for a, u in weights(i) for b, v in weights(j)) for j in range(m)] for i in range(m)]


@pytest.mark.parametrize(
    "mode, side",  # of a frame of one patch only bilinear pooling leaves anything
    [(mode, side) for mode in POOL_MODES for side in (1, 2, 4, 5, 27) if side > 1 or mode == "bilinear"],
)
def test_pooling(mode, side):
    model = llava_video(pool=mode)
    x = torch.randn(2, side * side, 3, generator=torch.Generator().manual_seed(side))
    expected = torch.tensor(
        [[pooled(frame[..., c].view(side, side).tolist(), mode) for c in range(3)] for frame in x]
    )  # [frames, channels, rows, columns]
    got = model.model.apply_pooling(x)
    assert got.shape == (2, pooled_side(side, mode) ** 2, 3)
    torch.testing.assert_close(got, expected.flatten(2).transpose(1, 2))


def with_newlines(tokens: list[Any], grid: tuple[int, int, int], position: str, newline: Any) -> list[Any]:
    """The tokens of a video with newlines between, written out."""
    t, h, w = grid
    places: list[Any] = []
    following = iter(tokens)
    for _ in range(t):
        for _ in range(h):
            places += [next(following) for _ in range(w)]
            if position == "grid":
                places.append(newline)
        if position == "frame":
            places.append(newline)
    return [*places, newline] if position == "one_token" else places


@pytest.mark.parametrize("pool, newline", EVERY)
def test_what_a_video_becomes(pool, newline):
    """The tower without its last norm, projector, pooling, newlines: one module after the other, without hooks."""
    model = llava_video(pool, newline, image_size=70)  # 5 x 5 patches
    base, videos, frames = model.model, 2, 3
    pixels = video_inputs(model, [TWO], frames)["pixel_values_videos"]
    side = 3 if pool == "bilinear" else 2
    got = encoded(model, pixels)
    with torch.no_grad():
        hidden = base.vision_tower.embeddings(pixels.flatten(0, 1))
        for layer in base.vision_tower.encoder.layers:
            output = layer(hidden, attention_mask=None)
            hidden = output if torch.is_tensor(output) else output[0]
        projector = base.multi_modal_projector
        hidden = projector.linear_2(functional.gelu(projector.linear_1(hidden)))
        x = hidden.unflatten(1, (5, 5)).permute(0, 3, 1, 2)
        x = {
            "average": lambda: functional.avg_pool2d(x, kernel_size=2, stride=2),
            "max": lambda: functional.max_pool2d(x, kernel_size=2, stride=2),
            "bilinear": lambda: functional.interpolate(x, size=(3, 3), mode="bilinear", align_corners=False),
        }[pool]()
        tokens = x.permute(0, 2, 3, 1).reshape(videos, frames * side * side, -1)
        expected = [with_newlines([*v], (frames, side, side), newline, base.image_newline) for v in tokens]
    torch.testing.assert_close(got, torch.stack([torch.stack(v) for v in expected]), atol=1e-5, rtol=1e-4)
    marks = torch.tensor(with_newlines([False] * tokens.shape[1], (frames, side, side), newline, True))
    assert len(marks) == placeholders(frames, side, newline)
    assert (got[:, marks] == base.image_newline).all()
    # And that is what the decoder gets in place of the placeholders.
    inputs = video_inputs(model, [TWO], frames)
    words = model.get_input_embeddings()(inputs["input_ids"])
    words = words.masked_scatter((inputs["input_ids"] == VIDEO)[..., None], got)
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, model(inputs_embeds=words, **mask(inputs)).logits)


def mask(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"attention_mask": inputs["attention_mask"]}


@pytest.mark.parametrize("image_size", [56, 70])
def test_one_newline_and_bilinear_pooling_is_llava_onevision(image_size):
    ours = llava_video("bilinear", "one_token", image_size=image_size)
    theirs = tiny.llava(image_size=image_size)
    assert same(ours, theirs)
    for texts in ([ONE], [TWO, [5, "I", 6, "V", 7]], [[5, "I", 6], [7, 8]]):
        inputs = tiny.llava_inputs(texts, image_size=image_size)
        with torch.no_grad():
            assert torch.equal(ours(**inputs).logits, theirs(**inputs).logits)
        assert torch.equal(generate(ours, inputs, 3).sequences, generate(theirs, inputs, 3).sequences)


def test_images_are_those_of_llava_onevision_whatever_videos_are():
    inputs = tiny.llava_inputs([[5, "I", 6, "I", 7]])
    with torch.no_grad():
        expected = tiny.llava()(**inputs).logits
        for pool, newline in SOME:
            assert torch.equal(llava_video(pool, newline)(**inputs).logits, expected)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"pool": "mean"}, "mm_spatial_pool_mode must be one of average, bilinear, max, got 'mean'"),
        ({"newline": "row"}, "mm_newline_position must be one of grid, frame, one_token, no_token, got 'row'"),
    ],
)
def test_settings_that_do_not_exist(settings, message):
    with pytest.raises(ValueError, match=message):
        llava_video(**settings)


# -- checkpoints as they were published --------------------------------------------------------------------------------
@pytest.mark.parametrize("pool, newline", SOME)
def test_loads_what_the_llava_package_saved(pool, newline, tmp_path):
    saved = llava_video(pool, newline)
    folder = save_original(saved, tmp_path / "original")
    names = {name for file in folder.glob("model*.safetensors") for name in load_file(file)}
    assert "model.vision_tower.vision_tower.vision_model.embeddings.patch_embedding.weight" in names
    assert {"model.layers.5.mlp.up_proj.weight", "model.mm_projector.2.bias", "model.image_newline"} <= names
    assert len(list(folder.glob("model*.safetensors"))) == 3
    model = vidcompress.from_pretrained(folder)
    assert type(model) is LlavaVideoForConditionalGeneration and not model.training
    assert same(model, saved)
    assert (model.config.mm_spatial_pool_mode, model.config.mm_newline_position) == (pool, newline)
    assert (model.config.model_type, model.config.image_token_id, model.config.video_token_id) == (
        "llava_video",
        IMAGE,
        VIDEO,
    )
    assert model.generation_config.eos_token_id == [1, 3] and model.generation_config.pad_token_id == 0
    assert vidcompress.handle_of(model) is None
    if newline != "no_token":  # which older transformers do not have
        inputs = video_inputs(saved, [TWO, [5, "I", 7]], frames=3)
        with torch.no_grad():
            assert torch.equal(model(**inputs).logits, saved(**inputs).logits)


def doors() -> dict[str, Any]:
    """Every way to a compressed model."""
    return {
        "vidcompress": vidcompress.from_pretrained,
        "changed import": vidcompress.AutoModelForImageTextToText.from_pretrained,
        "enabled": AutoModelForImageTextToText.from_pretrained,
        "class": LlavaVideoForConditionalGeneration.from_pretrained,
    }


@pytest.mark.parametrize("door", doors())
def test_every_door(door, checkpoint, model, enabled):
    assert type(AutoConfig.from_pretrained(checkpoint)) is LlavaVideoConfig
    settings = {"method": "infomerge", "dyseg_c": 2}
    with tiny.without_head():
        opened = doors()[door](checkpoint, compression=settings, retention_ratio=0.5, attn_implementation="eager")
    assert opened.config._attn_implementation == "eager"
    handle = vidcompress.handle_of(opened)
    inputs = video_inputs(model, [ONE])
    generate(opened, inputs, 2)
    assert (handle.trace.last.before, handle.trace.last.after) == (24, 12)
    handle.remove()
    assert same(opened, model)
    plain, info = doors()[door](checkpoint, output_loading_info=True)
    assert vidcompress.handle_of(plain) is None and same(plain, model)
    assert not info["missing_keys"] and not info["unexpected_keys"]


def test_dtypes(checkpoint, model, tmp_path):
    assert vidcompress.from_pretrained(checkpoint).dtype == torch.float32
    half = vidcompress.from_pretrained(checkpoint, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert torch.equal(half.lm_head.weight, model.lm_head.weight.bfloat16())
    said = save_original(llava_video().bfloat16(), tmp_path, torch_dtype="bfloat16")
    assert vidcompress.from_pretrained(said).dtype == torch.bfloat16


def test_other_pooling_and_newlines_than_the_checkpoint_says(checkpoint, model):
    other = {"mm_spatial_pool_mode": "max", "mm_newline_position": "frame"}
    changed = vidcompress.from_pretrained(checkpoint, compression="random", retention_ratio=1.0, **other)
    like = llava_video("max", "frame")
    inputs = video_inputs(like, [ONE])
    with torch.no_grad():
        assert torch.equal(changed(**inputs).logits, like(**inputs).logits)
        assert not torch.equal(like.model.apply_pooling(torch.randn(1, 16, 3)), torch.zeros(1, 4, 3))
    processor = AutoProcessor.from_pretrained(checkpoint, **other)
    assert (processor.mm_spatial_pool_mode, processor.mm_newline_position) == ("max", "frame")
    assert processor.video_tokens(6) == int((inputs["input_ids"] == VIDEO).sum())


@pytest.mark.parametrize("saved", [False, True], ids=["as published", "saved again"])
@pytest.mark.parametrize("what", [vidcompress.from_pretrained, AutoProcessor.from_pretrained])
def test_an_unknown_keyword_value_is_refused_at_loading(what, saved, checkpoint, again):
    folder = again if saved else checkpoint
    with pytest.raises(ValueError, match=r"mm_newline_position must be one of grid, frame, .*, got 'row'"):
        what(folder, mm_newline_position="row")
    with pytest.raises(ValueError, match=r"mm_spatial_pool_mode must be one of average, .*, got 'mean'"):
        what(folder, mm_spatial_pool_mode="mean")


@pytest.fixture(scope="module")
def again(checkpoint, tmp_path_factory):
    """What was loaded, saved by transformers."""
    folder = tmp_path_factory.mktemp("again")
    vidcompress.from_pretrained(checkpoint).save_pretrained(folder)
    AutoProcessor.from_pretrained(checkpoint).save_pretrained(folder)
    return folder


def test_saved_again_it_is_a_transformers_model(again, checkpoint, model):
    names = {name for file in again.glob("*.safetensors") for name in safe_open(file, "pt").keys()}
    assert not names & {original_name(name) for name in names if original_name(name) != name}
    assert names == set(model.state_dict())
    config = json.loads((again / "config.json").read_text())
    assert config["model_type"] == "llava_video" and config["architectures"] == ["LlavaVideoForConditionalGeneration"]
    assert config["mm_newline_position"] == "grid" and config["mm_spatial_pool_mode"] == "average"
    for folder in (again, str(again)):
        loaded = AutoModelForImageTextToText.from_pretrained(folder)
        assert type(loaded) is LlavaVideoForConditionalGeneration and same(loaded, model)
        assert loaded.generation_config.eos_token_id == [1, 3]
    before, after = (AutoProcessor.from_pretrained(folder) for folder in (checkpoint, again))
    assert type(after) is LlavaVideoProcessor
    frames = np.random.default_rng(0).integers(0, 256, (3, 40, 60, 3), dtype=np.uint8)
    text = before.apply_chat_template(conversation("w20 w21"), add_generation_prompt=True)
    assert text == after.apply_chat_template(conversation("w20 w21"), add_generation_prompt=True)
    call = {"text": [text], "videos": [frames], "do_sample_frames": False, "return_tensors": "pt"}
    expected, got = before(**call), after(**call)
    assert expected.keys() == got.keys() and all(torch.equal(expected[key], got[key]) for key in expected)


def test_a_compressed_model_saves_nothing_of_it(checkpoint, again, tmp_path):
    compressed = vidcompress.from_pretrained(checkpoint, compression="random")
    compressed.save_pretrained(tmp_path)
    for name in ("config.json", "generation_config.json", "model.safetensors"):
        assert (tmp_path / name).read_bytes() == (again / name).read_bytes()


@pytest.mark.parametrize("drop", ["lm_head", ""], ids=["without a head", "with one"])
def test_tied_embeddings(drop, tmp_path):
    """As the 0.5B models have them."""
    saved = llava_video()
    saved.lm_head.weight.data = saved.get_input_embeddings().weight.data.clone()
    folder = save_original(saved, tmp_path / "original", drop=drop, tie_word_embeddings=True)
    inputs = video_inputs(saved, [ONE])
    vidcompress.from_pretrained(folder).save_pretrained(tmp_path / "again")
    for where in (folder, tmp_path / "again"):
        model = vidcompress.from_pretrained(where)
        assert model.lm_head.weight is model.get_input_embeddings().weight
        with torch.no_grad():
            assert torch.equal(model(**inputs).logits, saved(**inputs).logits)


def changed(folder: Path, add: dict[str, Tensor]) -> Path:
    """The checkpoint with more tensors in its first shard."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    first = folder / min(index["weight_map"].values())
    save_file(load_file(first) | add, first, {"format": "pt"})
    index["weight_map"] |= dict.fromkeys(add, first.name)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


TOWER = "model.vision_tower.vision_tower.vision_model."


def test_the_towers_pooling_head_is_no_surplus(model, tmp_path):
    add = {f"{TOWER}head.probe": torch.zeros(1, 1, 32), f"{TOWER}head.mlp.fc1.bias": torch.zeros(48)}
    assert same(vidcompress.from_pretrained(changed(save_original(model, tmp_path), add)), model)


def test_missing_and_surplus_tensors_are_listed(model, tmp_path):
    folder = save_original(model, tmp_path, drop="linear_1")
    changed(folder, {f"{TOWER}encoder.layers.3.layer_norm1.bias": torch.zeros(32), "model.extra": torch.zeros(1)})
    with pytest.raises(ValueError) as caught:
        vidcompress.from_pretrained(folder)
    missing, surplus = str(caught.value).split("unexpected: ")
    assert str(folder) in missing and "is no complete llava_video" in missing
    for kind in ("bias", "weight"):
        assert f"model.multi_modal_projector.linear_1.{kind}" in missing
    assert set(surplus.split(", ")) == {"model.extra", "model.vision_tower.encoder.layers.3.layer_norm1.bias"}


@pytest.mark.parametrize(
    "key, value, accepted",
    [
        ("mm_newline_position", "row", "one of grid, frame, one_token, no_token"),
        ("mm_spatial_pool_mode", "mean", "one of average, bilinear, max"),
        ("mm_spatial_pool_stride", 4, "2"),
        ("mm_projector_type", "linear", "'mlp2x_gelu'"),
        ("mm_resampler_type", "spatial_pool", "None"),
        ("mm_patch_merge_type", "flat", "'spatial_unpad'"),
        ("add_faster_video", True, "False"),
        ("mm_vision_tower", "openai/clip-vit-large-patch14-336", "SigLIP"),
        ("mm_vision_tower", None, "SigLIP"),
    ],
)
def test_other_layouts_are_refused(key, value, accepted, checkpoint, tmp_path, enabled):
    config = json.loads((checkpoint / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {key: value}))
    for load_it in (
        vidcompress.from_pretrained,
        AutoConfig.from_pretrained,
        AutoModelForImageTextToText.from_pretrained,
    ):
        with pytest.raises(ValueError) as caught:
            load_it(tmp_path)
        assert repr(value) in str(caught.value) and accepted in str(caught.value)
        assert key in str(caught.value) or "vision tower" in str(caught.value)


def test_a_tower_that_only_its_config_betrays(checkpoint, tmp_path):
    tower = CLIPVisionConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4)
    CLIPVisionModel(tower).save_pretrained(tmp_path / "not-a-siglip")
    config = json.loads((checkpoint / "config.json").read_text())
    name = str(tmp_path / "not-a-siglip")
    (tmp_path / "config.json").write_text(json.dumps(config | {"mm_vision_tower": name}))
    with pytest.raises(ValueError, match=r"not-a-siglip' is a clip_vision_model; only SigLIP"):
        vidcompress.from_pretrained(tmp_path)


def test_a_tokenizer_without_room_for_the_placeholders(model, tmp_path):
    folder = save_original(model, tmp_path)
    grown = tokenizer()
    grown.add_tokens(["one", "too many"])
    grown.save_pretrained(folder)
    with pytest.raises(ValueError, match=r"gives <image> and <video> the ids \[192, 193\], .* expects \[190, 191\]"):
        AutoProcessor.from_pretrained(folder)


def test_what_has_no_processor_and_is_no_llava_video_fails_as_in_transformers(tmp_path):
    tiny.llava().save_pretrained(tmp_path)
    with pytest.raises(OSError):
        LlavaVideoProcessor.from_pretrained(tmp_path)


LOADING = """
import re, sys
sys.path.insert(0, sys.argv[1])
import conftest
import vidcompress
peak = lambda: 1024 * int(re.search(r"VmHWM:\\s*(\\d+) kB", open("/proc/self/status").read())[1])
vidcompress.from_pretrained(sys.argv[2])
before = peak()
model = vidcompress.from_pretrained(sys.argv[3])
assert all(p.isfinite().all() for p in model.parameters())
print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="asks Linux for the peak of a process's memory")
def test_loading_takes_the_models_memory_once(checkpoint, tmp_path):
    """The model and at most one shard; whoever reads all shards first, or fills a model that exists, needs it twice."""
    large = llava_video(hidden_size=640, intermediate_size=2048, num_attention_heads=8, layers=5)
    save_original(large, tmp_path, shards=7)
    size = sum(p.nbytes for p in large.parameters())
    shard = max(file.stat().st_size for file in tmp_path.glob("model*.safetensors"))
    assert shard < size / 3
    arguments = [sys.executable, "-c", LOADING, str(Path(__file__).parent), str(checkpoint), str(tmp_path)]
    run = subprocess.run(arguments, capture_output=True, text=True, check=True)
    assert 0.8 * size < int(run.stdout.split()[-1]) < 1.7 * size


# -- the real models ---------------------------------------------------------------------------------------------------
def published(hidden: int, intermediate: int, layers: int, heads: int, kv: int, vocabulary: int, **more: Any) -> Any:
    """A config.json as the checkpoints have it."""
    return {
        "architectures": ["LlavaQwenForCausalLM"],
        "add_faster_video": False,
        "add_time_instruction": False,
        "attention_dropout": 0.0,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "faster_token_stride": 10,
        "force_sample": False,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "ignore_index": -100,
        "image_aspect_ratio": "anyres_max_9",
        "image_crop_resolution": None,
        "image_grid_pinpoints": [[384 * i, 384 * j] for i in range(1, 7) for j in range(1, 7)],
        "image_split_resolution": None,
        "image_token_index": 151646,
        "initializer_range": 0.02,
        "intermediate_size": intermediate,
        "max_position_embeddings": 32768,
        "max_window_layers": layers,
        "mm_hidden_size": 1152,
        "mm_newline_position": "grid",
        "mm_patch_merge_type": "spatial_unpad",
        "mm_projector_type": "mlp2x_gelu",
        "mm_resampler_type": None,
        "mm_spatial_pool_mode": "average",
        "mm_spatial_pool_stride": 2,
        "mm_tunable_parts": "mm_vision_tower,mm_mlp_adapter,mm_language_model",
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2,
        "mm_vision_tower": "google/siglip-so400m-patch14-384",
        "model_type": "llava_qwen",
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": kv,
        "projector_hidden_act": "gelu",
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 1000000.0,
        "sliding_window": 32768,
        "tie_word_embeddings": False,
        "tokenizer_model_max_length": 32768,
        "tokenizer_padding_side": "right",
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "use_mm_proj": True,
        "use_sliding_window": False,
        "vocab_size": vocabulary,
        **more,
    }


REAL = {
    "llava-onevision-0.5b": published(
        896, 4864, 24, 14, 2, 151936, tie_word_embeddings=True, mm_newline_position="one_token",
        mm_spatial_pool_mode="bilinear",
    ),
    "llava-video-7b": published(3584, 18944, 28, 28, 4, 152064),
    "llava-video-72b": published(8192, 29568, 80, 64, 8, 152064),
}  # fmt: skip


def tensors(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a published checkpoint's tensors, by formula."""
    d, m, v = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    kv = config["num_key_value_heads"] * d // config["num_attention_heads"]
    c, f, patches, size = 1152, 4304, 27 * 27, 14
    both = lambda name, *shape: {f"{name}.weight": shape, f"{name}.bias": shape[:1]}  # noqa: E731
    found: dict[str, tuple[int, ...]] = {"model.image_newline": (d,), "model.norm.weight": (d,)}
    found |= {"model.embed_tokens.weight": (v, d)}
    if not config["tie_word_embeddings"]:
        found |= {"lm_head.weight": (v, d)}
    found |= both("model.mm_projector.0", d, c) | both("model.mm_projector.2", d, d)
    found |= both(f"{TOWER}embeddings.patch_embedding", c, 3, size, size) | both(f"{TOWER}post_layernorm", c)
    found |= {f"{TOWER}embeddings.position_embedding.weight": (patches, c)}
    for i in range(26):
        layer = f"{TOWER}encoder.layers.{i}."
        for name in ("self_attn.k_proj", "self_attn.v_proj", "self_attn.q_proj", "self_attn.out_proj"):
            found |= both(layer + name, c, c)
        found |= both(f"{layer}layer_norm1", c) | both(f"{layer}layer_norm2", c)
        found |= both(f"{layer}mlp.fc1", f, c) | both(f"{layer}mlp.fc2", c, f)
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        found |= both(f"{layer}self_attn.q_proj", d, d)
        found |= both(f"{layer}self_attn.k_proj", kv, d) | both(f"{layer}self_attn.v_proj", kv, d)
        shapes = {"self_attn.o_proj": (d, d), "mlp.gate_proj": (m, d), "mlp.up_proj": (m, d), "mlp.down_proj": (d, m)}
        shapes |= {"input_layernorm": (d,), "post_attention_layernorm": (d,)}
        found |= {f"{layer}{name}.weight": shape for name, shape in shapes.items()}
    return found


@pytest.fixture(scope="module", params=REAL)
def real(request, tmp_path_factory):
    """Name, published config, and the model on the meta device."""
    folder = tmp_path_factory.mktemp("real")
    (folder / "config.json").write_text(json.dumps(REAL[request.param]))
    vidcompress.models.register()
    config = AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    return request.param, REAL[request.param], model, folder


def test_every_tensor_of_the_real_models(real):
    _, config, model, _ = real
    expected = {}
    for name, shape in tensors(config).items():
        for pattern, replacement in ORIGINAL_KEYS.items():
            name = re.sub(pattern, replacement, name)
        expected[name] = shape
    got = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    if config["tie_word_embeddings"]:
        assert model.config.tie_word_embeddings
        assert got.pop("lm_head.weight") == got["model.language_model.embed_tokens.weight"]
    assert got == expected
    assert len(expected) == 26 * 16 + 5 + 4 + 3 + 12 * config["num_hidden_layers"] + ("lm_head.weight" in expected)


def test_what_the_real_configs_become(real):
    name, config, model, folder = real
    text = model.config.text_config
    assert text.rope_parameters["rope_theta"] == 1e6 and text.max_position_embeddings == 32768
    assert (text.eos_token_id, text.bos_token_id, text.rms_norm_eps) == (151645, 151643, 1e-6)
    assert set(text.layer_types) == {"full_attention"}
    assert (model.config.image_token_id, model.config.video_token_id) == (151646, 151647)
    assert model.config.vision_feature_layer == -1 and model.config.vision_feature_select_strategy == "full"
    assert model.config.vision_aspect_ratio == "anyres_max_9"
    assert model.config.image_grid_pinpoints == config["image_grid_pinpoints"]
    assert str(model.config.dtype).removeprefix("torch.") == "bfloat16"
    known, found = MODELS[name], Dimensions.of(model.config)
    assert found == dimensions(folder)
    for field in ("layers", "hidden", "intermediate", "heads", "kv_heads", "head_dim", "frame"):
        assert getattr(found, field) == getattr(known, field)


@pytest.mark.parametrize(
    "pool, newline, side, each",
    [
        ("average", "grid", 13, 182),
        ("bilinear", "grid", 14, 210),
        ("max", "frame", 13, 170),
        ("average", "no_token", 13, 169),
        ("bilinear", "one_token", 14, 196),
    ],
)
def test_places_of_a_real_video(pool, newline, side, each):
    config = LlavaVideoConfig(
        text_config={"model_type": "qwen2", "num_hidden_layers": 1},
        vision_config={"model_type": "siglip_vision_model", "num_hidden_layers": 1, "hidden_size": 1152,
                       "intermediate_size": 4304, "num_attention_heads": 16, "image_size": 384, "patch_size": 14},
        mm_spatial_pool_mode=pool,
        mm_newline_position=newline,
    )  # fmt: skip
    with torch.device("meta"):
        model = LlavaVideoForConditionalGeneration(config)
    frames, videos = 64, 2
    pixels = torch.empty(videos, frames, 3, 384, 384, device="meta")
    patch = patches.find(config)
    last = newline == "one_token"
    found = patch.encoded(model, {"pixel_values_videos": pixels}, {})
    assert [v.grid for v in found] == [(frames, side, side)] * videos
    assert [v.placeholders for v in found] == [frames * each + last] * videos
    assert [v.newlines for v in found] == [frames * (each - side * side) + last] * videos
    assert patch.frame_grid(config) == (side, side)
    assert patch.default_head(model) == "google/siglip-so400m-patch14-384"
    assert encoded(model, pixels[:, :2].contiguous()).shape == (videos, 2 * each + last, config.text_config.hidden_size)


@pytest.mark.filterwarnings("ignore:.*falls back")
def test_every_method_fits_the_real_models(real):
    _, config, model, _ = real
    depth = config["num_hidden_layers"]
    before = set(model.__dict__), set(model.model.__dict__)
    for name in list_methods():
        pipeline = vidcompress.method.Pipeline.of(load(name))
        sites = [*pipeline.stages(depth), *pipeline.evictions(depth)]
        assert sites and all(site.layer < depth for site in sites)
        with vidcompress.apply(model, name) as handle:
            assert handle.compression.name == name
    assert (set(model.__dict__), set(model.model.__dict__)) == before


# -- the processor -----------------------------------------------------------------------------------------------------
def conversation(question: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": question}]}]


def test_the_prompt_is_the_one_they_were_trained_on(checkpoint):
    """Conversation qwen_1_5 of the `llava` package, written out."""
    processor = AutoProcessor.from_pretrained(checkpoint)
    system = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    asked = "<|im_start|>user\n<video>\nWhat is this?<|im_end|>\n"
    said = "<|im_start|>assistant\n"
    template = processor.apply_chat_template
    turns = conversation("What is this?")
    assert template(turns, add_generation_prompt=True) == system + asked + said
    assert template(turns) == system + asked
    turns += [{"role": "assistant", "content": [{"type": "text", "text": "A cat."}]}]
    picture = [{"type": "image"}, {"type": "text", "text": "And this?"}]
    turns += [{"role": "user", "content": picture}]
    whole = system + asked + said + "A cat.<|im_end|>\n<|im_start|>user\n<image>\nAnd this?<|im_end|>\n" + said
    assert template(turns, add_generation_prompt=True) == whole
    own = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    brief = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n"
    assert template(own, add_generation_prompt=True) == brief + said


@pytest.mark.parametrize("image_size", [56, 70])
@pytest.mark.parametrize("pool, newline", EVERY)
def test_placeholders_are_as_many_as_the_model_fills(pool, newline, image_size):
    model = llava_video(pool, newline, image_size=image_size)
    processor = LlavaVideoProcessor.of(model.config, tokenizer())
    grid = {56: 4, 70: 9 if pool == "bilinear" else 4}[image_size]
    side = math.isqrt(grid)
    clips = [np.random.default_rng(t).integers(0, 256, (t, 40, 60, 3), dtype=np.uint8) for t in (1, 5)]
    inputs = processor(text=["w5 <video> w6", "<video> w7"], videos=clips, do_sample_frames=False, padding=True)
    counts = [row.count(VIDEO) for row in inputs["input_ids"]]
    each = {"grid": grid + side, "frame": grid + 1, "one_token": grid, "no_token": grid}[newline]
    assert counts == [each + (newline == "one_token"), 5 * each + (newline == "one_token")]
    sizes = processor._get_num_multimodal_tokens(video_sizes=[(1, 40, 60), (5, 40, 60)])
    assert list(sizes["num_video_tokens"]) == counts
    assert counts == [encoded(model, torch.zeros(1, t, 3, image_size, image_size)).shape[1] for t in (1, 5)]


def test_the_processor_may_be_the_first_that_is_loaded(checkpoint):
    """In a fresh interpreter: this module has loaded models, after which transformers' own class knows it."""
    script = f"""
import vidcompress
from vidcompress.compat import ensure_torchvision

ensure_torchvision()
import transformers

tokenizer = transformers.AutoProcessor.from_pretrained({str(checkpoint)!r})
try:
    vidcompress.prepare_inputs(tokenizer, [], "w5")
except TypeError as error:
    print(error)
print(type(vidcompress.AutoProcessor.from_pretrained({str(checkpoint)!r})).__name__)
"""
    said = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert "is a tokenizer, which cannot read videos" in said and "vidcompress.AutoProcessor knows" in said
    assert said.splitlines()[-1] == "LlavaVideoProcessor"


def test_pixels_are_those_siglip_was_trained_on(checkpoint):
    processor = AutoProcessor.from_pretrained(checkpoint)
    frame = np.random.default_rng(0).integers(0, 256, (1, 56, 56, 3), dtype=np.uint8)  # of the tower's own size
    call = {"do_sample_frames": False, "return_tensors": "pt"}
    got = processor(text=["<video>"], videos=[frame], **call)["pixel_values_videos"][0]
    expected = torch.from_numpy(frame).permute(0, 3, 1, 2) / 255 * 2 - 1
    torch.testing.assert_close(got.float(), expected)


def test_images_take_the_places_that_the_model_fills(checkpoint):
    processor = AutoProcessor.from_pretrained(checkpoint)
    model = vidcompress.from_pretrained(checkpoint)
    picture = np.random.default_rng(0).integers(0, 256, (56, 112, 3), dtype=np.uint8)
    inputs = processor(text=["w5 <image> w6"], images=[picture], return_tensors="pt")
    features = model.model.get_image_features(inputs["pixel_values"], inputs["image_sizes"], return_dict=True)
    assert int((inputs["input_ids"] == IMAGE).sum()) == len(features.pooler_output[0])
    assert model(**inputs).logits.isfinite().all()


@pytest.fixture(scope="module")
def frames():
    return np.random.default_rng(3).integers(0, 256, (9, 40, 60, 3), dtype=np.uint8)


def test_from_frames_to_an_answer(checkpoint, frames):
    model = vidcompress.from_pretrained(checkpoint)
    processor = AutoProcessor.from_pretrained(checkpoint)
    inputs = prepare_inputs(processor, load_video(frames, num_frames=7), "w20 w21 w22")
    with compress(model, "infomerge", retention_ratio=0.5, dyseg_c=2) as handle:
        output = generate(model, inputs, 5)
        prompt = handle.trace.last
        assert (prompt.before, prompt.after) == (7 * 4, 7 * 4 // 2)
        assert prompt.length_before == inputs["input_ids"].shape[1] == output.sequences.shape[1] - 5
        assert 0 < prompt.steps[0].newlines <= 7 * 2
        assert prompt.length_after == prompt.length_before - 14 - (7 * 2 - prompt.steps[0].newlines)
    assert processor.batch_decode(output.sequences[:, -5:])[0]
    assert not torch.equal(step_logits(generate(model, inputs, 5)), step_logits(output))


@pytest.mark.parametrize("folder", ["checkpoint", "again"])
def test_the_pipeline_of_transformers(folder, enabled, frames, request):
    folder = request.getfixturevalue(folder)
    video = load_video(frames, num_frames=6)
    part = {"type": "video", "video": video.frames}
    message = [{"role": "user", "content": [part, {"type": "text", "text": "w20"}]}]
    options = {
        "generate_kwargs": {"max_new_tokens": 3, "do_sample": False, "suppress_tokens": [IMAGE, VIDEO]},
        "processor_kwargs": {"do_sample_frames": False, "video_metadata": [video.metadata()]},
    }
    pipe = transformers.pipeline(
        "image-text-to-text", model=str(folder), model_kwargs={"compression": "random", "retention_ratio": 0.25}
    )
    answer = pipe(text=message, **options)
    assert answer[0]["generated_text"][-1]["role"] == "assistant"
    assert vidcompress.handle_of(pipe.model).trace.last.after == 6
