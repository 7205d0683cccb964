"""generate() in all its ways: batches, turns, beams, sampling, other caches, assistants, threads."""

from __future__ import annotations

import copy
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import accelerate
import oracle
import pytest
import torch
from tiny import (
    FRAMES,
    LATE,
    METHODS,
    ONE,
    TWO,
    AtMost,
    compress,
    generate,
    llava,
    llava_inputs,
    new_tokens,
    pair,
    step_logits,
    without_head,
    without_mask,
)
from torch import Tensor
from transformers import CompileConfig, DynamicCache, GenerationMixin, Qwen2ForCausalLM, StaticCache

needs_grouped_videos = pytest.mark.skipif(
    not hasattr(GenerationMixin, "_expand_multimodal_outputs"),
    reason="this transformers repeats a sample's videos A, B as A, A, B, B for its beams, compressed or not",
)
positions_policies = pytest.mark.parametrize("positions", ["keep", "renumber"])


def followed_by(output: Any, inputs: dict[str, Tensor], words: list[int]) -> dict[str, Tensor]:
    """The next turn's prompt: all that was said, and `words` in every row."""
    ids = torch.cat([output.sequences, torch.tensor([words] * len(output.sequences))], 1)
    real = torch.ones(len(ids), ids.shape[1] - inputs["input_ids"].shape[1], dtype=torch.long)
    return {"input_ids": ids, "attention_mask": torch.cat([inputs["attention_mask"], real], 1)}


def empty_cache(model: Any) -> DynamicCache:
    return DynamicCache(config=model.config.get_text_config())


def agrees(output: Any, inputs: dict[str, Tensor], expected: oracle.Answer, b: int = 0) -> None:
    """Row b of what generate() returned is what the oracle answers."""
    assert torch.equal(new_tokens(output, inputs)[b], expected.tokens)
    torch.testing.assert_close(step_logits(output)[b], expected.logits, **oracle.TOLERANCE)


# -- batches -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@positions_policies
@pytest.mark.parametrize("name", METHODS)
def test_every_row_of_a_padded_batch_as_if_alone(name, positions, attn):
    method = METHODS[name](positions=positions)
    plain, model, handle = pair(method, attn=attn)
    inputs = llava_inputs([ONE, TWO, LATE])
    got = generate(model, inputs)
    assert [(s.row, s.video) for s in handle.trace.last.steps] == [(0, 0), (1, 1), (1, 2), (2, 3)]
    uncached = generate(model, inputs, use_cache=False)
    for b in range(3):
        expected = oracle.answer(plain, oracle.row(inputs, b), method)
        agrees(got, inputs, expected, b)
        agrees(uncached, inputs, expected, b)


def test_rows_that_keep_different_numbers_of_tokens():
    method = AtMost(retention_ratio=0.9)
    plain, model, handle = pair(method)
    inputs = llava_inputs([ONE, LATE, [7, 8, 9], TWO], seed=3)
    got = generate(model, inputs)
    assert len({s.after for s in handle.trace.last.steps}) > 1
    for b in range(4):
        agrees(got, inputs, oracle.answer(plain, oracle.row(inputs, b), method), b)


# -- turns -------------------------------------------------------------------------------------------------------------
@positions_policies
@pytest.mark.parametrize("name", METHODS)
def test_second_turn_on_the_same_cache(name, positions):
    method = METHODS[name](positions=positions)
    plain, model, handle = pair(method)
    inputs = llava_inputs([TWO])
    cache = empty_cache(model)
    first = generate(model, inputs, 5, past_key_values=cache)
    assert cache.get_seq_length() == first.sequences.shape[1] - 1
    second = followed_by(first, inputs, [21, 22, 23])
    got = generate(model, second, past_key_values=cache)
    whole = dict(second, pixel_values_videos=inputs["pixel_values_videos"])
    agrees(got, second, oracle.answer(plain, whole, method))
    assert isinstance(cache, DynamicCache) and type(cache).__name__ == "DynamicCache"
    # A third one, without the caller's mask.
    third = followed_by(got, second, [24, 25])
    got = generate(model, without_mask(third), past_key_values=cache)
    agrees(got, third, oracle.answer(plain, dict(whole, **third), method))
    assert len(handle.trace) == 1


