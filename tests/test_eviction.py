"""Cached tokens that are given up between decoding steps: against `oracle_decoding`, in memory, and what is refused."""

from __future__ import annotations

import copy
import gc
import json
import pickle
import weakref
from dataclasses import dataclass
from typing import Any

import oracle_decoding
import pytest
import torch
from test_engine_generate import agrees, empty_cache, followed_by
from test_engine_inner import stored
from tiny import (
    FRAMES,
    LATE,
    ONE,
    TWO,
    InnerMix,
    InnerPrune,
    Mix,
    Prune,
    anatomy,
    compress,
    generate,
    llava,
    llava_inputs,
    pair,
    step_logits,
    without_mask,
)
from tiny_llava_video import llava_video, video_inputs
from torch import Tensor
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer

import vidcompress
from vidcompress.costs import MODELS, estimate, flops, kv_cache_bytes, measured_kv_bytes
from vidcompress.method import DEPTH, Method, Pipeline
from vidcompress.methods.dycoke import DyCoke
from vidcompress.methods.dycoke_decoding import DyCokeDecoding
from vidcompress.tokens import CachedTokens, Grid, Site


@dataclass(kw_only=True)
class Fading(Method):
    """Gives up, at every step, two more of the tokens that the last one attended to least, in the layer itself."""

    needs = frozenset({"last_query_attention"})
    layers: tuple[int, ...] = (2, 4)
    least: int = 3

    def sites(self, depth: int = DEPTH) -> list[Site]:
        return [Site.decoding(layer, stage) for stage, layer in enumerate(self.layers)]

    def count(self, site: Site, grid: Grid, entered: int, before: int) -> int:
        return max(min(before, self.least), before - 2)

    def evict(self, tokens: CachedTokens, site: Site) -> Tensor:
        order = tokens.signal("last_query_attention").argsort(descending=True, stable=True)
        return order[: self.count(site, tokens.grid, tokens.entered, len(tokens))].sort().values


