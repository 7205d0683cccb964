"""Compressed models of the `llava` package: against themselves, and against `hand`, which shares `Method.decide`."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import hand
import native
import pytest
import torch
import transformers
from hand import Answer, answer
from native import (
    COMPRESSIONS,
    DEPTH,
    FRAMES,
    HERE,
    LATE,
    NEWLINES,
    ONE,
    POOLS,
    SIZE,
    TOLERANCE,
    TWO,
    WORDS,
    Prompt,
    anatomy,
    build,
    compress,
    compression,
    generate,
    logits,
    plain,
    prompt,
    stored,
    without_head,
)
from torch import Tensor, nn

import vidcompress
from vidcompress.method import Pipeline

SIDE = {"average": 13, "max": 13, "bilinear": 14}
NEWLINE_TOKENS = {"grid": 13 * FRAMES, "frame": FRAMES, "one_token": 1, "no_token": 0}
"""Of a video of `FRAMES` frames of 13 x 13 tokens."""


def whole() -> Pipeline:
    """Acts before the LLM and at two of its layers, and keeps everything."""
    names = ("infomerge", "fastv", "text_aware_merge")
    return Pipeline([vidcompress.load(name, retention_ratio=1.0) for name in names])


def new_logits(output: Any) -> Tensor:
    """[B, steps, V] of what `generate` returned."""
    return torch.stack(output.logits, 1)


def agrees(output: Any, expected: Answer, b: int = 0) -> None:
    """Row b of what `generate` returned is what was recomputed."""
    assert torch.equal(output.sequences[b], expected.tokens)
    torch.testing.assert_close(new_logits(output)[b], expected.logits, **TOLERANCE)


def kept(handle: vidcompress.Handle, b: int) -> dict[tuple[int, int], list[int]]:
    """What the last prompt kept of row b, by (video of that row, layer)."""
    steps = [step for step in handle.trace.last.steps if step.row == b]
    first = min((step.video for step in steps), default=0)
    return {(step.video - first, step.site.layer): step.reduction.keep.tolist() for step in steps}


def listed(recomputed: dict[tuple[int, int], Tensor]) -> dict[tuple[int, int], list[int]]:
    return {place: keep.tolist() for place, keep in recomputed.items()}


def padded(monkeypatch: pytest.MonkeyPatch, model: Any, side: str) -> None:
    """Lets the package pad embedded prompts on this side, as it does by the config of a checkpoint."""
    monkeypatch.setattr(model.config, "tokenizer_padding_side", side)


# -- keeping all -------------------------------------------------------------------------------------------------------
WHOLE = [("average", newline, attn) for newline in NEWLINES for attn in ("sdpa", "eager")]
WHOLE += [(pool, "grid", "sdpa") for pool in POOLS if pool != "average"]


@pytest.mark.parametrize("pool, newline, attn", WHOLE)
def test_keeping_all_is_bit_identical(pool, newline, attn, monkeypatch):
    model = plain(pool, newline, attn)
    right, left = (prompt([ONE, WORDS, TWO], side, frames=2) for side in ("right", "left"))
    labels = right.ids.masked_fill((right.ids == HERE) | (right.mask == 0), -100)

    def run() -> list[Tensor]:
        padded(monkeypatch, model, "right")
        with torch.no_grad():
            forward = model(right.ids, **right.given, labels=labels, output_hidden_states=True)
        padded(monkeypatch, model, "left")
        output = generate(model, left)
        cache = [t for pair in output.past_key_values for t in pair]
        return [forward.loss, forward.logits, *forward.hidden_states, output.sequences, new_logits(output), *cache]

    expected = run()
    with compress(model, whole()) as handle:
        got = run()
        last = handle.trace.last
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    tokens = 2 * SIDE[pool] ** 2
    assert [(s.row, s.video, s.before, s.after) for s in last.steps] == [
        (row, video, tokens, tokens) for _ in range(3) for row, video in [(0, 0), (2, 1), (2, 2)]
    ]
    assert last.layer_lengths == [expected[1].shape[1]] * DEPTH


def test_keeping_all_in_bfloat16(monkeypatch):
    model = build().bfloat16()
    given = dataclasses.replace(prompt([ONE]), images=[x.bfloat16() for x in prompt([ONE]).images])
    whole_logits, whole_answer = logits(model, given), generate(model, given)
    with compress(model, whole()) as handle:
        assert torch.equal(logits(model, given), whole_logits)
        assert torch.equal(new_logits(generate(model, given)), new_logits(whole_answer))
        with without_head():
            handle.switch(compression("infomerge"))
        assert generate(model, given).logits[0].dtype == new_logits(whole_answer).dtype
        assert (handle.trace.last.before, handle.trace.last.after) == (676, 202)


def test_text_only_is_left_alone():
    model, given = plain(), prompt([ONE[:2], [*WORDS, 15]])
    expected, answered = logits(model, given), generate(model, given)
    with compress(model, compression("infomerge and text_aware_merge")) as handle:
        assert torch.equal(logits(model, given), expected)
        assert torch.equal(new_logits(generate(model, given)), new_logits(answered))
        assert handle.trace.last is None


# -- against what is recomputed by hand --------------------------------------------------------------------------------
CASES = [(name, {}, "average", "grid", "sdpa", FRAMES) for name in COMPRESSIONS]
CASES += [
    (name, {}, pool, newline, "sdpa", 2)
    for name in ("infomerge and text_aware_merge", "hieravid")
    for pool, newline in [("average", "frame"), ("bilinear", "one_token"), ("max", "no_token"), ("bilinear", "grid")]
]
CASES += [
    ("infomerge and text_aware_merge", {"positions": "renumber"}, "average", "grid", "sdpa", FRAMES),
    ("unified", {"positions": "renumber"}, "average", "frame", "eager", 2),
    ("fastv", {"positions": "renumber"}, "average", "grid", "eager", 2),
]


@pytest.mark.parametrize("name, settings, pool, newline, attn, frames", CASES)
def test_every_row_of_a_padded_batch_as_recomputed(name, settings, pool, newline, attn, frames, monkeypatch):
    """Rows of one video, of none and of two; tokens, logits, kept sets, what the layers run over and what is cached."""
    model, method = plain(pool, newline, attn), compression(name, **settings)
    given = prompt([ONE, WORDS, TWO], "left", frames)
    padded(monkeypatch, model, "left")
    with compress(model, method) as handle:
        got = generate(model, given)
        last = handle.trace.last
        mine = [kept(handle, b) for b in range(3)]
    lengths, whole_length = [], 0
    for b in range(3):
        expected = answer(model, given.row(b), method)
        agrees(got, expected, b)
        assert mine[b] == listed(expected.hand.kept)
        lengths.append(expected.hand.lengths)
        whole_length = max(whole_length, expected.hand.length)
    assert last.layer_lengths == [max(each) for each in zip(*lengths)]
    assert (last.length_before, last.length_after) == (whole_length, last.layer_lengths[0])
    assert stored(got.past_key_values) == [n + 2 for n in last.layer_lengths]
    assert got.past_key_values.get_seq_length() == whole_length + 2
    grid = (frames, SIDE[pool], SIDE[pool])
    assert [(s.site, s.row, s.video, s.grid, s.after) for s in last.steps] == [
        (site, row, video, grid, n)
        for site, n in method.counts(grid, DEPTH).items()
        for row, video in [(0, 0), (2, 1), (2, 2)]
    ]
    assert last.before == 3 * math.prod(grid)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", ["infomerge", "pyramiddrop", "infomerge and text_aware_merge"])
def test_a_forward_gives_every_row_at_full_length(name, side, monkeypatch):
    """Zeros where a token was removed, whatever the side of the padding."""
    model, method = plain(), compression(name)
    given = prompt([LATE, ONE, TWO], side, frames=2)
    padded(monkeypatch, model, side)
    whole_shape = logits(model, given).shape
    with compress(model, method) as handle:
        got = logits(model, given)
        mine = [kept(handle, b) for b in range(3)]
    assert got.shape == whole_shape
    for b in range(3):
        expected = answer(model, given.row(b), method, steps=1)
        assert mine[b] == listed(expected.hand.kept)
        begin = got.shape[1] - expected.hand.length if side == "left" else 0
        row = got[b, begin : begin + expected.hand.length]
        columns = expected.hand.at(DEPTH - 1)[0]
        torch.testing.assert_close(row[columns], expected.prefill, **TOLERANCE)
        gone = torch.ones(len(row), dtype=torch.bool).index_fill(0, columns, False)
        assert int(gone.sum()) > 50 and not row[gone].any()


@pytest.mark.parametrize("name", ["fastvid", "hieravid"])
def test_videos_of_different_lengths(name, monkeypatch):
    model, method = plain(), compression(name)
    given = prompt([TWO, ONE], "left")
    images = [given.images[0][:3], given.images[1], given.images[2][:1]]
    given = dataclasses.replace(given, images=images)
    padded(monkeypatch, model, "left")
    with compress(model, method) as handle:
        got = generate(model, given)
        mine = [kept(handle, b) for b in range(2)]
        grids = [(s.row, s.video, s.grid[0]) for s in handle.trace.last.steps[:3]]
    assert grids == [(0, 0, 3), (0, 1, 4), (1, 2, 1)]
    for b in range(2):
        expected = answer(model, given.row(b), method)
        agrees(got, expected, b)
        assert mine[b] == listed(expected.hand.kept)


@pytest.mark.parametrize("tiles", [1, 2], ids=["one tile", "overview and tile"])
@pytest.mark.parametrize("text", [[5, "I", 6, "V", 7, 8], [5, "V", 6, "I", 7, 8]], ids=["before", "behind"])
def test_an_image_beside_a_video(text, tiles):
    """It stays whole, and is no text that a method inside the LLM asks."""
    model, method = plain(), compression("infomerge and text_aware_merge")
    given = prompt([text], tiles=tiles)
    with compress(model, method) as handle:
        got = generate(model, given)
        mine, lengths = kept(handle, 0), handle.trace.last.layer_lengths
    expected = answer(model, given, method)
    agrees(got, expected)
    assert mine == listed(expected.hand.kept) and lengths == expected.hand.lengths
    assert expected.hand.length == 4 + 676 + NEWLINE_TOKENS["grid"] + (730 if tiles == 1 else 729 + 27 * 28)


def test_images_beside_videos_in_a_batch(monkeypatch):
    """One beside a video, and as many as one likes in rows without."""
    model, method = plain(), compression("text_aware_merge")
    given = prompt([[5, "V", 7], [5, "I", 6, "V", 7, 8], [5, "I", 21, "I", 6]], "left", frames=2)
    padded(monkeypatch, model, "left")
    with compress(model, method) as handle:
        got = generate(model, given, steps=2)
        mine = [kept(handle, b) for b in range(3)]
    for b in range(2):
        expected = answer(model, given.row(b), method, steps=2)
        agrees(got, expected, b)
        assert mine[b] == listed(expected.hand.kept)
    alone = generate(model, given.row(2), steps=2)
    assert torch.equal(got.sequences[2:], alone.sequences)
    torch.testing.assert_close(new_logits(got)[2:], new_logits(alone), **TOLERANCE)


@pytest.mark.parametrize("name", ["infomerge", "unified"])
def test_decoding_by_hand_on_the_cache(name):
    """A loop of forwards instead of generate(): the cache reports the length that the caller knows."""
    model, method, given = plain(), compression(name), prompt([ONE])
    expected = answer(model, given, method)
    with compress(model, method), torch.no_grad():
        output, steps = model(given.ids, **given.given, use_cache=True), []
        for _ in range(3):
            steps.append(output.logits[0, -1])
            cache, token = output.past_key_values, output.logits[:, -1:].argmax(-1)
            output = model(token, past_key_values=cache, use_cache=True)
    assert torch.equal(torch.stack(steps).argmax(-1), expected.tokens)
    torch.testing.assert_close(torch.stack(steps), expected.logits, **TOLERANCE)
    assert cache.get_seq_length() == expected.hand.length + 3


@pytest.mark.parametrize("name", ["infomerge", "unified"])
def test_several_words_at_once_on_the_cache(name):
    """As a second turn has them."""
    model, method, given = plain(), compression(name), prompt([ONE], frames=2)
    decided = answer(model, given, method, steps=1).hand
    with torch.no_grad():
        expected = model.lm_head(decided.run([21, 22, 23, 24])[1][0, -4:])
        with compress(model, method):
            cache = model(given.ids, **given.given, use_cache=True).past_key_values
            got = model(torch.tensor([[21, 22, 23, 24]]), past_key_values=cache, use_cache=True).logits[0]
    torch.testing.assert_close(got, expected, **TOLERANCE)
    assert stored(cache) == [n + 4 for n in decided.lengths] and cache.get_seq_length() == decided.length + 4


@pytest.mark.parametrize("name", ["infomerge", "text_aware_merge"])
def test_beams_are_scored_as_recomputed(name, monkeypatch):
    model, method = plain(), compression(name)
    given = prompt([ONE, TWO], "left", frames=2)
    padded(monkeypatch, model, "left")
    with compress(model, method) as handle:
        got = generate(model, given, num_beams=3, num_return_sequences=2, output_scores=True)
        assert {(s.row, s.video) for s in handle.trace.last.steps} >= {(0, 0), (3, 1), (3, 2)}
        single = [generate(model, given.row(b), num_beams=3).sequences[0] for b in range(2)]
    for b in range(2):
        decided = answer(model, given.row(b), method, steps=1).hand
        for i in (2 * b, 2 * b + 1):
            own = hand.score(model, decided, got.sequences[i].tolist())
            assert float(got.sequences_scores[i]) == pytest.approx(own, abs=1e-3)
        assert torch.equal(got.sequences[2 * b], single[b])


# -- the package's own ways to say things ------------------------------------------------------------------------------
def test_other_ways_to_hand_a_video_over():
    model, method, given = plain(), compression("infomerge"), prompt([ONE])
    with compress(model, method) as handle:
        expected = logits(model, given)
        wanted = kept(handle, 0)
        (video,) = given.images
        for images, modalities in [([video], "video"), (video[None], ["video"]), ([video], ["video", "image"])]:
            with torch.no_grad():
                got = model(given.ids, images=images, modalities=modalities, image_sizes=[[SIZE, SIZE]]).logits
            assert torch.equal(got, expected) and kept(handle, 0) == wanted
        prepared = model.prepare_inputs_labels_for_multimodal(given.ids, None, None, None, None, [video], ["video"])
        with torch.no_grad():
            assert torch.equal(model(inputs_embeds=prepared[4]).logits, expected)
        assert len(handle.trace) == 5


def test_frames_that_the_package_takes_for_images_are_left_alone():
    """It pools nothing where `images` is one tensor of four axes, whatever the modalities."""
    model, given = plain(), prompt([[5, "V", 7]], frames=1)
    call = {"images": given.images[0], "modalities": ["video"]}
    with torch.no_grad():
        expected = model(given.ids, **call).logits
        assert expected.shape[1] == 2 + 27 * 27
        with compress(model, compression("infomerge")) as handle:
            assert torch.equal(model(given.ids, **call).logits, expected)
            assert handle.trace.last is None


def test_a_prompt_that_failed_is_not_taken_for_the_next_one():
    model, given, words = plain(), prompt([ONE]), prompt([WORDS])
    expected, answered = logits(model, words), new_logits(generate(model, words))
    embeds = model.model.embed_tokens(words.ids).detach()
    with compress(model, compression("infomerge")) as handle:
        with pytest.raises(ValueError, match="model_kwargs"):
            generate(model, given, no_such_argument=1)
        with torch.no_grad():
            assert torch.equal(model(inputs_embeds=embeds).logits, expected)
        for run, known in ((logits, expected), (lambda *a: new_logits(generate(*a)), answered)):
            model.prepare_inputs_labels_for_multimodal(given.ids, None, None, None, None, given.images, given.kinds)
            assert torch.equal(run(model, words), known)
        assert len(handle.trace) == 0


# -- the handle --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["fastvid", "unified"])
def test_removing_restores_the_model(name):
    model, given = build(), prompt([TWO])
    expected, answered = logits(model, given), generate(model, given)
    before = anatomy(model)
    handle = compress(model, compression(name))
    assert anatomy(model) != before
    assert not torch.equal(logits(model, given), expected)
    handle.remove()
    assert anatomy(model) == before
    assert vidcompress.handle_of(model) is None and not handle.active
    assert torch.equal(logits(model, given), expected)
    assert torch.equal(new_logits(generate(model, given)), new_logits(answered))


def test_switching_is_applying_the_other_method():
    model, given = plain(), prompt([ONE])
    fresh = {}
    for name in ("infomerge", "pyramiddrop", "unified"):
        with compress(model, compression(name)):
            fresh[name] = new_logits(generate(model, given))
    with compress(model, compression("fastv")) as handle:
        with pytest.raises(ValueError, match="already compresses with 'fastv'"):
            compress(model, "random")
        for name, expected in fresh.items():
            with without_head():
                handle.switch(compression(name))
            assert torch.equal(new_logits(generate(model, given)), expected)
        with pytest.raises(ValueError, match="this decoder has 6 layers"):
            handle.switch("fastv", layer=6)
        assert torch.equal(new_logits(generate(model, given)), fresh["unified"])


def test_the_trace(tmp_path, monkeypatch):
    model, given = plain(), prompt([ONE, TWO], "left")
    padded(monkeypatch, model, "left")
    with compress(model, compression("infomerge and text_aware_merge")) as handle:
        generate(model, given)
        handle.trace.save(tmp_path / "trace.json")
        handle.trace.clear()
        handle.trace.enabled = False
        generate(model, given)
        assert handle.trace.last is None
    (told,) = json.loads((tmp_path / "trace.json").read_text())["prompts"]
    assert [each["method"] for each in told["compression"]] == ["infomerge", "text_aware_merge"]
    assert (told["before"], told["after"], told["head"]) == (3 * 676, 3 * 101, None)
    assert told["length_before"] == 6 + 2 * (676 + NEWLINE_TOKENS["grid"])
    for step in told["steps"]:
        assert step["grid"] == [FRAMES, 13, 13] and len(step["keep"]) == step["after"]
    for step in told["steps"][:3]:
        assert step["newlines"] == len({place // 13 for place in step["keep"]})


# -- what is refused ---------------------------------------------------------------------------------------------------
def call(model: Any, given: Prompt) -> None:
    """A forward and a generate, both of which refuse, each for itself."""
    for run in (logits, generate):
        with pytest.raises(ValueError) as refused:
            run(model, given)
    raise refused.value


def refuses(given: Prompt, message: str, model: Any = None, **settings: Any) -> None:
    """A compressed model refuses a prompt, and serves the next one."""
    model = model or plain()
    with compress(model, compression("infomerge"), **settings):
        with pytest.raises(ValueError, match=message):
            call(model, given)
        logits(model, prompt([WORDS]))


def test_a_prompt_that_was_cut(monkeypatch):
    model = plain()
    monkeypatch.setattr(model.config, "tokenizer_model_max_length", 500)
    refuses(prompt([ONE]), r"prompt of row 0 has 733 tokens and was cut to 500 \(tokenizer_model_max_length\)")
    refuses(prompt([[5, "I", 6, "V", 7]]), r"row 0 fills all 500 places.*tokenizer_model_max_length")
    monkeypatch.setattr(model.config, "tokenizer_model_max_length", 733)
    with compress(model, compression("infomerge")) as handle:
        logits(model, prompt([ONE]))
        assert handle.trace.last.length_before == 733


def test_what_cuts_into_the_cache_while_decoding():
    model = plain()
    says = r"dycoke at decoding\[3\] removes .* transformers 4"
    with compress(model, "dycoke"), pytest.raises(ValueError, match=says):
        generate(model, prompt([ONE]))


def test_several_images_beside_a_video():
    refuses(prompt([[5, "I", "V", "I", 7]]), "holds several images; give at most one image beside videos")


def test_images_beside_videos_without_a_mask():
    given = prompt([[5, "I", "V", 7], [8, "I", "V", 9]])
    refuses(dataclasses.replace(given, mask=None), "several prompts with images beside videos need an attention_mask")


@pytest.mark.parametrize("newline", NEWLINES)
def test_a_prompt_that_ends_in_a_video(newline):
    """Its last token, from which the answer begins, may be removed; but never the newline of a whole video."""
    model, given, method = plain(newline=newline), prompt([[5, 6, "V"]]), compression("infomerge")
    if newline == "one_token":
        with compress(model, method):
            agrees(generate(model, given), answer(model, given, method))
    else:
        refuses(given, "the prompt ends inside a video", model)


def test_more_places_than_videos():
    """The package fills them with the last video once more."""
    given = prompt([[5, "V", 6, "V", 7]])
    refuses(
        dataclasses.replace(given, images=given.images[:1], kinds=["video"]),
        "row 0 has 2 placeholders for images and videos, and `images` holds 1",
    )


def test_a_dummy_that_is_a_video():
    given = prompt([WORDS, ONE])
    kinds = ["video", *given.kinds[1:]]
    refuses(dataclasses.replace(given, kinds=kinds), "row 0 holds no video, and its dummy")


@pytest.mark.parametrize("version", ["4.47.1", "4.50.0", "5.17.0"])
def test_another_transformers(version, monkeypatch):
    monkeypatch.setattr(transformers, "__version__", version)
    with pytest.raises(ValueError, match=rf"need transformers 4\.48 or 4\.49 here, this is {version}"):
        compress(plain(), "random")


def test_two_poolings_at_once(monkeypatch):
    model = plain()
    monkeypatch.setattr(model.config, "add_faster_video", True)
    with pytest.raises(ValueError, match="add_faster_video=True"):
        compress(model, "random")


def test_sliding_windows(monkeypatch):
    model = plain()
    monkeypatch.setattr(model.config, "use_sliding_window", True)
    with pytest.raises(ValueError, match="use_sliding_window=True"):
        compress(model, "random")


class CLIPVisionTower(nn.Module):
    """As the package's towers are: the real one is `vision_tower`."""

    def __init__(self) -> None:
        super().__init__()
        self.vision_tower = nn.Linear(1, 1)


