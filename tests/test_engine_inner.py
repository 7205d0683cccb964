"""Reduction at the input of decoder layers, alone and after one before the decoder, against `oracle`."""

from __future__ import annotations

import copy
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import accelerate
import oracle
import pytest
import torch
from test_engine_generate import agrees, empty_cache, followed_by, needs_grouped_videos
from test_engine_lifecycle import OFFLOAD, logits
from tiny import (
    FRAMES,
    HIDDEN,
    LATE,
    METHODS,
    ONE,
    PIPELINES,
    POLICIES,
    REAL,
    TWO,
    VIDEO,
    Attentive,
    Inner,
    InnerMix,
    InnerPrune,
    anatomy,
    compress,
    generate,
    llava,
    llava_inputs,
    new_tokens,
    pair,
    pipeline,
    step_logits,
    video_grid,
    without_head,
    without_mask,
)
from torch import Tensor
from transformers import DynamicCache, StaticCache
from vidcompress.patches.base import Patch

import vidcompress
from vidcompress.engine.cache import CachedPrefix, CacheState
from vidcompress.method import Pipeline

DEPTH = 6
SIGNALS = [
    "text_attention",
    "text_attention.heads",
    "last_query_attention",
    "last_query_attention.previous",
    "text_hidden",
    "last_text_hidden",
]
policies = pytest.mark.parametrize("positions", POLICIES)
# Of every kind one: three inner stages, and three after an outer one.
some = pytest.mark.parametrize(
    "name, positions", [("three", "renumber"), ("outer and three", "keep"), ("outer and three", "renumber first")]
)
some_attn = pytest.mark.parametrize("attn", ["sdpa", "eager"])
# Text after the video is asked for by name, so that these notice what a method must not see.
listening = pytest.mark.parametrize("positions", ["keep", "renumber"])


def stored(cache: Any) -> list[int]:
    """Keys that every layer of a cache holds."""
    return [layer.keys.shape[2] for layer in cache.layers]


def whole(turn: dict[str, Tensor], first: dict[str, Tensor]) -> dict[str, Tensor]:
    """A later turn with the videos of the first."""
    return dict(turn, pixel_values_videos=first["pixel_values_videos"])


# -- nothing to remove -------------------------------------------------------------------------------------------------
@some_attn
@pytest.mark.parametrize("name", PIPELINES | REAL)
def test_keeping_all_is_bit_identical(name, attn):
    methods = [f(retention_ratio=1.0) for f in (PIPELINES | REAL)[name]]
    if name == "unified":
        methods = [vidcompress.load("unified", retention_ratio=1.0, keep_ratio=1.0)]
    plain, model, handle = pair(Pipeline(methods), attn=attn)
    inputs = llava_inputs([ONE, TWO])
    expected, got = generate(plain, inputs), generate(model, inputs)
    assert torch.equal(expected.sequences, got.sequences)
    assert torch.equal(step_logits(expected), step_logits(got))
    assert handle.trace.last.layer_lengths == [inputs["input_ids"].shape[1]] * DEPTH
    assert type(got.past_key_values) is type(expected.past_key_values)
    with torch.no_grad():
        for use_cache in (True, False):
            a, b = (m(**inputs, use_cache=use_cache, output_hidden_states=True) for m in (plain, model))
            assert torch.equal(a.logits, b.logits)
            assert all(torch.equal(x, y) for x, y in zip(a.hidden_states, b.hidden_states, strict=True))


@pytest.mark.parametrize("texts", [[[5, 6, 7, 8]], [[5, "I", 7], [9, 10, 11, "I", "I", 12]]])
def test_prompts_without_video_are_untouched(texts):
    plain, model, handle = pair(pipeline("outer and three"))
    inputs = llava_inputs(texts)
    for _ in range(2):
        for options in ({}, {"cache_implementation": "static"}):
            assert torch.equal(*(step_logits(generate(m, inputs, **options)) for m in (plain, model)))
        assert len(handle.trace) == 0
        generate(model, llava_inputs([TWO]), 2)  # and again behind a prompt with a video
        handle.trace.clear()


# -- against the oracle ------------------------------------------------------------------------------------------------
CASES = [(name, positions, "sdpa", TWO) for name in PIPELINES for positions in POLICIES]
CASES += [(name, positions, "eager", ONE) for name in PIPELINES for positions in ("keep first", "renumber")]
CASES += [(name, positions, "sdpa", TWO) for name in REAL for positions in ("keep", "renumber")]


@pytest.mark.parametrize("name, positions, attn, text", CASES)
def test_answers_as_recomputed(name, positions, attn, text):
    method = pipeline(name, positions)
    plain, model, handle = pair(method, attn=attn)
    inputs = llava_inputs([text])
    length = inputs["input_ids"].shape[1]
    expected = oracle.answer(plain, inputs, method, steps=5)
    got = generate(model, inputs, 5)
    agrees(got, inputs, expected)
    agrees(generate(model, without_mask(inputs), 5, use_cache=False), inputs, expected)
    # Every layer runs over, and stores, what was predicted of the grid alone; the caller counts all.
    videos = text.count("V")
    grid = video_grid(FRAMES)
    others = length - videos * grid[0] * grid[1] * grid[2]
    predicted = [others + videos * n for n in method.lengths(grid, DEPTH)]
    assert oracle.shorten(plain, inputs, method).lengths(DEPTH) == predicted
    assert handle.trace[0].layer_lengths == predicted
    assert stored(got.past_key_values) == [n + 4 for n in predicted]
    assert got.past_key_values.get_seq_length() == length + 4
    assert [got.past_key_values.get_seq_length(i) for i in range(DEPTH)] == [length + 4] * DEPTH
    counts = method.counts(grid, DEPTH)
    assert [(s.site, s.video, s.after) for s in handle.trace[0].steps] == [
        (site, v, n) for site, n in counts.items() for v in range(videos)
    ]


@listening
@pytest.mark.parametrize("signal", SIGNALS)
def test_every_signal_decides_as_recomputed(signal, positions):
    method = Pipeline([METHODS["merge"](), Attentive(layers=(2, 3), signal=signal, positions=positions)])
    plain, model, _ = pair(method)
    inputs = llava_inputs([TWO, ONE])
    got = generate(model, inputs, 4)
    uncached = generate(model, inputs, 4, use_cache=False)
    for b in range(2):
        expected = oracle.answer(plain, oracle.row(inputs, b), method, steps=4)
        agrees(got, inputs, expected, b)
        agrees(uncached, inputs, expected, b)