@positions_policies
@pytest.mark.parametrize("name", ["merge", "infomerge"])
def test_second_turn_of_a_padded_batch(name, positions):
    method = METHODS[name](positions=positions)
    plain, model, _ = pair(method)
    inputs = llava_inputs([ONE, TWO, LATE])
    cache = empty_cache(model)
    second = followed_by(generate(model, inputs, 5, past_key_values=cache), inputs, [21, 22, 23])
    got = generate(model, second, past_key_values=cache)
    whole = dict(second, pixel_values_videos=inputs["pixel_values_videos"])
    for b in range(3):
        agrees(got, second, oracle.answer(plain, oracle.row(whole, b), method), b)


@positions_policies
@pytest.mark.parametrize(
    "texts",
    [[[5, 6, "V", 7, 40, 41, "V", 42]], [[5, "V", 7, 40, "V", 42], [8, "V", 9, 43, "V", 44]]],
    ids=["single", "batch"],
)
def test_new_video_in_the_second_turn(texts, positions):
    method = METHODS["merge"](positions=positions)
    plain, model, handle = pair(method)
    whole = llava_inputs(texts)
    ids = whole["input_ids"]
    first, second = (whole["pixel_values_videos"][turn::2].contiguous() for turn in range(2))
    cut = texts[0].index("V") + 1 + 4 * FRAMES + 1  # one word after the first video
    cache = empty_cache(model)
    with torch.no_grad():
        model(input_ids=ids[:, :cut], pixel_values_videos=first, past_key_values=cache)
    assert cache.get_seq_length() == cut
    got = generate(model, dict(whole, pixel_values_videos=second), past_key_values=cache)
    for b in range(len(texts)):
        agrees(got, whole, oracle.answer(plain, oracle.row(whole, b), method), b)
    assert [p.before for p in handle.trace] == [4 * FRAMES * len(texts)] * 2


@positions_policies
def test_turn_of_text_before_the_video(positions):
    method = METHODS["merge"](positions=positions)
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


@positions_policies
@pytest.mark.parametrize("text", [ONE, TWO])
def test_manual_loop(text, positions):
    method = METHODS["merge"](positions=positions)
    plain, model, _ = pair(method)
    inputs = llava_inputs([text])
    expected = oracle.answer(plain, inputs, method)
    with torch.no_grad():
        output = model(**without_mask(inputs), use_cache=True)
        for step, logits in enumerate(expected.logits):
            torch.testing.assert_close(output.logits[0, -1], logits, **oracle.TOLERANCE)
            token = expected.tokens[step].view(1, 1)
            output = model(input_ids=token, past_key_values=output.past_key_values)


@positions_policies
def test_manual_loop_of_a_padded_batch(positions):
    method = METHODS["merge"](positions=positions)
    plain, model, _ = pair(method)
    inputs = llava_inputs([ONE, TWO])
    answers = [oracle.answer(plain, oracle.row(inputs, b), method) for b in range(2)]
    tokens = torch.stack([a.tokens for a in answers])
    mask = inputs["attention_mask"]
    place = mask.cumsum(1) - 1
    with torch.no_grad():
        output = model(**inputs, position_ids=place.clamp_min(0), use_cache=True)
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


