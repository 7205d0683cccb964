"""LLaVA-Video against `oracle`: newlines between the video's tokens, which stay as long as their row or frame does."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import oracle
import pytest
import test_engine
import test_engine_generate
import test_engine_inner
import test_engine_lifecycle
import tiny
import torch
from test_engine import decoder_inputs
from test_engine_generate import agrees, empty_cache, followed_by, needs_grouped_videos
from test_engine_inner import stored
from tiny import (
    FRAMES,
    METHODS,
    ONE,
    TWO,
    VIDEO,
    Text,
    anatomy,
    compress,
    generate,
    new_tokens,
    pipeline,
    step_logits,
)
from tiny_llava_video import llava_video, video_inputs
from torch import Tensor

from vidcompress import Handle, Method, Reduction, Site, VideoTokens
from vidcompress.method import Pipeline
from vidcompress.models.llava_video_config import NEWLINE_POSITIONS

DEPTH = 6
WORDS: Text = [7, 8, 9]


@pytest.fixture(params=NEWLINE_POSITIONS)
def newline(request):
    """`mm_newline_position`; skipped where this transformers cannot have it."""
    if request.param == "no_token":
        model = llava_video(newline="no_token")
        try:
            model.model.get_video_features(torch.zeros(1, 1, 3, tiny.IMAGE_SIZE, tiny.IMAGE_SIZE))
        except ValueError as error:
            pytest.skip(str(error))
    return request.param


def pair(newline: str, method: Method | Pipeline, **model: Any) -> tuple[Any, Any, Handle]:
    """A plain model, an equal one that is compressed, and its handle; 5 x 5 patches become 3 x 3 tokens a frame."""
    settings = {"pool": "bilinear", "image_size": 70, "newline": newline} | model
    plain, compressed = llava_video(**settings), llava_video(**settings)
    return plain, compressed, compress(compressed, method)


def line_of(newline: str, grid: tuple[int, int, int]) -> list[int]:
    """The line of every token of a video, where a newline ends each line."""
    t, h, w = grid
    token = range(t * h * w)
    return {
        "grid": [i // w for i in token],
        "frame": [i // (h * w) for i in token],
        "one_token": [0 for i in token],
        "no_token": [],
    }[newline]


# -- which newlines stay, by hand --------------------------------------------------------------------------------------
@dataclass(kw_only=True)
class Given(Method):
    """Keeps what it is told: `stages` holds, for every layer, places in the grid."""

    stages: dict[int, tuple[int, ...]]

    def __post_init__(self) -> None:
        pass

    def sites(self, depth: int = DEPTH) -> list[Site]:
        return [Site(layer, i) for i, layer in enumerate(self.stages)]

    def count(self, site: Site, grid: tuple[int, int, int], entered: int, before: int) -> int:
        return len(self.stages[site.layer])

    def settings(self) -> dict[str, Any]:
        return {}

    def reduce(self, tokens: VideoTokens, site: Site) -> Reduction:
        index = torch.arange(len(tokens)) if tokens.index is None else tokens.index
        return Reduction(torch.searchsorted(index, torch.tensor(self.stages[site.layer])), len(tokens))


# Two frames of 2 x 2; a capital letter is a newline.
LAYOUTS = {"grid": "abAcdBefCghD", "frame": "abcdAefghB", "one_token": "abcdefghA", "no_token": "abcdefgh"}
LEFT = {
    "grid": ["bAefCgD", "bAefC", "fC"],  # b, e, f, g; then b, e, f; then f
    "frame": ["bAefgB", "bAefB", "fB"],
    "one_token": ["befgA", "befA", "fA"],
    "no_token": ["befg", "bef", "f"],
}


def test_a_newline_stays_with_its_line(newline):
    method = Given(stages={-1: (1, 4, 5, 6), 2: (1, 4, 5), 4: (5,)})
    _, model, handle = pair(newline, method, pool="average", image_size=56)
    inputs = video_inputs(model, [[30, 31, "V", 7, 8]], frames=2)
    layout = "xy" + LAYOUTS[newline] + "uv"
    assert inputs["input_ids"].shape[1] == len(layout)
    left = ["xy" + letters + "uv" for letters in LEFT[newline]]
    expected = [[layout.index(letter) for letter in letters] for letters in left]
    with torch.no_grad():
        logits = model(**inputs).logits[0]
        hidden = model(**inputs, output_hidden_states=True).hidden_states
    assert logits.abs().sum(1).nonzero().squeeze(1).tolist() == expected[-1]
    for entered, columns in zip([0, 3, 5], expected):  # what entered layers 0, 2 and 4 left the layer before them
        assert hidden[entered][0].abs().sum(1).nonzero().squeeze(1).tolist() == columns
    prompt = handle.trace.last
    assert prompt.layer_lengths == [len(letters) for letters in left for _ in range(2)]
    assert (prompt.length_before, prompt.length_after) == (len(layout), len(left[0]))
    assert [(s.before, s.after) for s in prompt.steps] == [(8, 4), (4, 3), (3, 1)]
    assert (prompt.before, prompt.after) == (8, 1)
    assert [s.newlines for s in prompt.steps] == [sum(map(str.isupper, letters)) for letters in LEFT[newline]]


def test_newlines_are_handed_on_as_they_are(newline):
    """What enters the decoder: words, images and newlines bit by bit, the video's tokens merged."""
    method = METHODS["merge"]()
    plain, model, handle = pair(newline, method)
    inputs = video_inputs(model, [[5, "I", 6, "V", 7, "I", 8], [9, "V", 10]])
    (placed,), (arrived,) = decoder_inputs(plain, **inputs), decoder_inputs(model, **inputs)
    prompt = oracle.shorten(plain, oracle.row(inputs, 0), method)
    assert arrived.shape[1] == len(prompt)  # row 0 is the longer one and has no padding
    tokens = torch.zeros_like(inputs["input_ids"][0], dtype=torch.bool)
    _, is_newline = oracle.layout(model, inputs["pixel_values_videos"])
    tokens[inputs["input_ids"][0] == VIDEO] = ~is_newline
    merged = tokens[prompt.columns]
    assert int(merged.sum()) == handle.trace.last.steps[0].after
    assert torch.equal(arrived[0, ~merged], placed[0, prompt.columns[~merged]])
    torch.testing.assert_close(arrived[0, merged], prompt.embeds[0, merged])
    newlines = (inputs["input_ids"][0, prompt.columns] == VIDEO) & ~merged
    assert int(newlines.sum()) == handle.trace.last.steps[0].newlines
    assert (arrived[0, newlines] == model.model.image_newline).all()