@pytest.mark.parametrize("layers", [(0,), (5,), (0, 1, 2), (3, 4, 5)], ids=str)
def test_the_first_and_the_last_layer(layers):
    method = InnerMix(layers=layers, positions="renumber")
    plain, model, _ = pair(method)
    inputs = llava_inputs([TWO])
    got = generate(model, inputs)
    agrees(got, inputs, oracle.answer(plain, inputs, method))
    n = inputs["input_ids"].shape[1] + 7
    assert [m for m in stored(got.past_key_values)][: layers[0]] == [n] * layers[0]  # untouched before


@some
@pytest.mark.parametrize("image_size, frames", [(28, 4), (70, 1)], ids=["1x1", "one frame"])
def test_other_shapes(name, positions, image_size, frames):
    method = pipeline(name, positions)
    plain, model, _ = pair(method, image_size=image_size)
    inputs = llava_inputs([ONE], frames, image_size=image_size)
    agrees(generate(model, inputs, 4), inputs, oracle.answer(plain, inputs, method, steps=4))


def test_at_least_one_token_stays():
    method = InnerPrune(retention_ratio=0.01, layers=(1, 2, 4))
    plain, model, handle = pair(method)
    inputs = llava_inputs([ONE])
    agrees(generate(model, inputs), inputs, oracle.answer(plain, inputs, method))
    assert handle.trace.last.after == 1


def test_half_precision():
    inputs = llava_inputs([ONE, TWO])
    for dtype in (torch.bfloat16, torch.float16):
        model = llava().to(dtype)
        compress(model, pipeline("three"))
        with torch.no_grad():
            got = model(**dict(inputs, pixel_values_videos=inputs["pixel_values_videos"].to(dtype))).logits
        assert got.dtype == dtype and got.isfinite().all()


def test_inference_mode_and_autocast():
    _, model, _ = pair(pipeline("outer and three"))
    inputs = llava_inputs([ONE, TWO])
    expected = logits(model)
    with torch.inference_mode():
        assert torch.equal(model(**inputs).logits, expected)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert model(**inputs).logits.isfinite().all()


# -- the text behind the video -----------------------------------------------------------------------------------------
@listening
@pytest.mark.parametrize(
    "text",
    [[5, "I", 6, "V", 7, "I", 8, 9], [5, 6, "V", "V", 7, 8], ["V", 6, 7, "V", "I", 8], ["V", 7]],
    ids=["image behind", "in a row", "image after the second", "video first"],
)
def test_images_and_neighbours(text, positions):
    method = Pipeline([InnerMix(layers=(1,)), Attentive(layers=(3,), positions=positions)])
    plain, model, handle = pair(method)
    inputs = llava_inputs([text])
    agrees(generate(model, inputs, 5), inputs, oracle.answer(plain, inputs, method, steps=5))
    for step in handle.trace.last.steps:
        assert step.after < step.before


@pytest.mark.parametrize("signal", SIGNALS)
def test_no_text_after_the_video_is_said_and_the_last_token_stands_in(signal):
    method = Attentive(layers=(2,), signal=signal)
    plain, model, _ = pair(method)
    inputs = llava_inputs([[5, 6, "V"]])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(3):
            got = generate(model, inputs, 4)
    said = [str(w.message) for w in caught if "no text after its last video" in str(w.message)]
    assert len(said) == 1 and "Attentive" in said[0] and "its last token" in said[0]
    agrees(got, inputs, oracle.answer(plain, inputs, method, steps=4))


def test_methods_that_ask_the_decoder_nothing_say_nothing_without_text():
    inputs = llava_inputs([[5, 6, "V"]])
    method = pipeline("outer and two", "renumber")
    plain, model, _ = pair(method)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        agrees(generate(model, inputs, 3), inputs, oracle.answer(plain, inputs, method, steps=3))


@pytest.mark.parametrize("use_cache", [True, False])
def test_nothing_that_is_decoded_is_seen(use_cache):
    """Without a cache every step runs the whole prompt again, with all answers behind it."""
    method = Attentive(layers=(2,), signal="text_hidden")
    _, model, _ = pair(method)
    inputs = llava_inputs([ONE])
    generate(model, inputs, 5, use_cache=use_cache)
    assert len(method.seen) == (1 if use_cache else 5)
    for tokens in method.seen:
        assert len(tokens.signal("text_hidden")) == 3
        torch.testing.assert_close(tokens.signal("text_hidden"), method.seen[0].signal("text_hidden"))


# -- what a forward can be asked for -----------------------------------------------------------------------------------
@some
def test_forward_gives_the_survivors_logits_at_the_callers_places(name, positions):
    method = pipeline(name, positions)
    plain, model, _ = pair(method)
    inputs = llava_inputs([TWO])
    with torch.no_grad():
        prompt = oracle.shorten(plain, inputs, method)
        expected = torch.zeros(inputs["input_ids"].shape[1], plain.config.text_config.vocab_size)
        expected[prompt.left] = plain.lm_head(oracle.hidden_states(plain, prompt))
        for call in (inputs, without_mask(inputs)):
            for use_cache in (True, False, None):
                got = model(**call, use_cache=use_cache).logits[0]
                torch.testing.assert_close(got, expected, **oracle.TOLERANCE)


@some
def test_logits_to_keep_and_tuples(name, positions):
    _, model, _ = pair(pipeline(name, positions))
    inputs = llava_inputs([TWO, ONE])
    with torch.no_grad():
        full = model(**inputs).logits
        places = torch.tensor([0, 3, inputs["input_ids"].shape[1] - 1])
        torch.testing.assert_close(model(**inputs, logits_to_keep=2).logits, full[:, -2:])
        torch.testing.assert_close(model(**inputs, logits_to_keep=places).logits, full[:, places])
        values = model(**inputs, return_dict=False)
    assert torch.equal(values[0], full) and values[1].get_seq_length() == inputs["input_ids"].shape[1]


@some
@pytest.mark.parametrize("use_cache", [True, False])
def test_hidden_states_have_the_callers_length(use_cache, name, positions):
    method = pipeline(name, positions)
    plain, model, _ = pair(method)
    inputs = llava_inputs([ONE, TWO])
    with torch.no_grad():
        output = model(**inputs, output_hidden_states=True, use_cache=use_cache)
    batch, length = inputs["input_ids"].shape
    assert [h.shape for h in output.hidden_states] == [(batch, length, HIDDEN)] * (DEPTH + 1)
    for b in range(batch):
        prompt = oracle.shorten(plain, oracle.row(inputs, b), method)
        padding = int((inputs["attention_mask"][b] == 0).sum())
        with torch.no_grad():
            entered, _ = oracle.run(plain, prompt)
            expected = [entered[0][0], *(oracle.through(plain, i, *entered[i]) for i in range(DEPTH - 1))]
            expected.append(oracle.hidden_states(plain, prompt)[None])
        for i, hidden in enumerate(output.hidden_states):
            kept = torch.zeros(length, dtype=torch.bool)
            kept[prompt.at(max(i - 1, 0)) + padding] = True  # what left layer i - 1
            assert not hidden[b, ~kept & inputs["attention_mask"][b].bool()].any()
            torch.testing.assert_close(hidden[b, kept], expected[i][0], **oracle.TOLERANCE)


