"""Every method on every backbone: what is kept, what every layer stores, and that the answer is the oracle's.

Tried for all pairs, on sdpa and eager, with one prompt of two videos; other tests go into the depth of a few. Methods,
presets and backbones are those that the library finds, so that a new one is tested, or missed, here at once.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import oracle
import oracle_decoding
import oracle_qwen
import pytest
import torch
import transformers
from tiny import FRAMES, HIDDEN, PAD, TWO, VIDEO, anatomy, compress, generate, llava, llava_inputs, randomise
from tiny_llava_video import llava_video, video_inputs
from tiny_next_video import next_inputs, next_video
from tiny_qwen import GRIDS, qwen, qwen_inputs, tokens
from torch import Tensor
from torch.nn import functional

import vidcompress
from vidcompress import list_methods, patches
from vidcompress.config import list_presets, load, shipped
from vidcompress.costs import MODELS, Dimensions, kv_cache_bytes, measured_kv_bytes
from vidcompress.method import Pipeline
from vidcompress.methods.fastvid import VARIANTS
from vidcompress.models.llava_video_config import NEWLINE_POSITIONS
from vidcompress.trace import Step

DEPTH = 6
RATIO = 0.5
ELSEWHERE = {"llava_qwen": "its package needs another transformers, and has tests of its own (tests/llava_native)"}

Grid = tuple[int, int, int]


# -- methods -----------------------------------------------------------------------------------------------------------
SMALL: dict[str, dict[str, Any]] = {
    "fastvid": {"dyseg_c": 2, "context_share": 0.5},
    "infomerge": {"dyseg_c": 2},
}
"""Few segments, and enough tokens a frame for both kinds of survivors: salient ones and anchors."""


METHODS: dict[str, Any] = {
    name: {"method": name, "retention_ratio": RATIO} | SMALL.get(name, {}) for name in list_methods()
}
WAYS: dict[str, Any] = METHODS | {
    "fastvid, official": METHODS["fastvid"] | {"official": True},
    "infomerge and text_aware_merge": [METHODS["infomerge"], METHODS["text_aware_merge"]],
}


def numbers() -> dict[str, Any]:
    """Named presets, and rows of presets that another ratio would not pick: what differs in numbers only."""
    found: dict[str, Any] = {name: {"method": name} for name in list_presets()}
    for name, settings in METHODS.items():
        used = load(settings).settings()
        for ratio, row in (shipped(name).get("presets") or {}).items():
            if any(used[key] != value for key, value in row.items()):
                found[f"{name}, row {ratio}"] = settings | row
    return found


NUMBERS = numbers() | {"fastv, layer 3": METHODS["fastv"] | {"layer": 3}}
COMPRESSIONS = WAYS | NUMBERS


@functools.cache
def chosen(name: str) -> Pipeline:
    """One of `COMPRESSIONS`."""
    return Pipeline.of(load(COMPRESSIONS[name]))


def keeping_all(pipeline: Pipeline) -> Pipeline:
    """The same methods, told to remove nothing."""
    ratios = ("retention_ratio", "keep_ratio", "first", "q")
    return Pipeline(
        dataclasses.replace(method, **{r: 1.0 for r in ratios if hasattr(method, r)}) for method in pipeline
    )


# -- backbones ---------------------------------------------------------------------------------------------------------
@dataclasses.dataclass(frozen=True)
class Backbone:
    """A kind of tiny model.

    Attributes:
        build: (attention implementation, decoder layers) -> model.
        ask: model -> a prompt with two videos in one row.
        videos: (t, h, w) of their tokens.
        read: how the oracle reads the prompt; None for its own way.
        line: tokens that a newline follows, each time; 0 if none does.
        deepstack: first decoder layers, where a method cannot act.
        depth: decoder layers in the matrix.
    """

    build: Callable[[str, int], Any]
    ask: Callable[[Any], dict[str, Tensor]]
    videos: Sequence[Grid]
    read: Callable[..., oracle.Said] | None = None
    line: int = 0
    deepstack: int = 0
    depth: int = DEPTH

    def places(self, index: Tensor) -> int:
        """How many tokens a video takes of which these [M] are left: newlines stay with their lines."""
        return len(index) + (len((index // self.line).unique()) if self.line else 0)

    def refusal(self, pipeline: Pipeline, kind: str) -> str | None:
        """What is said of a pipeline that cannot run on models of this `model_type`; None if it can."""
        for method in pipeline:
            if getattr(method, "official", False) and kind not in VARIANTS:
                return f"no official code for '{kind}'"
        for site, method in pipeline.stages(self.depth).items():
            if 0 <= site.layer < self.deepstack:
                where = rf"decoder\[{site.layer}\]"
                return rf"{method.name} acts at {where}.*\(deepstack\).* begin at layer {self.deepstack}"
        return None


def qwen_of(kind: str, deepstack: int, attn: str, layers: int) -> Any:
    """`tiny_qwen.qwen` of another depth."""
    smaller = qwen(kind)
    config = smaller.config
    config.text_config.num_hidden_layers = layers
    if getattr(config.text_config, "layer_types", None):
        config.text_config.layer_types = ["full_attention"] * layers
    if deepstack:
        config.vision_config.deepstack_visual_indexes = list(range(deepstack))
    model = type(smaller)(config)
    model.set_attn_implementation(attn)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = PAD
    return randomise(model).eval()


def read_next_video(model: Any, inputs: oracle.Inputs, signals: Any = None) -> oracle.Said:
    """A prompt of LLaVA-NeXT-Video: saliency is what patches receive in the selected layer, the class token's row
    included, averaged as the features are."""
    base, ids, pixels = model.model, inputs["input_ids"], inputs.get("pixel_values_videos")
    if pixels is None:
        return oracle.Said(model.get_input_embeddings()(ids), torch.arange(ids.shape[1] + 1)[None], [])
    frames, where = pixels.shape[1], ids[0] == VIDEO
    features = [f.reshape(-1, HIDDEN) for f in base.get_video_features(pixels, return_dict=True).pooler_output]
    embeds = model.get_input_embeddings()(ids).masked_scatter(where[None, :, None], torch.cat(features))
    tower = copy.deepcopy(base.vision_tower)
    tower.set_attn_implementation("eager")
    layer = model.config.vision_feature_layer
    output = tower(pixels.flatten(0, 1), output_attentions=True, output_hidden_states=True)
    received = output.attentions[layer].mean((1, 2))[:, 1:]
    side = math.isqrt(received.shape[1])
    received = functional.avg_pool2d(received.view(-1, 1, side, side), 2).reshape(len(pixels), -1)
    keys = oracle.tower_keys(tower.encoder.layers[layer], output.hidden_states[:-1][layer])[:, 1:]
    keys = functional.avg_pool2d(keys.transpose(1, 2).unflatten(2, (side, side)), 2).flatten(2).transpose(1, 2)
    keys = keys.reshape(len(pixels), -1, keys.shape[-1])
    videos = [
        oracle.Video(
            columns,
            (frames, side // 2, side // 2),
            {
                "frame_features": f.unflatten(0, (frames, -1)).mean(1),
                "saliency.head": r,
                "saliency.received": r,
                "tower_keys": k,
            },
        )
        for columns, f, r, k in zip(where.nonzero().view(len(pixels), -1), features, received, keys, strict=True)
    ]
    return oracle.Said(embeds, torch.arange(ids.shape[1] + 1)[None], videos)


def backbone_llava_video(newline: str, pool: str) -> Backbone:
    """70 pixels are 5 x 5 patches: 3 x 3 tokens a frame if pooled bilinearly, else 2 x 2."""
    side = 3 if pool == "bilinear" else 2
    line = {"grid": side, "frame": side**2, "one_token": FRAMES * side**2, "no_token": 0}[newline]
    return Backbone(
        lambda attn, layers: llava_video(pool, newline, attn, image_size=70, layers=layers),
        lambda model: video_inputs(model, [TWO], seed=1),
        [(FRAMES, side, side)] * 2,
        line=line,
    )


def backbone_qwen(kind: str, deepstack: int = 0, depth: int = DEPTH) -> Backbone:
    return Backbone(
        functools.partial(qwen_of, kind, deepstack),
        lambda model: qwen_inputs(kind, [TWO]),
        [tokens(grid) for grid in GRIDS[:2]],
        read=oracle_qwen.read,
        deepstack=deepstack,
        depth=depth,
    )


POOLS = itertools.cycle(["average", "bilinear", "max"])
BACKBONES: dict[str, Backbone] = {
    "llava_next_video": Backbone(
        next_video, lambda model: next_inputs([TWO]), [(FRAMES, 2, 2)] * 2, read=read_next_video
    ),
    "llava_onevision": Backbone(
        functools.partial(llava, image_size=70),
        lambda model: llava_inputs([TWO], image_size=70),
        [(FRAMES, 3, 3)] * 2,
        line=9 * FRAMES,
    ),
    **{f"llava_video {newline}": backbone_llava_video(newline, next(POOLS)) for newline in NEWLINE_POSITIONS},
    "qwen2_vl": backbone_qwen("qwen2_vl"),
    "qwen2_5_vl": backbone_qwen("qwen2_5_vl"),
    "qwen3_vl": backbone_qwen("qwen3_vl", deepstack=3, depth=12),  # as deep, in proportion, as the published ones
    "qwen3_vl_moe": backbone_qwen("qwen3_vl_moe", deepstack=2, depth=8),
}
"""By `model_type`, and a word more where one has several kinds."""


def model_type(label: str) -> str:
    return label.partition(" ")[0]


@functools.cache
def built(label: str, attn: str) -> tuple[Any, dict[str, Tensor], Tensor]:
    """A model, a prompt, and the logits [1, L, V] of the plain model."""
    model = BACKBONES[label].build(attn, BACKBONES[label].depth)
    inputs = BACKBONES[label].ask(model)
    with torch.no_grad():
        return model, inputs, model(**inputs).logits


def ready(label: str, attn: str) -> tuple[Any, dict[str, Tensor], Tensor]:
    """`built`; skips the test where this transformers cannot have such a model."""
    try:
        return built(label, attn)
    except ValueError as error:
        if "no_token" not in label:
            raise
        pytest.skip(str(error))


@functools.cache
@torch.no_grad()
def recomputed(label: str, name: str, attn: str) -> Tensor:
    """[V] the oracle's logits for the first token of the answer."""
    model, inputs, _ = built(label, attn)
    pipeline = chosen(name).on(model_type(label))
    prompt = oracle.shorten(model, inputs, pipeline, read=BACKBONES[label].read)
    return model.lm_head(oracle.hidden_states(model, prompt)[-1])