# -- against the oracle ------------------------------------------------------------------------------------------------
TWICE = [
    ("prune", "keep"),
    ("merge", "renumber"),
    ("one", "keep"),
    ("two", "renumber"),
    ("three", "keep first"),
    ("outer and one", "renumber"),
    ("outer and three", "renumber first"),
    ("infomerge", "keep"),
    ("hieravid", "renumber"),
    ("infomerge and text_aware_merge", "keep first"),
]
CASES = [(*case, "sdpa") for case in TWICE] + [("outer and three", "keep", "eager"), ("fastv", "renumber", "eager")]


def of(name: str, positions: str) -> Pipeline:
    """A pipeline, or one of `METHODS` alone."""
    if name in METHODS:
        return Pipeline([METHODS[name](positions=positions)])
    return pipeline(name, positions)


@pytest.mark.parametrize("name, positions, attn", CASES)
def test_every_row_of_a_padded_batch_as_recomputed(name, positions, attn, newline):
    """Rows of one video, of none and of two; and what the trace says of them."""
    method = of(name, positions)
    plain, model, handle = pair(newline, method, attn=attn)
    inputs = video_inputs(model, [ONE, WORDS, TWO], frames=4)
    total = inputs["input_ids"].shape[1]
    got = generate(model, inputs, 4)
    uncached = generate(model, inputs, 4, use_cache=False)
    lengths = []
    for b in range(3):
        alone = oracle.row(inputs, b)
        expected = oracle.answer(plain, alone, method, steps=4)
        agrees(got, inputs, expected, b)
        agrees(uncached, inputs, expected, b)
        lengths.append(oracle.shorten(plain, alone, method).lengths(DEPTH))
    prompt = handle.trace[0]
    assert prompt.layer_lengths == [max(each) for each in zip(*lengths)]
    assert (prompt.length_before, prompt.length_after) == (total, prompt.layer_lengths[0])
    assert stored(got.past_key_values) == [n + 3 for n in prompt.layer_lengths]
    assert got.past_key_values.get_seq_length() == total + 3
    grid = (4, 3, 3)
    counts = method.counts(grid, DEPTH)
    assert [(s.site, s.row, s.video, s.grid, s.after) for s in prompt.steps] == [
        (site, row, video, grid, n) for site, n in counts.items() for row, video in [(0, 0), (2, 1), (2, 2)]
    ]
    assert (prompt.before, prompt.after) == (3 * math.prod(grid), 3 * method.lengths(grid, DEPTH)[-1])
    line = line_of(newline, grid)
    left = {v: torch.arange(math.prod(grid)) for v in range(3)}
    for step in prompt.steps:
        left[step.video] = left[step.video][step.reduction.keep]
        assert step.newlines == len({line[i] for i in left[step.video].tolist()} if line else ())