@some
def test_attentions_are_those_of_every_layers_sequence(name, positions):
    method = pipeline(name, positions)
    plain, model, _ = pair(method, attn="eager")
    inputs = llava_inputs([ONE])
    prompt = oracle.shorten(plain, inputs, method)
    with torch.no_grad():
        output = model(**inputs, output_attentions=True)
        layers = oracle.entering(plain, prompt)
        for i, attention in enumerate(output.attentions):
            expected = oracle.attention(plain, i, *layers[i][:2])
            torch.testing.assert_close(attention[0], expected, atol=1e-5, rtol=1e-4)
    generated = generate(model, inputs, 3, output_attentions=True)
    for step, attentions in enumerate(generated.attentions):
        assert [a.shape[-1] for a in attentions] == [n + step for n in prompt.lengths(DEPTH)]


@some
@some_attn
def test_loss_and_gradients_are_the_oracles(name, positions, attn):
    method = pipeline(name, positions)
    plain, model, _ = pair(method, attn=attn)
    inputs = llava_inputs([TWO])
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == VIDEO, -100)
    expected = oracle.loss(plain, inputs, labels, method)
    got = model(**inputs, labels=labels).loss
    torch.testing.assert_close(got, expected, **oracle.TOLERANCE)
    expected.backward()
    got.backward()
    oracle.assert_same_gradients(plain, model)
    assert model.model.multi_modal_projector.linear_1.weight.grad.any()


@some
def test_padding_on_the_right(name, positions):
    """As trainers pad: the logits of every row are those of the row alone."""
    method = pipeline(name, positions)
    plain, model, _ = pair(method)
    inputs = llava_inputs([ONE, TWO, [7, 8, 9]])
    padding = [int(n) for n in (inputs["attention_mask"] == 0).sum(1)]
    right = dict(inputs)
    for key in ("input_ids", "attention_mask"):
        right[key] = torch.stack([values.roll(-n) for values, n in zip(inputs[key], padding)])
    with torch.no_grad():
        for use_cache in (True, False):
            got = model(**right, use_cache=use_cache).logits
            for b in range(3):
                prompt = oracle.shorten(plain, oracle.row(right, b), method)
                expected = plain.lm_head(oracle.hidden_states(plain, prompt))
                torch.testing.assert_close(got[b, prompt.left], expected, **oracle.TOLERANCE)


def test_caller_positions_are_kept():
    method = pipeline("outer and three")
    plain, model, _ = pair(method)
    inputs = llava_inputs([ONE])
    # A shift of all positions changes no rotary attention, so all of them move together and no answer changes ...
    moved = torch.arange(inputs["input_ids"].shape[1])[None] + 11
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs, position_ids=moved).logits, logits(model, [ONE]), **oracle.TOLERANCE)
    # ... and stretched ones arrive at every layer.
    seen: list[Tensor] = []
    model.model.language_model.rotary_emb.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs.get("position_ids", args[-1])), with_kwargs=True
    )
    with torch.no_grad():
        model(**inputs, position_ids=moved * 3)
        prompt = oracle.shorten(plain, inputs, InnerPrune(layers=(2,)))
        handle = vidcompress.handle_of(model)
        handle.switch(InnerPrune(layers=(2,)))
        seen.clear()
        model(**inputs, position_ids=moved)
    assert torch.equal(seen[0], moved)
    assert torch.equal(seen[1], moved[:, prompt.left])


def test_the_model_without_its_head_can_be_compressed():
    plain, model = llava(), llava()
    method = pipeline("outer and three")
    compress(model.model, method)
    inputs = llava_inputs([TWO])
    prompt = oracle.shorten(plain, inputs, method)
    with torch.no_grad():
        hidden = model.model(**inputs).last_hidden_state
        torch.testing.assert_close(hidden[0, prompt.left], oracle.hidden_states(plain, prompt), **oracle.TOLERANCE)
    assert hidden.shape == (1, inputs["input_ids"].shape[1], HIDDEN)


def test_embedded_prompt_with_pixels():
    method = pipeline("three")
    plain, model, _ = pair(method)
    inputs = llava_inputs([TWO])
    expected = oracle.answer(plain, inputs, method)
    embedded = dict(inputs, inputs_embeds=model.get_input_embeddings()(inputs["input_ids"]).detach())
    del embedded["input_ids"]
    for use_cache in (True, False):
        assert torch.equal(generate(model, embedded, use_cache=use_cache).sequences[0], expected.tokens)


# -- batches -----------------------------------------------------------------------------------------------------------
@policies
@pytest.mark.parametrize("name", ["three", "outer and three"])
def test_every_row_of_a_padded_batch_as_if_alone(name, positions):
    method = pipeline(name, positions)
    plain, model, _ = pair(method)
    inputs = llava_inputs([ONE, [7, 8, 9], TWO])
    got = generate(model, inputs)
    uncached = generate(model, inputs, use_cache=False)
    for b in range(3):
        expected = oracle.answer(plain, oracle.row(inputs, b), method)
        agrees(got, inputs, expected, b)
        agrees(uncached, inputs, expected, b)


@pytest.mark.parametrize("name", REAL)
def test_every_row_of_a_padded_batch_as_if_alone_with_published_methods(name):
    method = pipeline(name)
    plain, model, _ = pair(method, attn="eager")
    inputs = llava_inputs([LATE, TWO, [7, 8, 9]])
    got = generate(model, inputs, 5)
    for b in range(3):
        agrees(got, inputs, oracle.answer(plain, oracle.row(inputs, b), method, steps=5), b)


class AtMost(Inner):
    """Keeps tokens of positive sum, as many as allowed: how many depends on the video."""

    @property
    def exact(self) -> bool:
        return False

    def reduce(self, tokens: Any, site: Any) -> Any:
        count = self.count(site, tokens.grid, tokens.entered, len(tokens))
        kept = (tokens.features.sum(-1) > 0).nonzero().squeeze(1)[:count]
        return vidcompress.Reduction(kept, len(tokens))


@policies
def test_rows_that_keep_different_numbers_of_tokens(positions):
    first, second = positions.removesuffix(" first"), positions
    other = {"keep": "renumber", "renumber": "keep"}[first] if second.endswith("first") else first
    method = Pipeline(
        [AtMost(retention_ratio=0.9, layers=(1,), positions=first), InnerMix(layers=(4,), positions=other)]
    )
    plain, model, handle = pair(method)
    inputs = llava_inputs([ONE, LATE, [7, 8, 9], TWO], seed=3)
    got = generate(model, inputs)
    assert len({s.after for s in handle.trace.last.steps}) > 2
    for b in range(4):
        agrees(got, inputs, oracle.answer(plain, oracle.row(inputs, b), method), b)