def test_chunked_prefill_of_a_later_turn_without_video():
    method = METHODS["merge"]()
    plain, model, _ = pair(method)
    inputs = llava_inputs([TWO])
    first = generate(plain, inputs, 5)
    second = followed_by(first, inputs, list(range(20, 31)))
    chunked = generate(plain, second, past_key_values=first.past_key_values, prefill_chunk_size=4)
    again = generate(plain, inputs, 5)
    if not torch.equal(chunked.sequences, generate(plain, second, past_key_values=again.past_key_values).sequences):
        pytest.skip("this transformers cannot continue a cache in chunks, compressed or not")
    first = generate(model, inputs, 5)
    second = followed_by(first, inputs, list(range(20, 31)))
    got = generate(model, second, past_key_values=first.past_key_values, prefill_chunk_size=4)
    agrees(got, second, oracle.answer(plain, dict(second, pixel_values_videos=inputs["pixel_values_videos"]), method))


# -- beams and samples -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("num_beams", [2, 4])
@pytest.mark.parametrize("texts", [[ONE], pytest.param([TWO], marks=needs_grouped_videos)], ids=["one", "two"])
@pytest.mark.parametrize("name", METHODS)
def test_beams_are_those_of_the_bare_decoder_on_the_short_prompt(name, texts, num_beams):
    method = METHODS[name](positions="renumber")
    plain, model, _ = pair(method)
    decoder = Qwen2ForCausalLM(plain.config.text_config).eval()
    decoder.model.load_state_dict(plain.model.language_model.state_dict())
    decoder.lm_head.load_state_dict(plain.lm_head.state_dict())
    inputs = llava_inputs(texts)
    with torch.no_grad():
        prompt = oracle.shorten(plain, inputs, method)
    search = {"num_beams": num_beams, "num_return_sequences": num_beams, "output_scores": True}
    expected = generate(decoder, {"inputs_embeds": prompt.embeds}, pad_token_id=0, eos_token_id=None, **search)
    got = generate(model, inputs, **search)
    assert torch.equal(new_tokens(got, inputs), expected.sequences)
    torch.testing.assert_close(got.sequences_scores, expected.sequences_scores)


