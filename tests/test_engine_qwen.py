"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL against `oracle`: positions of three axes, videos of many sizes, deepstack."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import oracle
import oracle_qwen
import pytest
import torch
from test_engine_generate import agrees, empty_cache, needs_grouped_videos
from tiny import (
    METHODS,
    VIDEO,
    Attentive,
    InnerMix,
    InnerPrune,
    Mix,
    Prune,
    anatomy,
    compress,
    generate,
    new_tokens,
    step_logits,
)
from tiny_qwen import (
    DEEPSTACK,
    DEPTH,
    END,
    GRIDS,
    KINDS,
    ONE,
    TWO,
    Grid,
    length,
    longer,
    pair,
    qwen,
    qwen_inputs,
    tokens,
    without_videos,
)
from torch import Tensor

import vidcompress
from vidcompress import Method, Reduction, Site, VideoTokens
from vidcompress.method import Pipeline

TOYS: dict[str, list[Callable[..., Method]]] = {
    "prune": [METHODS["prune"]],
    "merge": [METHODS["merge"]],
    "one": [functools.partial(InnerMix, layers=(2,))],
    "three": [
        functools.partial(Attentive, layers=(2,)),
        functools.partial(InnerMix, layers=(3,)),
        functools.partial(Attentive, layers=(5,), signal="last_query_attention.previous"),
    ],
    "outer and three": [
        functools.partial(Mix, retention_ratio=0.7),
        functools.partial(Attentive, layers=(2,), signal="text_attention.heads"),
        functools.partial(InnerPrune, layers=(3, 4)),
    ],
}
EARLY: dict[str, list[Callable[..., Method]]] = {
    "early": [
        METHODS["merge"],
        functools.partial(InnerMix, layers=(0,)),
        functools.partial(Attentive, layers=(1,), signal="last_query_attention"),
    ],
}
"""Where Qwen3-VL still adds vision features."""

REAL: dict[str, list[Callable[..., Method]]] = {
    "infomerge": [METHODS["infomerge"]],
    "fastvid": [METHODS["fastvid"]],
    "unified": [functools.partial(vidcompress.load, "unified", retention_ratio=0.5)],
    "pyramiddrop": [functools.partial(vidcompress.load, "pyramiddrop", layers=[2, 3, 4], ratios=[0.5, 0.25, 0.125])],
    "hieravid": [functools.partial(vidcompress.load, "hieravid", retention_ratio=0.4)],
}
POLICIES = ["keep", "renumber"]
kinds = pytest.mark.parametrize("kind", KINDS)
policies = pytest.mark.parametrize("positions", POLICIES)
LONG: list[Grid] = [(12, 4, 4)]  # Qwen2.5-VL puts its last frame at 44, and the text behind it at 5


def pipeline(name: str, positions: str = "keep", **settings: Any) -> Pipeline:
    """One of the above; "keep first" and "renumber first" alternate from method to method."""
    order = ["keep", "renumber"] if positions.startswith("keep") else ["renumber", "keep"]
    chosen = order if positions.endswith("first") else order[:1]
    factories = (TOYS | EARLY | REAL)[name]
    return Pipeline([f(positions=chosen[i % len(chosen)], **settings) for i, f in enumerate(factories)])


def answer(plain: Any, inputs: dict[str, Tensor], method: Any, steps: int = 4, **reading: int) -> oracle.Answer:
    """What the oracle says to one row; later turns begin at column `prompt`."""
    turns = [(reading["prompt"], method)] if "prompt" in reading else []
    return oracle.answer(plain, inputs, method, steps, read=oracle_qwen.reading(**reading), turns=turns)


def stored(cache: Any) -> list[int]:
    """Keys that every layer of a cache holds."""
    return [layer.keys.shape[2] for layer in cache.layers]