# -- turns -------------------------------------------------------------------------------------------------------------
@policies
@pytest.mark.parametrize("name", ["three", "outer and three"])
def test_second_and_third_turn_on_the_same_cache(name, positions):
    method = pipeline(name, positions)
    plain, model, handle = pair(method)
    inputs = llava_inputs([TWO])
    end = inputs["input_ids"].shape[1]
    cache = empty_cache(model)
    first = generate(model, inputs, 5, past_key_values=cache)
    assert cache.get_seq_length() == first.sequences.shape[1] - 1
    second = followed_by(first, inputs, [21, 22, 23])
    got = generate(model, second, past_key_values=cache)
    agrees(got, second, oracle.answer(plain, whole(second, inputs), method, turns=[(end, method)]))
    third = followed_by(got, second, [24, 25])
    got = generate(model, third, past_key_values=cache)
    agrees(got, third, oracle.answer(plain, whole(third, inputs), method, turns=[(end, method)]))
    assert type(cache).__name__ == "DynamicCache" and len(handle.trace) == 1
    predicted = handle.trace.last.layer_lengths
    assert stored(cache) == [n + third["input_ids"].shape[1] - end + 7 for n in predicted]


@some
def test_second_turn_of_a_padded_batch(name, positions):
    method = pipeline(name, positions)
    plain, model, _ = pair(method)
    inputs = llava_inputs([ONE, TWO, [7, 8, 9]])
    cache = empty_cache(model)
    second = followed_by(generate(model, inputs, 5, past_key_values=cache), inputs, [21, 22, 23])
    got = generate(model, second, past_key_values=cache)
    for b in range(3):
        turns = [(int(inputs["attention_mask"][b].sum()), method)]
        agrees(got, second, oracle.answer(plain, oracle.row(whole(second, inputs), b), method, turns=turns), b)


@policies
@pytest.mark.parametrize("name", ["three", "outer and three"])
@pytest.mark.parametrize(
    "texts",
    [[[5, 6, "V", 7, 40, 41, "V", 42, 43]], [[5, "V", 7, 40, "V", 42], [8, "V", 9, 43, "V", 44]]],
    ids=["single", "batch"],
)
def test_new_video_in_the_second_turn(texts, name, positions):
    """What the first turn kept stays; the second video is judged by its own question, the first turn in sight."""
    method = pipeline(name, positions)
    plain, model, handle = pair(method)
    all_turns = llava_inputs(texts)
    ids = all_turns["input_ids"]
    first, second = (all_turns["pixel_values_videos"][turn::2].contiguous() for turn in range(2))
    cut = texts[0].index("V") + 1 + 4 * FRAMES + 1  # one word after the first video
    cache = empty_cache(model)
    with torch.no_grad():
        model(input_ids=ids[:, :cut], pixel_values_videos=first, past_key_values=cache)
    kept = stored(cache)
    got = generate(model, dict(all_turns, pixel_values_videos=second), past_key_values=cache)
    for b in range(len(texts)):
        expected = oracle.answer(plain, oracle.row(all_turns, b), method, turns=[(cut, method)])
        agrees(got, all_turns, expected, b)
    assert [p.before for p in handle.trace] == [4 * FRAMES * len(texts)] * 2
    assert stored(cache) == [n + m + 7 for n, m in zip(kept, handle.trace.last.layer_lengths)]
    assert cache.get_seq_length() == ids.shape[1] + 7


SWITCHES = {
    "outer only, then inner": (["prune"], "outer and three"),
    "inner, then outer only": ("three", ["merge"]),
    "other layers": ("two", "three"),
    "inner, then outer and other layers": ("one", "outer and two"),
}


@pytest.mark.parametrize("positions", ["keep first", "renumber"])
@pytest.mark.parametrize("with_video", [True, False], ids=["second video", "text only"])
@pytest.mark.parametrize("how", SWITCHES)
def test_switching_between_turns(how, with_video, positions):
    """The cache's layers store prefixes of their own, and the new method begins stages elsewhere."""
    before, after = (
        Pipeline([METHODS[n[0]](positions=positions.split()[0])]) if isinstance(n, list) else pipeline(n, positions)
        for n in SWITCHES[how]
    )
    plain, model, handle = pair(before)
    text = [5, 6, "V", 7, 8, 40, "V", 42, 43] if with_video else [5, 6, "V", 7, 8, 40, 41, 42]
    all_turns = llava_inputs([text])
    ids, videos = all_turns["input_ids"], all_turns["pixel_values_videos"]
    cut = 2 + 4 * FRAMES + 1 + 2
    cache = empty_cache(model)
    with torch.no_grad():
        model(input_ids=ids[:, :cut], pixel_values_videos=videos[:1], past_key_values=cache)
        handle.switch(after)
        second = dict(without_mask(all_turns), pixel_values_videos=videos[1:])
        if not with_video:
            del second["pixel_values_videos"]
        got = generate(model, second, 5, past_key_values=cache)
        agrees(got, all_turns, oracle.answer(plain, all_turns, after, steps=5, turns=[(cut, before)]))
        # And a third turn, back under the first method.
        handle.switch(before)
        third = followed_by(got, all_turns, [44, 45])
        got = generate(model, third, 5, past_key_values=cache)
    turns = [(cut, before), (ids.shape[1], after)]
    agrees(got, third, oracle.answer(plain, whole(third, all_turns), before, steps=5, turns=turns))


@listening
def test_turn_of_text_before_the_video(positions):
    method = pipeline("outer and three", positions)
    plain, model, _ = pair(method)
    words = llava_inputs([[5, 6, 7], [8, 9]])
    cache = empty_cache(model)
    first = generate(model, words, 4, past_key_values=cache)
    video = llava_inputs([["V", 21], ["V", 22]])
    second = {
        "input_ids": torch.cat([first.sequences, video["input_ids"]], 1),
        "attention_mask": torch.cat([words["attention_mask"], torch.ones(2, 4), video["attention_mask"]], 1).long(),
        "pixel_values_videos": video["pixel_values_videos"],
    }
    got = generate(model, second, past_key_values=cache)
    for b in range(2):
        agrees(got, second, oracle.answer(plain, oracle.row(second, b), method), b)