# -- the matrix --------------------------------------------------------------------------------------------------------
def layer_lengths(backbone: Backbone, total: int, steps: Sequence[Step], depth: int) -> list[int]:
    """What every layer runs over if videos are left as the steps say, in a prompt of so many tokens."""
    left = [torch.arange(math.prod(grid)) for grid in backbone.videos]
    text = total - sum(map(backbone.places, left))
    lengths = []
    for layer in range(-1, depth):
        for step in steps:
            if step.site.layer == layer:
                left[step.video] = left[step.video][step.reduction.keep]
        lengths.append(text + sum(map(backbone.places, left)))
    return lengths[1:]


def check_trace(handle: Any, backbone: Backbone, pipeline: Pipeline, total: int, depth: int) -> list[int]:
    """That every site kept what was promised of the grids alone; what every layer runs over."""
    prompt, exact = handle.trace.last, all(method.exact for method in pipeline)
    stages = pipeline.stages(depth)
    order = [(site, v) for site in stages for v in range(len(backbone.videos))]
    assert [(s.site, s.video, s.grid, s.method) for s in prompt.steps] == [
        (site, v, backbone.videos[v], stages[site].name) for site, v in order
    ]
    promised = [pipeline.counts(backbone.videos[v], depth)[site] for site, v in order]
    kept = [len(s.reduction.keep) for s in prompt.steps]
    assert kept == [s.after for s in prompt.steps]
    assert kept == promised if exact else all(0 < n <= most for n, most in zip(kept, promised))
    assert prompt.after < prompt.before or not stages
    lengths = layer_lengths(backbone, total, prompt.steps, depth)
    assert prompt.layer_lengths == lengths
    return lengths