@pytest.mark.parametrize("name", ["merge", "outer and three"])
@pytest.mark.parametrize("positions", ["keep", "renumber"])
def test_new_video_in_the_second_turn(name, positions, newline):
    """Newlines of the first turn's video that are gone stay gone, and the second one's are judged by its own tokens."""
    method = of(name, positions)
    plain, model, handle = pair(newline, method)
    inputs = video_inputs(model, [[5, "V", 7, 40, "V", 42, 43], [8, "V", 9, 41, "V", 44, 45]], frames=4)
    ids, videos = inputs["input_ids"], inputs["pixel_values_videos"]
    cut = 1 + len(oracle.layout(model, videos)[1]) + 1  # one word after the first video
    cache = empty_cache(model)
    with torch.no_grad():
        model(input_ids=ids[:, :cut], pixel_values_videos=videos[::2].contiguous(), past_key_values=cache)
    kept = stored(cache)
    second = dict(inputs, pixel_values_videos=videos[1::2].contiguous())
    got = generate(model, second, 4, past_key_values=cache)
    for b in range(2):
        expected = oracle.answer(plain, oracle.row(inputs, b), method, steps=4, turns=[(cut, method)])
        agrees(got, inputs, expected, b)
    assert [p.before for p in handle.trace] == [2 * 4 * 9] * 2
    assert stored(cache) == [n + m + 3 for n, m in zip(kept, handle.trace.last.layer_lengths)]
    assert cache.get_seq_length() == ids.shape[1] + 3


@pytest.mark.parametrize("name", ["merge", "outer and three"])
def test_text_in_the_second_turn(name, newline):
    method = of(name, "renumber")
    plain, model, handle = pair(newline, method)
    inputs = video_inputs(model, [ONE, TWO])
    cache = empty_cache(model)
    second = followed_by(generate(model, inputs, 4, past_key_values=cache), inputs, [21, 22, 23])
    got = generate(model, second, 4, past_key_values=cache)
    whole = dict(second, pixel_values_videos=inputs["pixel_values_videos"])
    for b in range(2):
        turns = [(int(inputs["attention_mask"][b].sum()), method)]
        agrees(got, second, oracle.answer(plain, oracle.row(whole, b), method, steps=4, turns=turns), b)
    assert len(handle.trace) == 1


@needs_grouped_videos
@pytest.mark.parametrize("name", ["merge", "outer and three"])
def test_beams_of_a_batch_as_of_every_row_alone(name, newline):
    _, model, handle = pair(newline, of(name, "renumber"))
    inputs = video_inputs(model, [ONE, TWO])
    got = generate(model, inputs, 5, num_beams=2)
    assert {(s.row, s.video) for s in handle.trace.last.steps} == {(0, 0), (2, 1), (2, 2)}  # decided once
    assert torch.equal(got.sequences, generate(model, inputs, 5, num_beams=2, use_cache=False).sequences)
    for b in range(2):
        row = oracle.row(inputs, b)
        assert torch.equal(new_tokens(generate(model, row, 5, num_beams=2), row)[0], new_tokens(got, inputs)[b])