@some
def test_manual_loop_of_a_padded_batch(name, positions):
    method = pipeline(name, positions)
    plain, model, _ = pair(method)
    inputs = llava_inputs([ONE, TWO])
    answers = [oracle.answer(plain, oracle.row(inputs, b), method) for b in range(2)]
    tokens = torch.stack([a.tokens for a in answers])
    mask = inputs["attention_mask"]
    with torch.no_grad():
        output = model(**inputs, position_ids=(mask.cumsum(1) - 1).clamp_min(0), use_cache=True)
        for step in range(tokens.shape[1]):
            for b in range(2):
                torch.testing.assert_close(output.logits[b, -1], answers[b].logits[step], **oracle.TOLERANCE)
            mask = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], 1)
            output = model(
                input_ids=tokens[:, step : step + 1],
                attention_mask=mask,
                position_ids=mask.sum(1, keepdim=True) - 1,
                past_key_values=output.past_key_values,
            )


@some
def test_later_turn_in_chunks(name, positions):
    """A later turn of several tokens, and then single ones, without the caller's mask and positions."""
    method = pipeline(name, positions)
    plain, model, _ = pair(method)
    inputs = llava_inputs([TWO])
    end = inputs["input_ids"].shape[1]
    words = torch.tensor([[21, 22, 23, 24, 25, 26]])
    everything = {"input_ids": torch.cat([inputs["input_ids"], words], 1)}
    prompt = oracle.shorten(plain, whole(everything, inputs), method, turns=[(end, method)])
    with torch.no_grad():
        expected = plain.lm_head(oracle.hidden_states(plain, prompt))[-6:]
        cache = model(**without_mask(inputs), use_cache=True).past_key_values
        got = [model(input_ids=part, past_key_values=cache).logits[0] for part in words.split([3, 1, 2], 1)]
    torch.testing.assert_close(torch.cat(got), expected, **oracle.TOLERANCE)


# -- beams and samples -------------------------------------------------------------------------------------------------
@some
@pytest.mark.parametrize(
    "texts, num_beams",
    [([ONE, LATE], 2), pytest.param([ONE, TWO], 4, marks=needs_grouped_videos)],
    ids=["one each", "two in a row"],
)
def test_beams_with_and_without_cache_and_alone(texts, name, positions, num_beams):
    _, model, handle = pair(pipeline(name, positions))
    inputs = llava_inputs(texts)
    got = generate(model, inputs, 6, num_beams=num_beams)
    assert {s.row // num_beams for s in handle.trace.last.steps} == {0, 1}
    assert torch.equal(got.sequences, generate(model, inputs, 6, num_beams=num_beams, use_cache=False).sequences)
    for b in range(2):
        alone = oracle.row(inputs, b)
        expected = generate(model, alone, 6, num_beams=num_beams)
        assert torch.equal(new_tokens(got, inputs)[b], new_tokens(expected, alone)[0])


@some
def test_return_sequences_are_samples_of_the_repeated_prompt(name, positions):
    _, model, _ = pair(pipeline(name, positions))
    inputs = llava_inputs([ONE, LATE])
    torch.manual_seed(7)
    got = generate(model, inputs, 5, do_sample=True, num_return_sequences=3)
    repeated = {key: value.repeat_interleave(3, 0) for key, value in inputs.items()}
    torch.manual_seed(7)
    assert torch.equal(got.sequences, generate(model, repeated, 5, do_sample=True).sequences)


@pytest.mark.parametrize("name, positions", [("two", "renumber"), ("outer and two", "renumber")])
def test_beams_in_the_second_turn(name, positions):
    """What these methods keep does not depend on the text, so the whole prompt at once must give the same."""
    _, model, _ = pair(pipeline(name, positions))
    inputs = llava_inputs([ONE, [7, 8, 9]])
    cache = empty_cache(model)
    second = followed_by(generate(model, inputs, 5, past_key_values=cache), inputs, [21, 22, 23])
    cache.batch_repeat_interleave(3)  # as generate() wants a cache for beams
    got = generate(model, second, num_beams=3, past_key_values=cache)
    assert torch.equal(got.sequences, generate(model, whole(second, inputs), num_beams=3).sequences)


@some
@pytest.mark.parametrize(
    "change, rows",
    [
        (lambda cache: cache.reorder_cache(torch.tensor([2, 0, 1])), [2, 0, 1]),
        (lambda cache: cache.batch_select_indices(torch.tensor([1])), [1]),
        (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
    ],
    ids=["reorder", "select", "repeat"],
)
def test_rows_of_a_cache_can_be_rearranged(change, rows, name, positions):
    method = pipeline(name, positions)
    plain, model, _ = pair(method)
    inputs = llava_inputs([ONE, TWO, LATE])
    with torch.no_grad():
        place = (inputs["attention_mask"].cumsum(1) - 1).clamp_min(0)
        cache = model(**inputs, position_ids=place, use_cache=True).past_key_values
    change(cache)
    words = torch.tensor([[21, 22, 23]] * 3)
    everything = dict(
        inputs,
        input_ids=torch.cat([inputs["input_ids"], words], 1),
        attention_mask=torch.cat([inputs["attention_mask"], torch.ones_like(words)], 1),
    )
    second = {key: everything[key][rows] for key in ("input_ids", "attention_mask")}
    got = generate(model, second, 5, past_key_values=cache)
    for b, r in enumerate(rows):
        turns = [(int(inputs["attention_mask"][r].sum()), method)]
        agrees(got, second, oracle.answer(plain, oracle.row(everything, r), method, steps=5, turns=turns), b)


# -- caches ------------------------------------------------------------------------------------------------------------
def test_what_a_state_says_of_every_layer():
    one, two = torch.ones(2, 9, dtype=torch.bool), torch.ones(2, 5, dtype=torch.bool)
    state = CacheState(12, (CachedPrefix(0, one), CachedPrefix(3, two, torch.tensor([4, 2]))))
    assert [state.removed(layer) for layer in range(5)] == [3, 3, 3, 7, 7]
    state.map(lambda rows: rows[[1, 1, 0]])
    assert state.at(4).following.tolist() == [2, 2, 4] and state.at(2).following is None
    assert state.at(2).mask.shape == (3, 9) and state.at(3).mask.shape == (3, 5)


def test_what_follows_continues_the_count_of_a_layer():
    # Row 0 ends at position 6 here, row 1 is not numbered anew, row 2 gets its first token later than the others.
    prefix = CachedPrefix(3, torch.ones(3, 5, dtype=torch.bool), torch.tensor([7, -1, 5]), end=30)
    assert prefix.renumbered.tolist() == [True, False, True] and prefix.shift is None
    assert prefix.cropped(31) is prefix
    cropped = prefix.cropped(28)
    assert cropped.following.tolist() == [5, -1, 3]
    first = cropped.continued(torch.tensor([20, 21, 0]), torch.tensor([True, True, False]))
    assert first.shift[:2].tolist() == [15, 0] and first.open.tolist() == [False, False, True]
    second = first.continued(torch.tensor([30, 31, 40]), torch.tensor([True, True, True]))
    assert second.shift.tolist() == [15, 0, 37] and second.open is None
    assert second.continued(torch.tensor([50, 50, 50]), torch.tensor([True] * 3)) is second
    again = second.cropped(28)  # what followed is gone, and the caller's positions may go on otherwise
    assert again.following.tolist() == [5, -1, 3] and again.shift is None
    plain = CachedPrefix(0, torch.ones(3, 5, dtype=torch.bool))
    assert plain.continued(torch.tensor([1, 2, 3]), torch.tensor([True] * 3)) is plain and plain.cropped(1) is plain


@policies
@pytest.mark.parametrize("texts", [[TWO], [ONE, TWO, [7, 8, 9]]], ids=["single", "batch"])
def test_static_cache_equals_dynamic(texts, positions):
    _, model, _ = pair(pipeline("outer and three", positions))
    inputs = llava_inputs(texts)
    dynamic, static = generate(model, inputs), generate(model, inputs, cache_implementation="static")
    assert torch.equal(dynamic.sequences, static.sequences)
    torch.testing.assert_close(step_logits(dynamic), step_logits(static), **oracle.TOLERANCE)


@some
@pytest.mark.parametrize("with_video", [True, False], ids=["second video", "text only"])
def test_second_turn_on_a_static_cache(name, positions, with_video):
    method = pipeline(name, positions)
    plain, model, _ = pair(method)
    all_turns = llava_inputs([[5, 6, "V", 7, 8, 40, *(["V"] if with_video else []), 42, 43]])
    ids, videos = all_turns["input_ids"], all_turns["pixel_values_videos"]
    cut = 2 + 4 * FRAMES + 1 + 2
    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=128)
    with torch.no_grad():
        model(input_ids=ids[:, :cut], pixel_values_videos=videos[:1], past_key_values=cache)
    assert cache.get_seq_length() == cut
    second = dict(all_turns, pixel_values_videos=videos[1:])
    if not with_video:
        del second["pixel_values_videos"]
    got = generate(model, second, past_key_values=cache)
    agrees(got, all_turns, oracle.answer(plain, all_turns, method, turns=[(cut, method)]))
    assert cache.get_seq_length() == ids.shape[1] + 7


@policies
@pytest.mark.parametrize("name, removed", [("outer and two", (1, 6, 9)), ("outer and three", (1, 6))])
def test_cropped_cache_continues_as_recomputed(name, removed, positions):
    """6 tokens were decoded into the cache; before them are 3 words, by which the second method judges, and a video."""
    method = pipeline(name, positions)
    plain, model, _ = pair(method)
    inputs = llava_inputs([TWO])
    length = inputs["input_ids"].shape[1]
    for remove in removed:
        cache = empty_cache(model)
        first = generate(model, inputs, 7, past_key_values=cache)
        before = stored(cache)
        cache.crop(-remove)
        assert stored(cache) == [n - remove for n in before]
        assert cache.get_seq_length() == length + 6 - remove
        other = {"input_ids": torch.cat([first.sequences[:, : length + 6 - remove], torch.tensor([[50, 51]])], 1)}
        got = generate(model, other, 5, past_key_values=cache)
        turns = [(length, method)] if remove <= 6 else []
        agrees(got, other, oracle.answer(plain, whole(other, inputs), method, steps=5, turns=turns))


def test_a_reset_static_cache_starts_anew():
    method = pipeline("outer and three", "renumber")
    plain, model, _ = pair(method)
    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=128)
    generate(model, llava_inputs([TWO]), past_key_values=cache)
    cache.reset()
    assert cache.get_seq_length() == 0
    inputs = llava_inputs([ONE], seed=5)
    agrees(generate(model, inputs, past_key_values=cache), inputs, oracle.answer(plain, inputs, method))