CASES = [(label, name, attn) for label in BACKBONES for name in WAYS for attn in ("sdpa", "eager")]
CASES += [("llava_onevision", name, "sdpa") for name in NUMBERS]  # numbers are nothing to a backbone


@pytest.mark.parametrize("label, name, attn", CASES)
def test_a_method_on_a_backbone(label, name, attn):
    backbone, pipeline, depth = BACKBONES[label], chosen(name), BACKBONES[label].depth
    model, inputs, plain = ready(label, attn)
    refusal = backbone.refusal(pipeline, model_type(label))
    if refusal:
        before = anatomy(model)
        with pytest.raises(ValueError, match=refusal):
            compress(model, pipeline)
        assert anatomy(model) == before
        return
    with compress(model, pipeline) as handle:
        got = generate(model, inputs, 3)
    total = inputs["input_ids"].shape[1]
    lengths = check_trace(handle, backbone, pipeline.on(model_type(label)), total, depth)
    cache = got.past_key_values
    stored = [n + 2 for n in lengths]  # the last token that was written is not in it
    if pipeline.evicts:
        said, talk = oracle_decoding.answer(model, inputs, pipeline.on(model_type(label)), 3, backbone.read)
        torch.testing.assert_close(torch.cat(got.logits), said.logits, **oracle.TOLERANCE)
        left = [len(layer.columns) for layer in talk.layers]
        assert any(a < b for a, b in zip(left, stored)) and all(a <= b for a, b in zip(left, stored))
        stored = left
    assert [layer.keys.shape[2] for layer in cache.layers] == stored and cache.get_seq_length() == total + 2
    assert measured_kv_bytes(cache) == kv_cache_bytes(Dimensions.of(model.config), stored, dtype_bytes=4)
    assert all(logits.isfinite().all() for logits in got.logits)
    logits = got.logits[0][0]
    if attn == "sdpa" or not torch.allclose(logits, recomputed(label, name, "sdpa"), **oracle.TOLERANCE):
        # What the other attention rounds otherwise may decide a near-tie: then the oracle has to see the same.
        torch.testing.assert_close(logits, recomputed(label, name, attn), **oracle.TOLERANCE)
    with compress(model, keeping_all(pipeline)) as handle, torch.no_grad():
        assert torch.equal(model(**inputs).logits, plain)
    assert handle.trace.last.layer_lengths == [total] * depth
    assert len(handle.trace.last.steps) == 2 * len(pipeline.stages(depth))