@dataclass(kw_only=True)
class Recent(Method):
    """Gives up what lies before the middle of the video, however much that is."""

    layer: int = 0

    @property
    def exact(self) -> bool:
        return False

    def sites(self, depth: int = DEPTH) -> list[Site]:
        return [Site.decoding(self.layer)]

    def count(self, site: Site, grid: Grid, entered: int, before: int) -> int:
        return min(before, entered - 1)

    def evict(self, tokens: CachedTokens, site: Site) -> Tensor:
        t, h, w = tokens.grid
        return (tokens.index >= t * h * w // 2).nonzero().squeeze(1)


def methods(name: str, positions: str = "keep") -> Pipeline:
    """Every kind of neighbour a decoding site can have."""
    p: dict[str, Any] = {"positions": positions}
    return Pipeline(
        {
            "dycoke": [DyCoke(**p)],
            "dycoke_decoding": [DyCokeDecoding(layer=1, **p)],
            "fading": [Fading(**p)],
            "recent": [Recent(**p)],
            "behind merging": [Mix(retention_ratio=0.6, **p), Fading(layers=(0, 5))],
            "behind an inner one": [InnerPrune(layers=(2,), **p), DyCokeDecoding(layer=3)],
            "before inner ones": [
                Prune(retention_ratio=0.8, **p),
                InnerMix(layers=(1, 3, 4), **p),
                Fading(layers=(2,)),
            ],
            "two": [DyCokeDecoding(layer=2, retention_ratio=0.6), Fading(layers=(4,))],
        }[name]
    )


NAMES = ["dycoke", "dycoke_decoding", "fading", "recent", "behind merging", "behind an inner one", "two"]
NAMES += ["before inner ones"]
some = pytest.mark.parametrize("name", ["dycoke", "before inner ones", "fading"])


def check(got: Any, inputs: dict[str, Tensor], handle: Any, plain: Any, method: Pipeline, steps: int) -> None:
    """Answers, what is stored, and what the trace says are the oracle's, for every row."""
    evicted = []
    for b in range(len(inputs["input_ids"])):
        padding = int((inputs["attention_mask"][b] == 0).sum())
        first = sum(step for step in _videos(inputs, b))
        expected, talk = oracle_decoding.answer(plain, _row(inputs, b), method, steps)
        agrees(got, inputs, expected, b)
        evicted += [(b, n + padding, layer, first + v, kept) for n, layer, v, kept in talk.evicted]
        longest = [layer.keys.shape[2] for layer in got.past_key_values.layers]
        assert all(len(layer.columns) <= n for layer, n in zip(talk.layers, longest, strict=True))
        if len(inputs["input_ids"]) == 1:
            assert [len(layer.columns) for layer in talk.layers] == longest
    found = [(e.row, e.length, e.site.layer, e.video, e.kept.tolist()) for e in handle.trace.last.evictions]
    assert sorted(found) == sorted(evicted) and found


def _videos(inputs: dict[str, Tensor], b: int) -> list[int]:
    return [1 for row in inputs["input_ids"][:b] for _ in range(int((row == 191).sum()) // (4 * FRAMES + 1))]


def _row(inputs: dict[str, Tensor], b: int) -> dict[str, Tensor]:
    return oracle_decoding.oracle.row(inputs, b)


# -- against the oracle ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("positions", ["keep", "renumber"])
@pytest.mark.parametrize("name", NAMES)
def test_answers_as_recomputed(name: str, positions: str) -> None:
    method = methods(name, positions)
    plain, model, handle = pair(method)
    inputs = llava_inputs([TWO])
    got = generate(model, inputs, 6)
    check(got, inputs, handle, plain, method, 6)
    again = generate(model, without_mask(inputs), 6)
    assert torch.equal(got.sequences, again.sequences)
    torch.testing.assert_close(step_logits(again), step_logits(got), **oracle_decoding.oracle.TOLERANCE)
    # The caller counts all.
    cache = got.past_key_values
    assert [cache.get_seq_length(i) for i in range(6)] == [inputs["input_ids"].shape[1] + 5] * 6


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("name", NAMES)
def test_every_row_of_a_padded_batch_as_if_alone(name: str, attn: str) -> None:
    method = methods(name)
    plain, model, handle = pair(method, attn=attn)
    inputs = llava_inputs([ONE, TWO, LATE])
    check(generate(model, inputs, 5), inputs, handle, plain, method, 5)


@pytest.mark.parametrize("newline", ["grid", "frame"])
def test_newlines_go_with_their_lines(newline: str) -> None:
    plain, model = (llava_video("average", newline, "sdpa") for _ in range(2))
    method = methods("fading")
    handle = compress(model, method)
    inputs = video_inputs(model, [ONE], seed=1)
    got = generate(model, inputs, 8)
    expected, talk = oracle_decoding.answer(plain, inputs, method, 8)
    agrees(got, inputs, expected)
    assert stored(got.past_key_values) == [len(layer.columns) for layer in talk.layers]
    lost = handle.trace.last.evictions[0].before - len(talk.evicted[-1][-1])
    assert stored(got.past_key_values)[0] - stored(got.past_key_values)[-1] > lost  # newlines, too


# -- turns -------------------------------------------------------------------------------------------------------------
@some
def test_a_second_turn_sees_what_is_left(name: str) -> None:
    method = methods(name)
    plain, model, handle = pair(method)
    inputs = llava_inputs([TWO])
    cache = empty_cache(model)
    first = generate(model, inputs, 4, past_key_values=cache)
    second = followed_by(first, inputs, [21, 22, 23])
    got = generate(model, second, 4, past_key_values=cache)
    expected, talk = oracle_decoding.answer(plain, inputs, method, 4)
    said = [int(expected.tokens[-1]), 21, 22, 23]
    agrees(got, second, oracle_decoding.go_on(talk, talk.say(talk.words(said)), 4))
    assert stored(cache) == [len(layer.columns) for layer in talk.layers]
    lengths = [e.length for e in handle.trace.last.evictions]
    assert lengths == [e[0] for e in talk.evicted] and len(handle.trace) == 1
    # Of a whole turn nothing is given up, and the handle may have moved on meanwhile.
    start = inputs["input_ids"].shape[1]
    assert not {n for n in lengths if start + 3 < n <= start + 7}


def test_a_video_in_a_later_turn() -> None:
    method = methods("fading")
    plain, model, handle = pair(method)
    whole = llava_inputs([[5, 6, "V", 7, 40]])
    other = llava_inputs([["V", 12, 13]], seed=5)
    cache = empty_cache(model)
    first = generate(model, whole, 4, past_key_values=cache)
    ids = torch.cat([first.sequences, other["input_ids"]], 1)
    second = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    got = generate(model, dict(second, pixel_values_videos=other["pixel_values_videos"]), 4, past_key_values=cache)
    expected, talk = oracle_decoding.answer(plain, whole, method, 4)
    (video,) = oracle_decoding.oracle.find_videos(plain, other, None)
    video.columns, video.newlines = video.columns + first.sequences.shape[1], video.newlines + first.sequences.shape[1]
    talk.said.videos.append(video)
    embeds = oracle_decoding.oracle.embedded(plain, other)[0]
    said = torch.cat([talk.words([int(expected.tokens[-1])]), embeds])
    agrees(got, second, oracle_decoding.go_on(talk, talk.say(said), 4))
    assert stored(cache) == [len(layer.columns) for layer in talk.layers]
    # Each video's evictions stand where it was read.
    assert {e.video for prompt in handle.trace for e in prompt.evictions} == {0}
    assert [len(prompt.evictions) for prompt in handle.trace] == [12, 6]


def test_another_method_is_for_the_next_prompt() -> None:
    method = methods("fading")
    plain, model, handle = pair(method)
    inputs = llava_inputs([ONE])
    cache = empty_cache(model)
    first = generate(model, inputs, 3, past_key_values=cache)
    handle.switch("random")
    second = followed_by(first, inputs, [21])
    got = generate(model, second, 4, past_key_values=cache)
    expected, talk = oracle_decoding.answer(plain, inputs, method, 3)
    agrees(got, second, oracle_decoding.go_on(talk, talk.say(talk.words([int(expected.tokens[-1]), 21])), 4))


# -- what callers do with caches ---------------------------------------------------------------------------------------
def steps_by_hand(model: Any, cache: Any, mask: Tensor, words: Tensor) -> Tensor:
    """[B, steps, V] of feeding words [B, steps] one after the other."""
    found = []
    for word in words.split(1, 1):
        mask = torch.cat([mask, torch.ones(len(word), 1, dtype=mask.dtype)], 1)
        with torch.no_grad():
            found.append(model(input_ids=word, attention_mask=mask, past_key_values=cache).logits[:, -1])
    return torch.stack(found, 1)


@pytest.mark.parametrize("name", ["fading", "recent", "before inner ones"])
@pytest.mark.parametrize(
    ("change", "rows"),
    [
        (lambda cache: cache.reorder_cache(torch.tensor([1, 1, 0])), [1, 1, 0]),
        (lambda cache: cache.batch_select_indices(torch.tensor([2, 0])), [2, 0]),
        (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
    ],
    ids=["reorder", "select", "repeat"],
)
def test_rows_move_with_what_they_lost(name: str, change: Any, rows: list[int]) -> None:
    _, model, _ = pair(methods(name))
    inputs = llava_inputs([ONE, TWO, LATE])
    words = torch.arange(20, 35).view(3, 5)
    cache = empty_cache(model)
    with torch.no_grad():
        model(**inputs, past_key_values=cache)
    mask = inputs["attention_mask"]
    steps_by_hand(model, cache, mask, words[:, :2])
    mask = torch.cat([mask, torch.ones(3, 2, dtype=mask.dtype)], 1)
    moved = copy.deepcopy(cache)
    change(moved)
    expected = steps_by_hand(model, cache, mask, words[:, 2:])
    got = steps_by_hand(model, moved, mask[rows], words[rows, 2:])
    torch.testing.assert_close(got, expected[rows], **oracle_decoding.oracle.TOLERANCE)
    assert all(a <= b for a, b in zip(stored(moved), stored(cache), strict=True))  # shorter without the longest row


@some
def test_beams_are_each_their_own(name: str) -> None:
    """Every beam ends with the logits of a conversation that said its words."""
    method = methods(name)
    plain, model, _ = pair(method)
    inputs = llava_inputs([ONE])
    got = generate(model, inputs, 5, num_beams=3, num_return_sequences=3, output_scores=True)
    for sequence, score in zip(got.sequences, got.sequences_scores, strict=True):
        talk = oracle_decoding.talk(plain, inputs, method)
        logits, total = talk.begin(), torch.zeros(())
        words = sequence[inputs["input_ids"].shape[1] :].tolist()
        for word in words:
            total = total + logits.log_softmax(-1)[word]
            logits = talk.say(talk.words([word]))
        torch.testing.assert_close(total / len(words), score, **oracle_decoding.oracle.TOLERANCE)


def test_what_was_decoded_can_be_cropped_and_what_was_lost_stays_lost() -> None:
    _, model, _ = pair(methods("dycoke"))
    inputs = llava_inputs([ONE])
    cache = empty_cache(model)
    with torch.no_grad():
        model(**inputs, past_key_values=cache)
    words = torch.tensor([[20, 21, 22]])
    steps_by_hand(model, cache, inputs["attention_mask"], words)
    left = stored(cache)
    cache.crop(-2)
    assert stored(cache) == [n - 2 for n in left]
    mask = torch.cat([inputs["attention_mask"], torch.ones(1, 1, dtype=torch.long)], 1)
    again = steps_by_hand(model, cache, mask, words[:, 1:])
    assert stored(cache) == left
    fresh = empty_cache(model)
    with torch.no_grad():
        model(**inputs, past_key_values=fresh)
    expected = steps_by_hand(model, fresh, inputs["attention_mask"], words)[:, 1:]
    torch.testing.assert_close(again, expected, **oracle_decoding.oracle.TOLERANCE)
    with pytest.raises(ValueError, match="cannot crop this cache"):
        cache.crop(-20)


def test_a_cache_travels() -> None:
    _, model, handle = pair(methods("fading"))
    inputs = llava_inputs([ONE])
    cache = empty_cache(model)
    with torch.no_grad():
        model(**inputs, past_key_values=cache)
    copies = [copy.deepcopy(cache), pickle.loads(pickle.dumps(cache)), cache]
    words = torch.tensor([[20, 21, 22]])
    logits = [steps_by_hand(model, c, inputs["attention_mask"], words) for c in copies]
    assert torch.equal(logits[0], logits[2]) and torch.equal(logits[1], logits[2])
    assert stored(copies[0]) == stored(copies[1]) == stored(cache)
    assert len(handle.trace.last.evictions) == 2 * 6  # a deep copy goes on in the same record


def test_a_prompt_that_is_fed_again_is_read_from_its_start() -> None:
    _, model, handle = pair(methods("fading"))
    inputs = llava_inputs([ONE])
    a, b = (generate(model, inputs, 4) for _ in range(2))
    assert torch.equal(step_logits(a), step_logits(b))
    kept = [[e.kept.tolist() for e in prompt.evictions] for prompt in handle.trace]
    assert kept[0] == kept[1] and kept[0]


# -- memory ------------------------------------------------------------------------------------------------------------
def test_memory_is_freed() -> None:
    _, model, _ = pair(methods("dycoke_decoding"))
    inputs = llava_inputs([TWO])
    cache = empty_cache(model)
    with torch.no_grad():
        model(**inputs, past_key_values=cache)
    old = [weakref.ref(tensor) for layer in cache.layers for tensor in (layer.keys, layer.values)]
    steps_by_hand(model, cache, inputs["attention_mask"], torch.tensor([[20]]))
    gc.collect()
    assert not any(ref() is not None for ref in old)
    of = vidcompress.costs.Dimensions.of(model.config)
    lost = 2 * (24 - 7)  # of two videos
    length = inputs["input_ids"].shape[1] + 1
    lengths = [length] + [length - lost] * 5
    assert measured_kv_bytes(cache) == kv_cache_bytes(of, lengths, dtype_bytes=4)
    for layer in cache.layers:  # no view of something larger
        for tensor in (layer.keys, layer.values):
            assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()


# -- nothing to give up ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "method",
    [DyCokeDecoding(retention_ratio=1.0), DyCoke(retention_ratio=1.0, keep_ratio=1.0), Fading(least=10**6)],
    ids=lambda method: method.name,
)
def test_keeping_all_is_bit_identical(method: Method) -> None:
    plain, model, handle = pair(method)
    inputs = llava_inputs([ONE, TWO])
    expected, got = generate(plain, inputs), generate(model, inputs)
    assert torch.equal(step_logits(expected), step_logits(got)) and handle.trace.last.evictions == []
    assert type(got.past_key_values) is type(expected.past_key_values) is DynamicCache
    for kind in ({"cache_implementation": "static"}, {"use_cache": False}, {"prompt_lookup_num_tokens": 2}):
        if "use_cache" in kind or "prompt_lookup_num_tokens" in kind:
            continue
        assert torch.equal(*(step_logits(generate(m, inputs, **kind)) for m in (plain, model)))


def test_a_prompt_is_read_as_without_eviction() -> None:
    _, model, handle = pair(DyCoke())
    inputs = llava_inputs([TWO])
    with torch.no_grad():
        whole = model(**inputs, output_hidden_states=True)
        handle.switch("dycoke_outer")
        outer = model(**inputs, output_hidden_states=True)
    assert torch.equal(whole.logits, outer.logits)
    assert all(torch.equal(a, b) for a, b in zip(whole.hidden_states, outer.hidden_states, strict=True))


def test_prompts_without_video_are_untouched() -> None:
    plain, model, handle = pair(DyCoke())
    inputs = llava_inputs([[5, 6, 7], [8, 9, 10, 11]])
    for kind in ({}, {"use_cache": False}, {"cache_implementation": "static"}):
        assert torch.equal(*(step_logits(generate(m, inputs, **kind)) for m in (plain, model)))
    one = llava_inputs([[5, 6, 7, 5, 6]])
    assert torch.equal(*(generate(m, one, prompt_lookup_num_tokens=2).sequences for m in (plain, model)))
    assert len(handle.trace) == 0


def test_removal_restores() -> None:
    plain, model = llava(), llava()
    inputs = llava_inputs([ONE])
    generate(plain, inputs, 1)  # transformers puts hooks of its own on a model that ran
    handle = compress(model, methods("fading"))
    cache = empty_cache(model)
    first = generate(model, inputs, 3, past_key_values=cache)
    handle.remove()
    assert anatomy(model) == anatomy(plain)
    assert torch.equal(*(step_logits(generate(m, inputs)) for m in (plain, model)))
    with pytest.raises(RuntimeError, match="this cache holds a compressed prompt"):
        generate(model, followed_by(first, inputs, [21]), 2, past_key_values=cache)


# -- what is refused ---------------------------------------------------------------------------------------------------
class Quantised(DynamicLayer):
    """Stands for a layer that keeps its keys in another form."""


def test_caches_that_cannot_shrink_are_refused() -> None:
    _, model, _ = pair(methods("fading"))
    inputs = llava_inputs([ONE])
    says = r"Fading at decoding\[2\], Fading at decoding\[4\] removes tokens from the KV cache .* Use a DynamicCache"
    with pytest.raises(ValueError, match=says):
        generate(model, inputs, cache_implementation="static")
    odd, elsewhere = empty_cache(model), empty_cache(model)
    odd.layers = [Quantised() for _ in odd.layers]
    elsewhere.offloading = True
    static = StaticCache(config=model.config.get_text_config(), max_cache_len=64)
    for cache, kind in ((odd, "Quantised"), (static, "StaticLayer"), (elsewhere, "offloaded")):
        with pytest.raises(ValueError, match=rf"this {type(cache).__name__} \({kind}\) is allocated as a whole"):
            model(**inputs, past_key_values=cache)
    generate(model, inputs, 2)  # the model is none the worse


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"prompt_lookup_num_tokens": 3}, "prompt_lookup_num_tokens with a method that evicts .* guesses at a time"),
        ({"assistant_model": "draft"}, "assistant_model with a method that evicts .* guesses at a time"),
        ({"use_cache": False}, "use_cache=False with a method that evicts .* there is no cache"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_decoding_without_single_steps_is_refused(options: dict[str, Any], says: str) -> None:
    _, model, _ = pair(methods("fading"))
    inputs = llava_inputs([ONE])
    if options.get("assistant_model"):
        options = {"assistant_model": llava(layers=2)}
    with pytest.raises(ValueError, match=says):
        generate(model, inputs, **options)
    cache = empty_cache(model)
    first = generate(model, inputs, 3, past_key_values=cache)
    with pytest.raises(ValueError, match=says):
        generate(model, followed_by(first, inputs, [21, 22]), past_key_values=cache, **options)
    config = copy.deepcopy(model.generation_config)
    if "assistant_model" not in options:
        config.update(**options)
        with pytest.raises(ValueError, match=says):
            generate(model, inputs, generation_config=config)


def test_a_method_that_keeps_another_count_is_at_fault() -> None:
    class Wrong(Fading):
        def evict(self, tokens: CachedTokens, site: Site) -> Tensor:
            return super().evict(tokens, site)[1:]

    _, model, _ = pair(Wrong())
    with pytest.raises(RuntimeError, match=r"Wrong kept 21 cached tokens of 24 at decoding\[2\], not 22"):
        generate(model, llava_inputs([ONE]))
    with pytest.raises(KeyError, match=r"'saliency.head' was not computed; list it in `needs`"):
        CachedTokens((1, 1, 1), torch.arange(1), {}, {}, 1).signal("saliency.head")


def test_sites_beyond_the_depth_and_meeting_ones_are_refused() -> None:
    model = llava()
    with pytest.raises(ValueError, match=r"dycoke_decoding acts at .* layer 9; this decoder has 6 layers"):
        compress(model, DyCokeDecoding(layer=9))
    with pytest.raises(ValueError, match=r"dycoke and dycoke_decoding both act at decoding\[3\]; one is allowed"):
        Pipeline([DyCoke(), DyCokeDecoding()])
    with pytest.raises(ValueError, match=r"dycoke_outer acts at projector, before dycoke_decoding at decoding\[3\]"):
        vidcompress.load(["dycoke_decoding", "dycoke_outer"])
    # A decoding site comes after all of a prompt's, whatever their layers.
    pipeline = vidcompress.load([{"method": "fastv", "layer": 9}, "dycoke_decoding"])
    assert [*pipeline.stages(), *pipeline.evictions()] == [Site.decoder(9), Site.decoding(3)]
    assert Site.decoder(3) != Site.decoding(3) and str(Site.decoding(3)) == "decoding[3]"


# -- counts, costs and the record --------------------------------------------------------------------------------------
def test_counts_and_costs() -> None:
    of, grid = MODELS["llava-onevision-7b"], (32, 14, 14)
    dycoke = vidcompress.load("dycoke")
    pipeline = Pipeline.of(dycoke)
    assert pipeline.counts(grid) == {Site.projector(): 2979, Site.decoding(3): 893}
    assert pipeline.lengths(grid) == [2979] * 28 and pipeline.stored(grid) == [2979] * 3 + [893] * 25
    found = estimate(of, grid, dycoke, text_tokens=50, decode_tokens=10)
    prompt, left = [3029] * 28, [3029] * 3 + [943] * 25
    assert found.kv_bytes == kv_cache_bytes(of, left) and found.video_tokens == [2979] * 28
    assert found.flops["hieravid"] == flops("hieravid", of, prompt)
    decoding = sum(flops("unified", of, left, 10)) - sum(flops("unified", of, left, 0))
    assert sum(found.flops["unified"]) == sum(flops("unified", of, prompt, 0)) + decoding
    both = Pipeline([vidcompress.load("fastv"), Fading(layers=(1, 5), least=100)])
    assert both.counts((1, 40, 10)) == {Site.decoder(2): 200, Site.decoding(1): 398, Site.decoding(5): 198}
    assert both.stored((1, 40, 10), 7) == [400, 398, 200, 200, 200, 198, 198]


def test_the_trace_says_what_was_given_up_and_when() -> None:
    _, model, handle = pair(DyCoke(retention_ratio=0.5, keep_ratio=0.5))
    inputs = llava_inputs([ONE])
    generate(model, inputs, 4)
    prompt = handle.trace.last
    (entry,) = json.loads(json.dumps(handle.trace.to_dict()))["prompts"][0]["evictions"]
    assert entry.pop("seconds") > 0 and len(entry.pop("kept")) == 6
    assert entry == {
        "row": 0, "video": 0, "site": "decoding[3]", "method": "dycoke", "length": inputs["input_ids"].shape[1] + 1,
        "before": 12, "after": 6,
    }  # fmt: skip
    assert (prompt.before, prompt.after, prompt.layer_lengths) == (24, 12, [18] * 6)
    generate(model, llava_inputs([TWO]), 1)
    assert handle.trace.last.evictions == []  # one word was decoded of the prompt itself
    handle.switch("dycoke_decoding")
    generate(model, inputs, 2)
    assert (handle.trace.last.before, handle.trace.last.after) == (24, 24) and len(handle.trace.last.evictions) == 1
    handle.trace.enabled = False
    assert stored(generate(model, inputs, 2).past_key_values) == [31] * 3 + [14] * 3