def test_crop_into_the_compressed_prompt_is_refused():
    method = pipeline("three")
    plain, model, _ = pair(method)
    inputs = llava_inputs([ONE])
    length = inputs["input_ids"].shape[1]
    cache = empty_cache(model)
    first = generate(model, inputs, 4, past_key_values=cache)
    before = stored(cache)
    for target in (2, 20, -length):
        with pytest.raises(ValueError, match=f"cannot crop this cache from {length + 3} to .*: its first .*compressed"):
            cache.crop(target)
    assert stored(cache) == before
    second = followed_by(first, inputs, [21])
    expected = oracle.answer(plain, whole(second, inputs), method, turns=[(length, method)])
    agrees(generate(model, second, past_key_values=cache), second, expected)


@some
def test_copied_and_saved_cache_serves_several_continuations(name, positions, tmp_path):
    method = pipeline(name, positions)
    plain, model, _ = pair(method)
    inputs = llava_inputs([TWO])
    end = inputs["input_ids"].shape[1]
    with torch.no_grad():
        prefix = model(**inputs, use_cache=True).past_key_values
    torch.save(prefix, tmp_path / "cache.pt")
    loaded = torch.load(tmp_path / "cache.pt", weights_only=False)
    assert type(loaded) is type(prefix)
    for words, cache in (([21, 22], copy.deepcopy(prefix)), ([31, 32, 33], copy.deepcopy(prefix)), ([34], loaded)):
        prompt = {"input_ids": torch.cat([inputs["input_ids"], torch.tensor([words])], 1)}
        got = generate(model, prompt, past_key_values=cache)
        agrees(got, prompt, oracle.answer(plain, whole(prompt, inputs), method, turns=[(end, method)]))
    assert prefix.get_seq_length() == end