def test_keeping_all_is_bit_identical_in_every_layer(newline):
    whole = [f(retention_ratio=1.0) for f in tiny.PIPELINES["outer and three"]]
    plain, model, handle = pair(newline, Pipeline(whole), attn="eager")
    inputs = video_inputs(model, [ONE, TWO])
    expected, got = generate(plain, inputs, 4), generate(model, inputs, 4)
    assert torch.equal(step_logits(expected), step_logits(got))
    assert handle.trace.last.layer_lengths == [inputs["input_ids"].shape[1]] * DEPTH
    newlines = len(set(line_of(newline, (FRAMES, 3, 3))))
    assert {(s.before, s.after, s.newlines) for s in handle.trace.last.steps} == {(9 * FRAMES, 9 * FRAMES, newlines)}
    with torch.no_grad():
        a, b = (m(**inputs, use_cache=False, output_hidden_states=True) for m in (plain, model))
    assert all(torch.equal(x, y) for x, y in zip(a.hidden_states, b.hidden_states, strict=True))


@pytest.mark.parametrize("name", ["merge", "outer and three"])
def test_loss_and_gradients_are_the_oracles(name, newline):
    """The newline learns through those of its places that stay, and so do vision tower and projector."""
    method = of(name, "renumber")
    plain, model, _ = pair(newline, method)
    inputs = video_inputs(model, [TWO])
    unsaid = inputs["input_ids"] == VIDEO
    unsaid[:, 1:] |= unsaid[:, :-1].clone()  # a newline that is gone predicts nothing of what follows
    labels = inputs["input_ids"].masked_fill(unsaid, -100)
    expected = oracle.loss(plain, inputs, labels, method)
    got = model(**inputs, labels=labels).loss
    torch.testing.assert_close(got, expected, **oracle.TOLERANCE)
    expected.backward()
    got.backward()
    oracle.assert_same_gradients(plain, model)
    assert bool(model.model.image_newline.grad.any()) == (newline != "no_token")
    assert model.model.multi_modal_projector.linear_1.weight.grad.any()


def test_a_prompt_that_ends_in_a_video(newline):
    """Its last token, from which the answer begins, may be a newline whose line goes."""
    method = METHODS["merge"]()
    plain, model, _ = pair(newline, method)
    inputs = video_inputs(model, [[5, 6, "V"]])
    if newline == "one_token":
        agrees(generate(model, inputs, 4), inputs, oracle.answer(plain, inputs, method, steps=4))
    else:
        with pytest.raises(ValueError, match="the prompt ends inside a video"):
            model(**inputs)


def test_removing_restores_the_model(newline):
    model = llava_video(newline=newline)
    inputs = video_inputs(model, [ONE, TWO])
    expected = generate(model, inputs, 3)
    before = anatomy(model)
    handle = compress(model, of("outer and three", "keep"))
    assert not torch.equal(step_logits(generate(model, inputs, 3)), step_logits(expected))
    handle.remove()
    assert anatomy(model) == before
    assert torch.equal(step_logits(generate(model, inputs, 3)), step_logits(expected))


@pytest.mark.parametrize("line", ["grid", "frame"])
def test_a_prompt_with_too_few_placeholders_is_refused(line):
    """As when the processor counted newlines otherwise than the model does."""
    _, model, _ = pair(line, METHODS["prune"]())
    inputs = video_inputs(model, [ONE])
    short = {key: torch.cat([inputs[key][:, :3], inputs[key][:, 4:]], 1) for key in ("input_ids", "attention_mask")}
    model(**inputs)
    before = anatomy(model)
    with pytest.raises(ValueError, match=r"video placeholders|tokens do not match"):
        model(**inputs | short)
    assert anatomy(model) == before