# -- nothing to remove -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@kinds
def test_keeping_all_is_bit_identical(kind, attn):
    inputs = qwen_inputs(kind, [TWO, ONE])
    plain = qwen(kind, attn)
    expected = generate(plain, inputs, 4)
    for name in ("outer and three", "unified", "pyramiddrop"):
        whole = {"unified": {"keep_ratio": 1.0}, "pyramiddrop": {"ratios": [1.0, 1.0, 1.0]}}.get(name, {})
        model = qwen(kind, attn)
        handle = compress(model, pipeline(name, "renumber", retention_ratio=1.0, **whole))
        got = generate(model, inputs, 4)
        assert torch.equal(expected.sequences, got.sequences)
        assert torch.equal(step_logits(expected), step_logits(got))
        assert handle.trace.last.layer_lengths == [inputs["input_ids"].shape[1]] * DEPTH
        with torch.no_grad():
            a, b = (m(**inputs, use_cache=False, output_hidden_states=True) for m in (plain, model))
        assert all(torch.equal(x, y) for x, y in zip(a.hidden_states, b.hidden_states, strict=True))


@kinds
def test_prompts_without_video_are_untouched(kind):
    plain, model, handle = pair(kind, pipeline("outer and three", "renumber"))
    for _ in range(2):
        for texts in ([[5, 6, 7, 8]], [[5, "I", 7], [9, 10, "I", "I", 12]]):
            inputs = qwen_inputs(kind, texts)
            assert torch.equal(*(step_logits(generate(m, inputs, 4)) for m in (plain, model)))
        assert len(handle.trace) == 0
        generate(model, qwen_inputs(kind, [TWO]), 2)  # and again behind a prompt with a video
        handle.trace.clear()


# -- against the oracle ------------------------------------------------------------------------------------------------
CASES = [
    (kind, name, positions, "sdpa")
    for kind in KINDS
    for name in TOYS
    for positions in POLICIES
    if (name, positions) not in {("one", "keep"), ("three", "renumber")}
]
CASES += [(kind, "outer and three", f"{positions} first", "eager") for kind in KINDS for positions in POLICIES]
CASES += [(kind, "early", positions, "sdpa") for kind in KINDS[:2] for positions in POLICIES]
CASES += [
    (kind, name, POLICIES[(i + j) % 2], "sdpa")
    for i, kind in enumerate(KINDS)
    for j, name in enumerate(REAL)
    if (kind, name) != ("qwen3_vl", "hieravid")
]
CASES += [("qwen3_vl_moe", "outer and three", "renumber", "sdpa"), ("qwen3_vl_moe", "merge", "keep", "eager")]