def test_the_caches_bytes_are_those_predicted():
    method = pipeline("outer and three")
    _, model, _ = pair(method)
    inputs = llava_inputs([ONE])
    with torch.no_grad():
        cache = model(**inputs, use_cache=True).past_key_values
    text = model.config.get_text_config()
    each = 2 * text.num_key_value_heads * (text.hidden_size // text.num_attention_heads) * 4
    others = inputs["input_ids"].shape[1] - 4 * FRAMES
    predicted = [each * (others + n) for n in method.lengths(video_grid(FRAMES), DEPTH)]
    assert [layer.keys.nbytes + layer.values.nbytes for layer in cache.layers] == predicted
    assert isinstance(cache, DynamicCache)


# -- assistants --------------------------------------------------------------------------------------------------------
REPETITIVE = [5, 6, 7, 5, 6, 7, "V", 5, 6, 7, 5, 6]


@some
@pytest.mark.parametrize("text", [TWO, REPETITIVE], ids=["two", "repetitive"])
def test_prompt_lookup_equals_greedy(text, name, positions):
    _, model, _ = pair(pipeline(name, positions))
    inputs = llava_inputs([text])
    greedy = generate(model, inputs, 12)
    assert torch.equal(greedy.sequences, generate(model, inputs, 12, prompt_lookup_num_tokens=3).sequences)


@some
@pytest.mark.parametrize("assistant", ["compressed", "plain", "other weights"])
def test_assisted_decoding_equals_greedy(assistant, name, positions):
    plain, model, _ = pair(pipeline(name, positions))
    helper = {"plain": plain, "compressed": copy.deepcopy(model), "other weights": llava(layers=2, seed=1)}[assistant]
    inputs = llava_inputs([TWO])
    greedy = generate(model, inputs, 12)
    assert torch.equal(greedy.sequences, generate(model, inputs, 12, assistant_model=helper).sequences)


# -- lifecycle ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["three", "outer and three", "hieravid"])
def test_removing_restores_the_model(name):
    model, inputs = llava(), llava_inputs([ONE, TWO])
    full, answer = logits(model), generate(model, inputs)
    before = anatomy(model)
    handle = compress(model, pipeline(name))
    assert anatomy(model) != before
    assert not torch.equal(logits(model), full)
    generate(model, inputs, 3)
    handle.remove()
    assert anatomy(model) == before
    assert torch.equal(logits(model), full)
    assert torch.equal(step_logits(generate(model, inputs)), step_logits(answer))


def test_switching_is_like_applying_anew():
    _, model, handle = pair(pipeline("three"))
    logits(model)
    for name in ("outer and two", "fastv", "unified", "one"):
        _, fresh, _ = pair(pipeline(name, "renumber"))
        with without_head():
            handle.switch(pipeline(name, "renumber"))
        assert torch.equal(logits(model), logits(fresh))
        assert anatomy(model) == anatomy(fresh)


def test_copies_and_pickles_compress_by_themselves(tmp_path):
    plain, model, handle = pair(pipeline("outer and three"))
    torch.save(model, tmp_path / "model.pt")
    expected = logits(model)
    twin, loaded = copy.deepcopy(model), torch.load(tmp_path / "model.pt", weights_only=False)
    handle.remove()
    assert torch.equal(logits(model), logits(plain))
    inputs = llava_inputs([ONE, TWO])
    for other in (twin, loaded):
        assert torch.equal(logits(other), expected)
        assert generate(other, inputs, 3).sequences.shape[0] == 2
        vidcompress.handle_of(other).remove()
        assert torch.equal(logits(other), logits(plain))


@pytest.mark.filterwarnings("ignore::UserWarning:accelerate", "ignore::FutureWarning:accelerate")
@pytest.mark.parametrize("order", ["offload first", "compress first"])
@pytest.mark.parametrize("how", OFFLOAD)
def test_offloaded_models_answer_the_same(how, order, tmp_path):
    _, model, _ = pair(pipeline("outer and three", "renumber first"))
    offloaded = llava()
    if order == "compress first":
        compress(offloaded, pipeline("outer and three", "renumber first"))
    OFFLOAD[how](offloaded, str(tmp_path))
    if order == "offload first":
        compress(offloaded, pipeline("outer and three", "renumber first"))
    assert offloaded.model.language_model.layers[0].self_attn.q_proj.weight.device.type == "meta"
    assert torch.equal(logits(offloaded), logits(model))
    with torch.no_grad():
        caches = [m(**llava_inputs([ONE, TWO]), use_cache=True).past_key_values for m in (model, offloaded)]
        for word in (20, 21):
            step = {"input_ids": torch.full((2, 1), word)}
            expected, got = (m(**step, past_key_values=cache).logits for m, cache in zip((model, offloaded), caches))
            assert torch.equal(got, expected)
    if how == "dispatch_model":
        inputs = llava_inputs([ONE, TWO])
        assert torch.equal(generate(offloaded, inputs).sequences, generate(model, inputs).sequences)
    vidcompress.handle_of(offloaded).remove()
    assert torch.equal(logits(offloaded), logits(llava()))


@pytest.mark.filterwarnings("ignore::UserWarning:accelerate")
def test_a_dispatched_decoder_layer_by_layer(tmp_path):
    """Every layer with a hook of accelerate's own, that moves its arguments."""
    _, model, _ = pair(pipeline("outer and three", "renumber first"))
    spread = llava()
    places = {f"model.language_model.layers.{i}": "disk" if i % 2 else "cpu" for i in range(DEPTH)}
    places |= {f"model.{n}": "cpu" for n in ("vision_tower", "multi_modal_projector", "image_newline")}
    places |= {f"model.language_model.{n}": "cpu" for n in ("embed_tokens", "norm", "rotary_emb")} | {"lm_head": "cpu"}
    accelerate.dispatch_model(spread, places, main_device="cpu", offload_dir=str(tmp_path), force_hooks=True)
    compress(spread, pipeline("outer and three", "renumber first"))
    assert torch.equal(logits(spread), logits(model))
    inputs = llava_inputs([ONE, TWO])
    assert torch.equal(generate(spread, inputs).sequences, generate(model, inputs).sequences)


def test_four_threads_at_once_equal_serial():
    _, model, handle = pair(pipeline("outer and three"))
    texts: list[list[Any]] = [[ONE], [TWO, LATE], [[7, 8, 9, 10]], [[5, "I", 6, "V", 7]]]
    prompts = [llava_inputs(t, frames=3 + i, seed=i) for i, t in enumerate(texts)]
    serial = [step_logits(generate(model, p, 6)) for p in prompts]
    handle.trace.clear()
    with ThreadPoolExecutor(4) as pool:
        outputs = [step_logits(f.result()) for f in [pool.submit(generate, model, p, 6) for p in prompts * 2]]
    for i, output in enumerate(outputs):
        assert torch.equal(output, serial[i % 4])
    assert sorted(p.before for p in handle.trace) == sorted([12, 4 * 4 * 3, 4 * 6] * 2)


def test_trace_off_changes_nothing():
    _, model, _ = pair(pipeline("outer and three"))
    silent = llava()
    handle = compress(silent, pipeline("outer and three"), trace=False)
    assert torch.equal(logits(silent), logits(model))
    assert len(handle.trace) == 0


def test_what_the_trace_says_of_inner_stages():
    _, model, handle = pair(pipeline("outer and three"))
    logits(model, [ONE])
    prompt = handle.trace.last
    assert [str(s.site) for s in prompt.steps] == ["projector", "decoder[1]", "decoder[2]", "decoder[4]"]
    assert [s.before for s in prompt.steps[1:]] == [s.after for s in prompt.steps[:-1]]
    assert (prompt.before, prompt.after) == (prompt.steps[0].before, prompt.steps[-1].after)
    assert prompt.length_after == prompt.layer_lengths[0]
    assert prompt.seconds > prompt.inner_seconds >= sum(s.seconds for s in prompt.steps[1:]) > 0


# -- refusals ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "methods, message",
    [
        ([InnerMix(layers=(2,)), InnerPrune(layers=(2,))], r"InnerMix and InnerPrune both act at decoder\[2\]"),
        ([InnerPrune(layers=(1, 3)), InnerMix(layers=(3,))], r"both act at decoder\[3\]"),
        ([METHODS["merge"](), METHODS["prune"]()], r"Mix and Prune both act at projector"),
        (
            [InnerMix(layers=(3,)), InnerPrune(layers=(1,))],
            r"InnerPrune acts at decoder\[1\], before InnerMix at .*order",
        ),
        ([InnerMix(layers=(0,)), METHODS["merge"]()], r"Mix acts at projector, before InnerMix at decoder\[0\]"),
    ],
)
def test_pipelines_that_cannot_be(methods, message):
    with pytest.raises(ValueError, match=message):
        Pipeline(methods)
    model = llava()
    before = anatomy(model)
    with pytest.raises(ValueError, match=message):
        vidcompress.apply(model, methods)
    assert anatomy(model) == before