# -- the tests of LLaVA-OneVision --------------------------------------------------------------------------------------
E, G, N = test_engine, test_engine_generate, test_engine_inner
three: dict[str, Any] = {"name": "outer and three", "positions": "renumber first"}
reordered: dict[str, Any] = {
    "change": lambda cache: cache.reorder_cache(torch.tensor([2, 0, 1])),
    "rows": [2, 0, 1],
}
AGAIN: list[tuple[Callable[..., None], dict[str, Any]]] = [
    (E.test_half_precision, {"dtype": torch.bfloat16}),
    (E.test_prompts_without_video_are_untouched_and_not_traced, {"texts": [[5, "I", 7], [9, "I", "I"]], "cache": None}),
    (E.test_answers_as_recomputed, {"name": "fastvid", "text": TWO, "positions": "keep", "attn": "eager"}),
    (E.test_forward_gives_the_survivors_logits_at_the_callers_places, {"name": "merge", "positions": "renumber"}),
    (E.test_other_shapes, {"name": "infomerge", "image_size": 70, "frames": 5}),  # 5 x 5 patches, 2 x 2 tokens
    (E.test_other_shapes, {"name": "merge", "image_size": 28, "frames": 4}),
    (E.test_other_shapes, {"name": "prune", "image_size": 56, "frames": 1}),
    (E.test_caller_positions_are_kept, {}),
    (E.test_layers_get_contiguous_positions_and_the_rotary_embedding_gappy_ones, {}),
    (E.test_the_model_without_its_head_can_be_compressed, {}),
    (E.test_logits_to_keep, {}),
    (E.test_tuples_instead_of_outputs, {}),
    (E.test_embedded_prompt_with_pixels, {}),
    (E.test_gradient_checkpointing_gives_the_same_gradients, {}),
    (E.test_padding_on_the_right, {"positions": "renumber"}),
    (G.test_rows_that_keep_different_numbers_of_tokens, {}),
    (G.test_turn_of_text_before_the_video, {"positions": "renumber"}),
    (G.test_manual_loop_of_a_padded_batch, {"positions": "renumber"}),
    (G.test_rows_of_a_cache_can_be_rearranged, {**reordered, "positions": "keep"}),
    (G.test_crop_into_the_compressed_prompt_is_refused, {}),
    (N.test_every_signal_decides_as_recomputed, {"signal": "text_attention.heads", "positions": "renumber"}),
    (N.test_every_signal_decides_as_recomputed, {"signal": "last_text_hidden", "positions": "keep"}),
    (N.test_the_first_and_the_last_layer, {"layers": (0, 1, 2)}),
    (N.test_the_first_and_the_last_layer, {"layers": (5,)}),
    (N.test_at_least_one_token_stays, {}),
    (N.test_images_and_neighbours, {"text": [5, "I", 6, "V", "V", "I", 8], "positions": "renumber"}),
    (N.test_nothing_that_is_decoded_is_seen, {"use_cache": False}),
    (N.test_forward_gives_the_survivors_logits_at_the_callers_places, three),
    (N.test_hidden_states_have_the_callers_length, {**three, "use_cache": True}),
    (N.test_attentions_are_those_of_every_layers_sequence, three),
    (N.test_padding_on_the_right, three),
    (N.test_rows_that_keep_different_numbers_of_tokens, {"positions": "keep first"}),
    (N.test_rows_of_a_cache_can_be_rearranged, {**three, **reordered}),
    (N.test_static_cache_equals_dynamic, {"texts": [ONE, TWO, WORDS], "positions": "renumber"}),
    (N.test_cropped_cache_continues_as_recomputed, {"name": "outer and two", "removed": (6, 9), "positions": "keep"}),
    (N.test_prompt_lookup_equals_greedy, {**three, "text": TWO}),
    (N.test_return_sequences_are_samples_of_the_repeated_prompt, three),
    (N.test_switching_is_like_applying_anew, {}),
    (N.test_four_threads_at_once_equal_serial, {}),
    (N.test_trace_off_changes_nothing, {}),
]


@pytest.mark.parametrize("line", ["grid", "frame"])
@pytest.mark.parametrize("test, arguments", AGAIN, ids=lambda x: getattr(x, "__name__", ""))
def test_what_llava_onevision_is_tested_for(test, arguments, line, monkeypatch):
    """The same tests, given this model: nothing in them knows where newlines stand."""

    def model(*args: Any, **kwargs: Any) -> Any:
        return llava_video("average", line, *args, **kwargs)

    def inputs(*args: Any, image_size: int = tiny.IMAGE_SIZE, **kwargs: Any) -> dict[str, Tensor]:
        return video_inputs(shapes(image_size), *args, **kwargs)

    def shapes(image_size: int) -> Any:
        if image_size not in built:
            built[image_size] = model(image_size=image_size)
        return built[image_size]

    built: dict[int, Any] = {}
    for module in (tiny, test_engine, test_engine_generate, test_engine_inner, test_engine_lifecycle):
        for name, replaced in (("llava", model), ("llava_inputs", inputs)):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, replaced)
    test(**arguments)