def test_other_towers(monkeypatch):
    model = plain()
    before = anatomy(model)
    monkeypatch.setitem(model.model._modules, "vision_tower", CLIPVisionTower())
    with pytest.raises(ValueError, match="the vision tower is a CLIPVisionTower; only SigLIP towers are known"):
        compress(model, "random")
    monkeypatch.undo()
    assert anatomy(model) == before


def test_a_tower_that_is_not_loaded():
    model = build(delay_load=True)
    with pytest.raises(ValueError, match=r"vision tower of this model is not loaded.*load_pretrained_model"):
        compress(model, "random")


def test_another_model_under_this_type():
    model = nn.Linear(1, 1)
    model.config = native.config()
    with pytest.raises(ValueError, match="Linear is no model of the llava package"):
        compress(model, "random")


# -- the rest of the library under this transformers -------------------------------------------------------------------
def test_what_loads_models_says_how_to_load_these():
    message = r"with transformers 5\.17 or newer, .* load_pretrained_model, .* vidcompress\.apply"
    with pytest.raises(ImportError, match=message):
        vidcompress.from_pretrained("lmms-lab/LLaVA-Video-7B-Qwen2", compression="infomerge")
    with pytest.raises(ImportError, match=message):
        vidcompress.AutoModelForImageTextToText.from_pretrained("lmms-lab/LLaVA-Video-7B-Qwen2")
    with pytest.raises(ImportError, match=message):
        vidcompress.enable()
    assert "llava_qwen" in vidcompress.list_backbones()