def test_methods_that_meet_only_at_this_depth():
    """hieravid's layers follow the depth: 1, 3 and 4 of 6, but 7, 14 and 21 of 28."""
    methods = [vidcompress.load("hieravid"), InnerMix(layers=(4,))]
    model = llava()
    before = anatomy(model)
    with pytest.raises(ValueError, match=r"hieravid and InnerMix both act at decoder\[4\]"):
        vidcompress.apply(model, methods)
    assert anatomy(model) == before and vidcompress.handle_of(model) is None


def test_layers_that_add_vision_features(monkeypatch):
    monkeypatch.setattr(Patch, "deepstack_layers", lambda self, model: 3)
    model = llava()
    before = anatomy(model)
    for layers in ((0,), (2,), (1, 4)):
        with pytest.raises(
            ValueError, match=rf"InnerMix acts at decoder\[{layers[0]}\]; the first 3 .*begin at layer 3"
        ):
            vidcompress.apply(model, InnerMix(layers=layers))
    assert anatomy(model) == before
    handle = vidcompress.apply(model, InnerMix(layers=(3,)))
    with pytest.raises(ValueError, match="deepstack"):
        handle.switch("text_aware_merge", layer=2)
    logits(model)
    assert handle.trace.last.after < handle.trace.last.before
    handle.switch(METHODS["prune"]())  # before the decoder there is nothing against it
    logits(model)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
def test_gradient_checkpointing():
    """Layers would run a second time in the backward pass, when nobody knows what was kept."""
    _, model, handle = pair(pipeline("outer and two"))
    inputs = llava_inputs([TWO])
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == VIDEO, -100)
    expected = model(**inputs, labels=labels).loss
    model.gradient_checkpointing_enable()
    assert torch.equal(model(**inputs, labels=labels).loss, expected)  # in eval mode nothing runs twice
    model.train()
    with pytest.raises(ValueError, match=r"gradient checkpointing.*decoder\[2\], decoder\[5\].*_disable\(\)"):
        model(**inputs, labels=labels)
    words = llava_inputs([[5, 6, 7, 8]])
    model(**words, labels=words["input_ids"], use_cache=False).loss.backward()
    model.gradient_checkpointing_disable()
    torch.testing.assert_close(model(**inputs, labels=labels).loss, expected)
    model.gradient_checkpointing_enable()
    handle.switch(METHODS["merge"]())
    model(**inputs, labels=labels, use_cache=False).loss.backward()


def other_layer(model: Any, i: int) -> Any:
    """Puts another layer with the same weights in place of layer i, and returns the one that was there."""
    layers = model.model.language_model.layers
    own = layers[i]
    layers[i] = type(own)(model.config.text_config, i).eval()
    layers[i].load_state_dict(own.state_dict())
    return own


@pytest.mark.parametrize("call", [generate, lambda model, inputs: model(**inputs)], ids=["generate", "forward"])
@pytest.mark.parametrize("replaced", [1, 3, 4, 5])
def test_a_layer_that_was_replaced(call, replaced):
    """Where a method acts, or behind: there the decoder would hand it arguments of another length."""
    _, model, _ = pair(pipeline("two"))
    expected = logits(model)
    own = other_layer(model, replaced)
    with pytest.raises(
        RuntimeError, match=rf"decoder layers \[{replaced}\] of Qwen2Model were not called through their hooks"
    ):
        call(model, llava_inputs([ONE]))
    words = llava_inputs([[7, 8, 9]])
    assert torch.equal(generate(model, words).sequences, generate(llava(), words).sequences)
    model.model.language_model.layers[replaced] = own
    assert torch.equal(logits(model), expected)


def test_a_layer_that_was_replaced_between_turns():
    _, model, _ = pair(pipeline("two", "renumber"))
    with torch.no_grad():
        cache = model(**llava_inputs([ONE]), use_cache=True).past_key_values
        own = other_layer(model, 4)
        with pytest.raises(RuntimeError, match=r"decoder layers \[4\] of"):
            model(input_ids=torch.tensor([[7]]), past_key_values=cache)
        model.model.language_model.layers[4] = own
        assert model(input_ids=torch.tensor([[7]]), past_key_values=cache).logits.isfinite().all()


def test_a_method_that_breaks_its_count_inside():
    class Generous(InnerPrune):
        def top(self, tokens: Any, site: Any, score: Tensor) -> Any:
            return vidcompress.Reduction(torch.arange(len(tokens) - 1), len(tokens))

    plain, model, _ = pair(Generous(layers=(2,)))
    with pytest.raises(RuntimeError, match=r"Generous kept 23 tokens of 24 at decoder\[2\], not 14"):
        generate(model, llava_inputs([ONE]), 2)
    words = llava_inputs([[7, 8, 9]])
    assert torch.equal(generate(model, words).sequences, generate(plain, words).sequences)


def test_values_that_are_not_finite_inside():
    _, model, _ = pair(InnerMix(layers=(3,)))
    expected = logits(model)
    weight = model.model.language_model.layers[2].mlp.down_proj.weight.data
    healthy = weight.clone()
    weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"^input of decoder\[3\] of video 0 \(row 0\) holds NaN or inf"):
        logits(model)
    weight.copy_(healthy)
    assert torch.equal(logits(model), expected)


def test_a_turn_that_is_refused_inside_does_not_unlock_the_cache():
    _, model, handle = pair(InnerMix(layers=(3,)))
    cache = generate(model, llava_inputs([ONE]), 3).past_key_values
    weight = model.model.language_model.layers[2].mlp.down_proj.weight.data
    healthy = weight[0, 0].item()
    weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="holds NaN"):
        model(**without_mask(llava_inputs([ONE])), past_key_values=cache)
    weight[0, 0] = healthy
    handle.remove()
    with pytest.raises(RuntimeError, match="compressed prompt"):
        model(input_ids=torch.tensor([[7]]), past_key_values=cache)