def test_the_matrix_is_complete():
    """A patch without a backbone here fails, and so does a pair that is refused for a new reason, or no longer."""
    assert {model_type(label) for label in BACKBONES} | set(ELSEWHERE) == set(patches.backbones())
    assert set(list_methods()) | set(list_presets()) <= set(COMPRESSIONS)
    refused = {
        (label, name)
        for label, backbone in BACKBONES.items()
        for name in COMPRESSIONS
        if backbone.refusal(chosen(name), model_type(label))
    }
    early = {("qwen3_vl", name) for name in ("fastv", "cdpruner", "framefusion", "streamingllm")}
    early |= {("qwen3_vl_moe", name) for name in ("cdpruner", "framefusion")}
    assert refused == early | {("llava_next_video", "fastvid, official")}


# -- the depths of published models ------------------------------------------------------------------------------------
SERIES = {
    "llava-next-video": "llava_next_video",
    "llava-onevision": "llava_onevision",
    "llava-video": "llava_video grid",
    "qwen2-vl": "qwen2_vl",
    "qwen2.5-vl": "qwen2_5_vl",
    "qwen3-vl": "qwen3_vl",
}
MIXTURES = {"qwen3-vl-30b-a3b"}


def depths() -> list[tuple[str, int]]:
    """Every backbone at the depths of its published models."""
    found = set()
    for name, of in MODELS.items():
        label = SERIES[name.rpartition("-")[0]] if name not in MIXTURES else "qwen3_vl_moe"
        found.add((label, of.layers))
    return sorted(found)


@pytest.mark.parametrize("label, depth", depths())
def test_methods_act_where_they_should_at_published_depths(label, depth):
    backbone = dataclasses.replace(BACKBONES[label], depth=depth)
    model = backbone.build("sdpa", depth)
    inputs = backbone.ask(model)
    for name, method in ((name, load(name)) for name in list_methods()):
        sites = list(Pipeline([method]).stages(depth))
        if not any(site.is_inner for site in sites) or backbone.refusal(Pipeline([method]), model_type(label)):
            continue
        with compress(model, method) as handle, torch.no_grad():
            model(**inputs)
        check_trace(handle, backbone, Pipeline([method]), inputs["input_ids"].shape[1], depth)
        assert list(dict.fromkeys(step.site for step in handle.trace.last.steps)) == sites, name


# -- video models without a patch --------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", patches.REFUSED)
def test_models_that_cannot_be_served_are_left_alone(kind, tmp_path):
    config = transformers.AutoConfig.for_model(kind)
    with torch.device("meta"):
        model = transformers.AutoModelForImageTextToText.from_config(config)
    before = anatomy(model)
    reason = re.escape(f"{kind} cannot be compressed: {patches.REFUSED[kind]}; vidcompress knows: ")
    with pytest.raises(ValueError, match=reason):
        vidcompress.apply(model, "random")
    assert anatomy(model) == before and vidcompress.handle_of(model) is None
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=reason):  # before weights are looked for, of which there are none
        vidcompress.from_pretrained(tmp_path, compression="random")