@pytest.mark.parametrize("kind, name, positions, attn", CASES)
def test_every_row_of_a_padded_batch_as_recomputed(kind, name, positions, attn):
    """Three videos of different sizes, two of them in the first row."""
    method = pipeline(name, positions)
    plain, model, handle = pair(kind, method, attn)
    inputs = qwen_inputs(kind, [TWO, ONE])
    got = generate(model, inputs, 4)
    uncached = generate(model, inputs, 4, use_cache=False)
    for b in range(2):
        expected = answer(plain, oracle_qwen.row(inputs, b), method)
        agrees(got, inputs, expected, b)
        agrees(uncached, inputs, expected, b)
    # Every layer runs over, and stores, what was predicted of the grids alone; the caller counts all.
    total = inputs["input_ids"].shape[1]
    assert total == int(inputs["attention_mask"][0].sum())
    gone = sum(length(grid) for grid in GRIDS[:2])
    predicted = [total - gone + sum(n) for n in zip(*(method.lengths(tokens(grid), DEPTH) for grid in GRIDS[:2]))]
    assert handle.trace[0].layer_lengths == predicted
    assert stored(got.past_key_values) == [n + 3 for n in predicted]
    assert got.past_key_values.get_seq_length() == total + 3
    steps = [(s.site, s.row, s.grid, s.after) for s in handle.trace[0].steps]
    counts = [method.counts(tokens(grid), DEPTH) for grid in GRIDS]
    assert steps == [
        (site, v // 2, tokens(GRIDS[v]), counts[v][site]) for site in method.stages(DEPTH) for v in range(3)
    ]


@dataclass(kw_only=True)
class Watching(Prune):
    """Remembers what the tower said of every video."""

    needs: ClassVar[frozenset[str]] = frozenset({"frame_features", "saliency.head", "saliency.received"})
    seen: list[VideoTokens] = field(default_factory=list)

    def reduce(self, tokens: VideoTokens, site: Site) -> Reduction:
        self.seen.append(tokens)
        return super().reduce(tokens, site)


@kinds
def test_signals_of_the_tower_are_those_of_every_video_alone(kind):
    method = Watching(retention_ratio=0.5)
    plain, model, _ = pair(kind, method)
    inputs = qwen_inputs(kind, [TWO, ONE])
    generate(model, inputs, 1)
    videos = [video for b in range(2) for video in oracle_qwen.read(plain, oracle_qwen.row(inputs, b)).videos]
    for seen, video in zip(method.seen, videos, strict=True):
        assert seen.grid == video.grid
        for name in method.needs:
            torch.testing.assert_close(seen.signal(name), video.signals[name], atol=1e-5, rtol=1e-4)


@kinds
def test_images_and_neighbours(kind):
    """Images stay as they are, and keep the features that Qwen3-VL adds for them."""
    method = pipeline("outer and three", "renumber first")
    plain, model, handle = pair(kind, method)
    for text in ([5, "I", 6, "V", 7, "I", 8, 9], [5, "V", "V", 8], ["I", "V", 7, "V", "I", 8]):
        inputs = qwen_inputs(kind, [text])
        agrees(generate(model, inputs, 4), inputs, answer(plain, inputs, method))
        assert all(step.after < step.before for step in handle.trace.last.steps)


@kinds
def test_forward_gives_the_survivors_logits_at_the_callers_places(kind):
    method = pipeline("outer and three", "keep first")
    plain, model, _ = pair(kind, method)
    inputs = qwen_inputs(kind, [TWO])
    with torch.no_grad():
        prompt = oracle.shorten(plain, inputs, method, read=oracle_qwen.read)
        expected = torch.zeros(inputs["input_ids"].shape[1], plain.config.text_config.vocab_size)
        expected[prompt.left] = plain.lm_head(oracle.hidden_states(plain, prompt))
        for mask in (inputs["attention_mask"], None):
            for use_cache in (True, False):
                got = model(**{**inputs, "attention_mask": mask}, use_cache=use_cache).logits[0]
                torch.testing.assert_close(got, expected, **oracle.TOLERANCE)


@kinds
def test_loss_and_gradients_are_the_oracles(kind):
    """Gradients reach the vision tower through the tokens, and in Qwen3-VL through what its first layers add."""
    method = pipeline("outer and three", "renumber")
    plain, model, _ = pair(kind, method)
    inputs = qwen_inputs(kind, [TWO])
    # The end token comes after a video token that may be gone, and would be guessed from nothing.
    unsaid = torch.isin(inputs["input_ids"], torch.tensor([VIDEO, END]))
    labels = inputs["input_ids"].masked_fill(unsaid, -100)
    expected = oracle.loss(plain, inputs, labels, method, read=oracle_qwen.read)
    got = model(**inputs, labels=labels).loss
    torch.testing.assert_close(got, expected, **oracle.TOLERANCE)
    expected.backward()
    got.backward()
    for (name, wanted), parameter in zip(plain.named_parameters(), model.parameters()):
        assert (wanted.grad is None) == (parameter.grad is None), name
        if wanted.grad is not None:
            scale = float(wanted.grad.abs().max())
            torch.testing.assert_close(parameter.grad, wanted.grad, atol=1e-3 * scale + 1e-7, rtol=1e-2)


# -- positions ---------------------------------------------------------------------------------------------------------
@policies
@kinds
def test_rope_deltas_are_the_plain_models(kind, positions):
    plain, model, _ = pair(kind, pipeline("outer and three", positions))
    inputs = qwen_inputs(kind, [TWO, ONE])
    for call in (lambda m: generate(m, inputs, 3), lambda m: m(**inputs)):
        call(plain), call(model)
        assert torch.equal(plain.model.rope_deltas, model.model.rope_deltas)
        assert int(model.model.rope_deltas.abs().min()) > 0
        plain.model.rope_deltas = model.model.rope_deltas = None


@pytest.mark.filterwarnings("ignore:the prompt has no text after its last video")
@policies
@kinds
def test_video_at_the_end_of_the_prompt(kind, positions):
    method = pipeline("outer and three", positions)
    plain, model, _ = pair(kind, method)
    inputs = qwen_inputs(kind, [[5, 6, "V"]])
    expected = answer(plain, inputs, method)
    agrees(generate(model, inputs, 4), inputs, expected)
    agrees(generate(model, inputs, 4, use_cache=False), inputs, expected)


@pytest.mark.parametrize("name", ["merge", "outer and three"])
@policies
@kinds
def test_frames_later_than_the_text_behind_them(kind, positions, name):
    method = pipeline(name, positions)
    plain, model, _ = pair(kind, method)
    inputs = qwen_inputs(kind, [ONE], LONG)
    where, _ = plain.model.get_rope_index(
        inputs["input_ids"], inputs["mm_token_type_ids"], video_grid_thw=inputs["video_grid_thw"]
    )
    assert (where.max() > where[..., -1].max()) == (kind != "qwen3_vl")
    expected = answer(plain, inputs, method)
    agrees(generate(model, inputs, 4), inputs, expected)
    agrees(generate(model, inputs, 4, use_cache=False), inputs, expected)


# -- turns -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["merge", "outer and three"])
@policies
@kinds
def test_later_turns_on_the_same_cache(kind, positions, name):
    method = pipeline(name, positions)
    plain, model, handle = pair(kind, method)
    inputs = qwen_inputs(kind, [ONE, TWO])
    ends = inputs["attention_mask"].sum(1).tolist()
    cache = empty_cache(model)
    first = generate(model, inputs, 4, past_key_values=cache)
    deltas = model.model.rope_deltas
    second = longer(inputs, first.sequences, [21, 22, 23])
    got = generate(model, without_videos(second), 4, past_key_values=cache)
    assert torch.equal(model.model.rope_deltas, deltas)
    for b, end in enumerate(ends):
        agrees(got, second, answer(plain, oracle_qwen.row(second, b), method, prompt=end, decoded=3), b)
    assert len(handle.trace) == 1
    assert cache.get_seq_length() == second["input_ids"].shape[1] + 3


@policies
@kinds
def test_later_tokens_by_hand(kind, positions):
    """Forwards on the cache without mask and positions: the model adds its rope_deltas to the caller's columns."""
    method = pipeline("outer and three", positions)
    plain, model, _ = pair(kind, method)
    inputs = qwen_inputs(kind, [ONE], LONG)
    end = inputs["input_ids"].shape[1]
    words = torch.tensor([[21, 22, 23, 24]])
    with torch.no_grad():
        cache = model(**inputs, use_cache=True).past_key_values
        parts = [model(input_ids=w, past_key_values=cache).logits for w in words.split([2, 1, 1], 1)]
        everything = longer(inputs, torch.cat([inputs["input_ids"], words], 1))
        read = oracle_qwen.reading(prompt=end)
        prompt = oracle.shorten(plain, everything, method, turns=[(end, method)], read=read)
        expected = plain.lm_head(oracle.hidden_states(plain, prompt))[-4:]
    torch.testing.assert_close(torch.cat(parts, 1)[0], expected, **oracle.TOLERANCE)


@pytest.mark.parametrize("removed", [1, 4, 6])
@policies
@pytest.mark.parametrize("kind", KINDS[1:])
def test_cropped_cache_continues_as_recomputed(kind, positions, removed):
    """Four tokens were decoded into the cache; before them are three words."""
    method = pipeline("merge" if removed > 4 else "outer and three", positions)  # the latter judges by these words
    plain, model, _ = pair(kind, method)
    inputs = qwen_inputs(kind, [ONE], LONG)
    end = inputs["input_ids"].shape[1]
    cache = empty_cache(model)
    first = generate(model, inputs, 5, past_key_values=cache)
    cache.crop(-removed)
    left = end + 4 - removed
    assert cache.get_seq_length() == left
    other = longer(inputs, first.sequences[:, :left], [50, 51])
    got = generate(model, without_videos(other), 4, past_key_values=cache)
    delta = int(model.model.rope_deltas)  # which plain models go by, whatever was taken off
    expected = answer(plain, other, method, prompt=min(left, end), decoded=max(0, left - end), delta=delta)
    agrees(got, other, expected)


# -- generate() --------------------------------------------------------------------------------------------------------
@needs_grouped_videos
@policies
@kinds
def test_beams_of_a_batch_as_of_every_row_alone(kind, positions):
    _, model, handle = pair(kind, pipeline("outer and three", positions))
    inputs = qwen_inputs(kind, [ONE, TWO])
    got = generate(model, inputs, 5, num_beams=2)
    assert {(s.row, s.video) for s in handle.trace.last.steps} == {(0, 0), (2, 1), (2, 2)}  # decided once
    uncached = generate(model, inputs, 5, num_beams=2, use_cache=False)
    assert torch.equal(got.sequences, uncached.sequences)
    for b in range(2):
        row = oracle_qwen.row(inputs, b)
        alone = generate(model, row, 5, num_beams=2)
        assert torch.equal(new_tokens(alone, row)[0], new_tokens(got, inputs)[b])


@kinds
def test_static_cache_equals_dynamic(kind):
    _, model, _ = pair(kind, pipeline("outer and three", "renumber"))
    inputs = qwen_inputs(kind, [ONE, TWO])
    got, static = (generate(model, inputs, 4, cache_implementation=c) for c in ("dynamic", "static"))
    assert torch.equal(got.sequences, static.sequences)
    torch.testing.assert_close(step_logits(static), step_logits(got), **oracle.TOLERANCE)


@policies
@kinds
def test_prompt_lookup_equals_greedy(kind, positions):
    _, model, _ = pair(kind, pipeline("outer and three", positions))
    inputs = qwen_inputs(kind, [[5, 6, 7, 5, 6, 7, "V", 5, 6, 7, 5, 6]])
    greedy = generate(model, inputs, 8)
    assert torch.equal(greedy.sequences, generate(model, inputs, 8, prompt_lookup_num_tokens=3).sequences)


# -- deepstack ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["qwen3_vl", "qwen3_vl_moe"])
def test_methods_at_layers_that_add_vision_features_are_refused(kind):
    model = qwen(kind)
    before = anatomy(model)
    for layers in ((0,), (1, 3)):
        message = rf"InnerPrune acts at decoder\[{layers[0]}\]; the first {DEEPSTACK} .*begin at layer {DEEPSTACK}"
        with pytest.raises(ValueError, match=message):
            vidcompress.apply(model, InnerPrune(layers=layers))
    with pytest.raises(ValueError, match=r"hieravid acts at decoder\[1\]"):
        vidcompress.apply(model, "hieravid")
    assert anatomy(model) == before


@pytest.mark.parametrize("name", ["prune", "merge"])
def test_what_the_first_layers_add_matters(name):
    """That the comparisons above would notice features that did not follow the tokens."""
    method = pipeline(name)
    plain = qwen("qwen3_vl")
    inputs = qwen_inputs("qwen3_vl", [TWO])
    with torch.no_grad():
        prompt = oracle.shorten(plain, inputs, method, read=oracle_qwen.read)
        said = oracle_qwen.read(plain, inputs)
        pruned = tuple(features[prompt.columns] for features in said.added)
        logits = [
            plain.lm_head(
                oracle.hidden_states(plain, oracle.Prompt(prompt.embeds, prompt.positions, prompt.columns, {}, a))
            )
            for a in (prompt.added, pruned, ())
        ]
    assert len(prompt.added) == DEEPSTACK
    assert (logits[0] - logits[2])[-1].abs().max() > 0.1
    assert ((logits[0] - logits[1])[-1].abs().max() > 0.1) == (name == "merge")


# -- lifecycle ---------------------------------------------------------------------------------------------------------
@kinds
def test_removing_restores_the_model(kind):
    plain, inputs = qwen(kind), qwen_inputs(kind, [TWO, ONE])
    model = qwen(kind)
    expected = generate(model, inputs, 3)
    before = anatomy(model)
    handle = compress(model, pipeline("infomerge"))
    with torch.no_grad():
        assert not torch.equal(model(**inputs).logits, plain(**inputs).logits)
    generate(model, inputs, 2)
    handle.remove()
    assert anatomy(model) == before
    assert torch.equal(step_logits(generate(model, inputs, 3)), step_logits(expected))