@pytest.mark.parametrize("num_beams", [2, 4])
@positions_policies
@pytest.mark.parametrize(
    "texts", [[ONE, LATE], pytest.param([ONE, TWO, LATE], marks=needs_grouped_videos)], ids=["one each", "two in a row"]
)
def test_beams_with_and_without_cache_and_alone(texts, positions, num_beams):
    method = METHODS["merge"](positions=positions)
    _, model, handle = pair(method)
    inputs = llava_inputs(texts)
    got = generate(model, inputs, num_beams=num_beams)
    assert {s.row // num_beams for s in handle.trace.last.steps} == set(range(len(texts)))
    assert torch.equal(got.sequences, generate(model, inputs, num_beams=num_beams, use_cache=False).sequences)
    for b in range(len(texts)):
        alone = oracle.row(inputs, b)
        expected = generate(model, alone, num_beams=num_beams)
        assert torch.equal(new_tokens(got, inputs)[b], new_tokens(expected, alone)[0])


def test_beams_in_the_second_turn():
    method = METHODS["merge"](positions="renumber")
    _, model, _ = pair(method)
    inputs = llava_inputs([ONE, [7, 8, 9]])
    cache = empty_cache(model)
    second = followed_by(generate(model, inputs, 5, past_key_values=cache), inputs, [21, 22, 23])
    cache.batch_repeat_interleave(3)  # as generate() wants a cache for beams
    got = generate(model, second, num_beams=3, past_key_values=cache)
    whole = dict(second, pixel_values_videos=inputs["pixel_values_videos"])
    assert torch.equal(got.sequences, generate(model, whole, num_beams=3).sequences)


@positions_policies
@pytest.mark.parametrize(
    "change, rows",
    [
        (lambda cache: cache.reorder_cache(torch.tensor([2, 0, 1])), [2, 0, 1]),
        (lambda cache: cache.batch_select_indices(torch.tensor([1])), [1]),
        (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
    ],
    ids=["reorder", "select", "repeat"],
)
def test_rows_of_a_cache_can_be_rearranged(change, rows, positions):
    method = METHODS["merge"](positions=positions)
    plain, model, _ = pair(method)
    inputs = llava_inputs([ONE, TWO, LATE])
    with torch.no_grad():
        place = (inputs["attention_mask"].cumsum(1) - 1).clamp_min(0)
        cache = model(**inputs, position_ids=place, use_cache=True).past_key_values
    change(cache)
    words = torch.tensor([[21, 22, 23]] * 3)
    whole = dict(
        inputs,
        input_ids=torch.cat([inputs["input_ids"], words], 1),
        attention_mask=torch.cat([inputs["attention_mask"], torch.ones_like(words)], 1),
    )
    second = {key: whole[key][rows] for key in ("input_ids", "attention_mask")}
    got = generate(model, second, past_key_values=cache)
    for b, row in enumerate(rows):
        agrees(got, second, oracle.answer(plain, oracle.row(whole, row), method), b)


@pytest.mark.parametrize(
    "texts", [[ONE, LATE], pytest.param([ONE, TWO], marks=needs_grouped_videos)], ids=["one each", "two in a row"]
)
def test_return_sequences_are_samples_of_the_repeated_prompt(texts):
    _, model, _ = pair(METHODS["merge"]())
    inputs = llava_inputs(texts)
    torch.manual_seed(7)
    got = generate(model, inputs, do_sample=True, num_return_sequences=3)
    repeated = {key: value.repeat_interleave(3, 0) for key, value in inputs.items() if key != "pixel_values_videos"}
    groups = inputs["pixel_values_videos"].split([text.count("V") for text in texts])
    repeated["pixel_values_videos"] = torch.cat([video for group in groups for video in [group] * 3])
    torch.manual_seed(7)
    expected = generate(model, repeated, do_sample=True)
    assert torch.equal(got.sequences, expected.sequences)
    assert len({tuple(sequence) for sequence in got.sequences.tolist()}) > len(texts)


def test_sampling_is_reproducible_and_the_same_without_cache():
    _, model, _ = pair(METHODS["merge"]())
    inputs = llava_inputs([TWO])
    drawn = []
    for use_cache in (True, True, False):
        torch.manual_seed(3)
        drawn.append(generate(model, inputs, do_sample=True, use_cache=use_cache).sequences)
    assert torch.equal(drawn[0], drawn[1]) and torch.equal(drawn[0], drawn[2])


# -- caches ------------------------------------------------------------------------------------------------------------
@positions_policies
@pytest.mark.parametrize("texts", [[TWO], [ONE, TWO, LATE]], ids=["single", "batch"])
def test_static_cache_equals_dynamic(texts, positions):
    _, model, _ = pair(METHODS["merge"](positions=positions))
    inputs = llava_inputs(texts)
    dynamic, static = generate(model, inputs), generate(model, inputs, cache_implementation="static")
    assert torch.equal(dynamic.sequences, static.sequences)
    torch.testing.assert_close(step_logits(dynamic), step_logits(static), **oracle.TOLERANCE)


def test_static_cache_is_not_compiled_behind_the_callers_back(monkeypatch):
    """The hooks keep Python state. (Only a GPU is compiled for by default, hence the switch for all devices.)"""
    compile_config = CompileConfig()
    compile_config._compile_all_devices = True
    plain, model, _ = pair(METHODS["merge"]())
    asked = []
    for m in (plain, model):
        monkeypatch.setattr(m, "get_compiled_call", lambda config, m=m: asked.append(m) or m.__call__)
        generate(m, llava_inputs([ONE]), 3, cache_implementation="static", compile_config=compile_config)
    assert asked and all(m is plain for m in asked)


def test_second_turn_on_a_static_cache():
    method = METHODS["merge"]()
    plain, model, _ = pair(method)
    inputs = llava_inputs([ONE, TWO])
    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=128)
    second = followed_by(generate(model, inputs, 5, past_key_values=cache), inputs, [21, 22, 23])
    got = generate(model, second, past_key_values=cache)
    whole = dict(second, pixel_values_videos=inputs["pixel_values_videos"])
    for b in range(2):
        agrees(got, second, oracle.answer(plain, oracle.row(whole, b), method), b)


@positions_policies
def test_cropped_cache_continues_as_recomputed(positions):
    method = METHODS["merge"](positions=positions)
    plain, model, _ = pair(method)
    inputs = llava_inputs([TWO])
    length = inputs["input_ids"].shape[1]
    for remove in (1, 6, 9):  # 6 tokens were decoded into the cache; before them are 3 words, and then the video
        cache = empty_cache(model)
        first = generate(model, inputs, 7, past_key_values=cache)
        cache.crop(-remove)
        assert cache.get_seq_length() == length + 6 - remove
        other = {"input_ids": torch.cat([first.sequences[:, : length + 6 - remove], torch.tensor([[50, 51]])], 1)}
        got = generate(model, other, 5, past_key_values=cache)
        whole = dict(other, pixel_values_videos=inputs["pixel_values_videos"])
        agrees(got, other, oracle.answer(plain, whole, method, steps=5))


def test_crop_into_the_compressed_prompt_is_refused():
    method = METHODS["merge"]()
    plain, model, _ = pair(method)
    inputs = llava_inputs([ONE])
    length = inputs["input_ids"].shape[1]
    cache = empty_cache(model)
    first = generate(model, inputs, 4, past_key_values=cache)
    stored = [layer.keys.shape[2] for layer in cache.layers]
    for target in (2, 20, -length):
        with pytest.raises(ValueError, match=f"cannot crop this cache from {length + 3} to .*: its first .*compressed"):
            cache.crop(target)
    assert [layer.keys.shape[2] for layer in cache.layers] == stored
    # Nothing was half-cropped: the conversation goes on.
    second = followed_by(first, inputs, [21])
    whole = dict(second, pixel_values_videos=inputs["pixel_values_videos"])
    agrees(generate(model, second, past_key_values=cache), second, oracle.answer(plain, whole, method))


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_reset_cache_starts_anew(kind):
    method = METHODS["merge"]()
    plain, model, _ = pair(method)
    words = llava_inputs([[5, 6, 7, 8]])
    expected = generate(plain, words)
    cache = empty_cache(model)
    if kind == "static":
        cache = StaticCache(config=model.config.get_text_config(), max_cache_len=128)
    else:
        expected.past_key_values.reset()
        if expected.past_key_values.get_seq_length():
            pytest.skip("this transformers' DynamicCache keeps its length when it is reset, compressed or not")
    generate(model, llava_inputs([TWO]), past_key_values=cache)
    cache.reset()
    assert cache.get_seq_length() == 0
    assert torch.equal(generate(model, words, past_key_values=cache).sequences, expected.sequences)
    cache.reset()
    inputs = llava_inputs([ONE], seed=5)
    agrees(generate(model, inputs, past_key_values=cache), inputs, oracle.answer(plain, inputs, method))


def test_copied_cache_serves_several_continuations():
    method = METHODS["merge"](positions="renumber")
    plain, model, _ = pair(method)
    inputs = llava_inputs([TWO])
    with torch.no_grad():
        prefix = model(**inputs, use_cache=True).past_key_values
    for words in ([21, 22], [31, 32, 33]):
        prompt = {"input_ids": torch.cat([inputs["input_ids"], torch.tensor([words])], 1)}
        got = generate(model, prompt, past_key_values=copy.deepcopy(prefix))
        whole = dict(prompt, pixel_values_videos=inputs["pixel_values_videos"])
        agrees(got, prompt, oracle.answer(plain, whole, method))
    assert prefix.get_seq_length() == inputs["input_ids"].shape[1]


# -- assistants --------------------------------------------------------------------------------------------------------
REPETITIVE = [5, 6, 7, 5, 6, 7, "V", 5, 6, 7, 5, 6]


@positions_policies
@pytest.mark.parametrize("text", [ONE, TWO, REPETITIVE], ids=["one", "two", "repetitive"])
def test_prompt_lookup_equals_greedy(text, positions):
    _, model, _ = pair(METHODS["merge"](positions=positions))
    inputs = llava_inputs([text])
    greedy = generate(model, inputs, 12)
    assert torch.equal(greedy.sequences, generate(model, inputs, 12, prompt_lookup_num_tokens=3).sequences)


@positions_policies
@pytest.mark.parametrize("assistant", ["compressed", "plain", "other weights"])
def test_assisted_decoding_equals_greedy(assistant, positions):
    method = METHODS["merge"](positions=positions)
    plain, model, _ = pair(method)
    helper = {"plain": plain, "compressed": copy.deepcopy(model), "other weights": llava(layers=2, seed=1)}[assistant]
    inputs = llava_inputs([TWO])
    greedy = generate(model, inputs, 12)
    assert torch.equal(greedy.sequences, generate(model, inputs, 12, assistant_model=helper).sequences)


def test_a_model_can_assist_itself_under_dispatch():
    """accelerate hands the decoder copies of its arguments, and the draft runs inside the outer generate()."""
    model = llava()
    compress(model, METHODS["merge"]())
    inputs = llava_inputs([ONE])
    greedy = generate(model, inputs, 6)
    accelerate.dispatch_model(model, {"": "cpu"}, force_hooks=True)
    assert torch.equal(greedy.sequences, generate(model, inputs, 6, assistant_model=model).sequences)


# -- threads -----------------------------------------------------------------------------------------------------------
def test_four_threads_at_once_equal_serial():
    plain, model, handle = pair(METHODS["infomerge"]())
    texts: list[list[Any]] = [[ONE], [TWO, LATE], [[7, 8, 9, 10]], [[5, "I", 6, "V", 7]]]
    prompts = [llava_inputs(t, frames=3 + i, seed=i) for i, t in enumerate(texts)]
    serial = [step_logits(generate(model, p, 6)) for p in prompts]
    handle.trace.clear()
    with ThreadPoolExecutor(4) as pool:
        threaded = [pool.submit(generate, model, p, 6) for p in prompts * 3]
        outputs = [step_logits(f.result()) for f in threaded]
    for i, output in enumerate(outputs):
        assert torch.equal(output, serial[i % 4])
    assert len(handle.trace) == 9
    assert sorted(p.before for p in handle.trace) == sorted([12, 4 * 4 * 3, 4 * 6] * 3)
    assert not torch.equal(serial[0], step_logits(generate(plain, prompts[0], 6)))


def test_switching_between_the_prompts_of_other_threads():
    """A prompt is reduced by the method that was in force when its video was encoded."""
    _, model, handle = pair(METHODS["prune"]())
    inputs = llava_inputs([ONE])
    counts = {handle.compression.methods[0].budget((6, 2, 2))}
    other = METHODS["infomerge"](retention_ratio=0.75)
    counts.add(other.budget((6, 2, 2)))

    def answers() -> None:
        for _ in range(12):
            model(**inputs)

    with ThreadPoolExecutor(2) as pool, without_head():
        running = [pool.submit(answers) for _ in range(2)]
        while not all(f.done() for f in running):
            for method in (other, METHODS["prune"]()):
                handle.switch(method)
                time.sleep(0.001)  # lets the others have the interpreter
    for future in running:
        future.result()
    assert {p.after for p in handle.trace} <= counts
    for prompt in handle.trace:
        assert prompt.steps[0].method == prompt.compression[0]["method"]


def test_switching_touches_no_hook():
    """A torch module is not to be given hooks while another thread may be calling it."""

    def hooks() -> list[tuple[int, ...]]:
        return [(*m._forward_hooks, *m._forward_pre_hooks) for m in model.modules()]

    _, model, handle = pair(METHODS["prune"]())
    before = hooks()
    for name in ("infomerge", "fastvid", "unified_pool", "hieravid", "random"):
        with without_head():
            handle.switch(name)
        assert hooks() == before
