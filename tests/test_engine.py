"""A compressed model's forward against the hook-free recomputation of `oracle`."""

from __future__ import annotations

from typing import Any

import oracle
import pytest
import torch
from tiny import (
    FRAMES,
    HIDDEN,
    IMAGE,
    METHODS,
    ONE,
    PAD,
    TWO,
    VIDEO,
    Mix,
    compress,
    generate,
    llava,
    llava_inputs,
    new_tokens,
    pair,
    step_logits,
    video_length,
    without_mask,
)
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from vidcompress import list_methods, load


def decoder_inputs(model: Any, **call: Any) -> list[Tensor]:
    """What enters the first decoder layer [B, n, C], for every pass through the decoder during one forward."""
    seen = []
    layer = model.model.language_model.layers[0]
    hook = layer.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    try:
        with torch.no_grad():
            model(**call)
    finally:
        hook.remove()
    return seen


# -- nothing to remove: the model itself -------------------------------------------------------------------------------
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("name", [*list_methods(), "toy"])
def test_keeping_all_is_bit_identical(name, attn):
    inner = {"keep_ratio": 1.0} if hasattr(list_methods().get(name), "keep_ratio") else {}
    method = Mix(retention_ratio=1) if name == "toy" else load(name, retention_ratio=1.0, **inner)
    plain, model, handle = pair(method, attn=attn)
    inputs = llava_inputs([ONE, TWO])
    expected, got = generate(plain, inputs), generate(model, inputs)
    assert torch.equal(expected.sequences, got.sequences)
    assert torch.equal(step_logits(expected), step_logits(got))
    assert handle.trace.last.before == handle.trace.last.after == 3 * 4 * FRAMES
    with torch.no_grad():
        assert torch.equal(plain(**inputs).logits, model(**inputs).logits)
        assert torch.equal(plain(**inputs, use_cache=False).logits, model(**inputs, use_cache=False).logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    plain, model = llava().to(dtype), llava().to(dtype)
    inputs = llava_inputs([ONE, TWO])
    inputs["pixel_values_videos"] = inputs["pixel_values_videos"].to(dtype)
    handle = compress(model, "infomerge", retention_ratio=1.0)
    assert torch.equal(step_logits(generate(plain, inputs)), step_logits(generate(model, inputs)))
    handle.switch(METHODS["merge"]())
    with torch.no_grad():
        logits = model(**inputs).logits
    assert logits.dtype == dtype and logits.isfinite().all()


@pytest.mark.parametrize("texts", [[[5, 6, 7, 8]], [[5, "I", 7, 8]], [[5, "I", 7], [9, 10, 11, "I", "I", 12]]])
@pytest.mark.parametrize("cache", [None, "static"])
def test_prompts_without_video_are_untouched_and_not_traced(texts, cache):
    plain, model, handle = pair(METHODS["merge"]())
    inputs = llava_inputs(texts)
    expected, got = (generate(m, inputs, cache_implementation=cache) for m in (plain, model))
    assert torch.equal(expected.sequences, got.sequences)
    assert torch.equal(step_logits(expected), step_logits(got))
    with torch.no_grad():
        assert torch.equal(plain(**inputs).logits, model(**inputs).logits)
    assert len(handle.trace) == 0
    # The same after a prompt with a video.
    generate(model, llava_inputs([TWO]), 2)
    assert torch.equal(step_logits(expected), step_logits(generate(model, inputs, cache_implementation=cache)))
    assert len(handle.trace) == 1


# -- against the oracle ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("positions", ["keep", "renumber"])
@pytest.mark.parametrize("text", [ONE, TWO], ids=["one video", "two videos"])
@pytest.mark.parametrize("name", METHODS)
def test_answers_as_recomputed(name, text, positions, attn):
    method = METHODS[name](positions=positions)
    plain, model, handle = pair(method, attn=attn)
    inputs = llava_inputs([text])
    expected = oracle.answer(plain, inputs, method)
    for call in (inputs, without_mask(inputs)):
        for use_cache in (True, False):
            got = generate(model, call, use_cache=use_cache)
            assert torch.equal(new_tokens(got, inputs)[0], expected.tokens)
            torch.testing.assert_close(step_logits(got)[0], expected.logits, **oracle.TOLERANCE)
    steps = handle.trace[0].steps
    assert [(s.row, s.video, s.before) for s in steps] == [(0, v, 4 * FRAMES) for v in range(text.count("V"))]
    assert all(s.after == method.budget(s.grid) < s.before for s in steps)
    assert all((s.reduction.slot is None) == (name == "prune") for s in steps)


@pytest.mark.parametrize("positions", ["keep", "renumber"])
@pytest.mark.parametrize("name", METHODS)
def test_forward_gives_the_survivors_logits_at_the_callers_places(name, positions):
    method = METHODS[name](positions=positions)
    plain, model, _ = pair(method)
    inputs = llava_inputs([TWO])
    with torch.no_grad():
        prompt = oracle.shorten(plain, inputs, method)
        expected = torch.zeros(inputs["input_ids"].shape[1], plain.config.text_config.vocab_size)
        expected[prompt.columns] = plain.lm_head(oracle.hidden_states(plain, prompt))
        for call in (inputs, without_mask(inputs)):
            for use_cache in (True, False, None):
                got = model(**call, use_cache=use_cache).logits[0]
                torch.testing.assert_close(got, expected, **oracle.TOLERANCE)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("image_size, frames", [(70, 5), (28, 4), (56, 1)], ids=["3x3", "1x1", "one frame"])
def test_other_shapes(name, image_size, frames):
    method = METHODS[name]()
    plain, model, _ = pair(method, image_size=image_size)
    inputs = llava_inputs([ONE], frames, image_size=image_size)
    expected = oracle.answer(plain, inputs, method, steps=4)
    got = generate(model, inputs, 4)
    assert torch.equal(new_tokens(got, inputs)[0], expected.tokens)
    torch.testing.assert_close(step_logits(got)[0], expected.logits, **oracle.TOLERANCE)


@pytest.mark.parametrize("name", METHODS)
def test_images_beside_a_video_arrive_unchanged(name):
    method = METHODS[name]()
    plain, model, handle = pair(method)
    inputs = llava_inputs([[5, "I", 6, "V", 7, "I", 8], [9, "V", 10]])
    (placed,), (arrived,) = decoder_inputs(plain, **inputs), decoder_inputs(model, **inputs)
    prompt = oracle.shorten(plain, oracle.row(inputs, 0), method)
    columns = prompt.columns  # row 0 is the longer one and has no padding
    assert arrived.shape[1] == len(prompt)
    kept = inputs["input_ids"][0, columns]
    assert int((kept == IMAGE).sum()) == int((inputs["input_ids"][0] == IMAGE).sum())
    # Images, words and newlines bit by bit; the video's tokens as the method wants them.
    video = kept == VIDEO
    newline = int(video.nonzero()[-1])
    video[newline] = False
    assert torch.equal(arrived[0, ~video], placed[0, columns[~video]])
    torch.testing.assert_close(arrived[0, video], prompt.embeds[0, video])
    assert [s.row for s in handle.trace.last.steps] == [0, 1]
    for b in range(2):
        expected = oracle.answer(plain, oracle.row(inputs, b), method, steps=4)
        assert torch.equal(new_tokens(generate(model, inputs, 4), inputs)[b], expected.tokens)


def test_caller_positions_are_kept():
    plain, model, _ = pair(METHODS["merge"]())
    inputs = llava_inputs([ONE])
    length = inputs["input_ids"].shape[1]
    prompt = oracle.shorten(plain, inputs, METHODS["merge"]())
    # Stretched positions: text far from the video attends to it differently than with consecutive ones.
    stretched = torch.arange(length)[None] * 3 + 11
    moved = oracle.Prompt(prompt.embeds, stretched[:, prompt.columns], prompt.columns)
    with torch.no_grad():
        expected = plain.lm_head(oracle.hidden_states(plain, moved))
        got = model(**inputs, position_ids=stretched).logits[0, prompt.columns]
        consecutive = model(**inputs).logits[0, prompt.columns]
    torch.testing.assert_close(got, expected, **oracle.TOLERANCE)
    assert (got - consecutive).abs().max() > 0.1


def test_layers_get_contiguous_positions_and_the_rotary_embedding_gappy_ones():
    """FlashAttention takes gaps in a layer's position_ids for packed sequences and would cut the prompt there."""
    _, compressed, _ = pair(METHODS["prune"]())
    seen: dict[str, Tensor] = {}

    def layer(module: Any, args: Any, kwargs: Any) -> None:
        seen["layer"] = kwargs["position_ids"]

    def rotary(module: Any, args: Any, kwargs: Any) -> None:
        seen["rotary"] = kwargs.get("position_ids", args[-1])

    decoder = compressed.model.language_model
    decoder.layers[0].register_forward_pre_hook(layer, with_kwargs=True)
    decoder.rotary_emb.register_forward_pre_hook(rotary, with_kwargs=True)
    inputs = llava_inputs([ONE])
    compressed(**inputs)
    assert (seen["layer"].diff() == 1).all()
    assert (seen["rotary"].diff() > 1).any() and seen["rotary"][0, -1] == inputs["input_ids"].shape[1] - 1


def test_the_model_without_its_head_can_be_compressed():
    plain, whole = llava(), llava()
    method = METHODS["merge"]()
    compress(whole.model, method)
    inputs = llava_inputs([TWO])
    prompt = oracle.shorten(plain, inputs, method)
    with torch.no_grad():
        hidden = whole.model(**inputs).last_hidden_state
        torch.testing.assert_close(hidden[0, prompt.columns], oracle.hidden_states(plain, prompt), **oracle.TOLERANCE)
    assert hidden.shape == (1, inputs["input_ids"].shape[1], HIDDEN)


# -- what a forward can be asked for -----------------------------------------------------------------------------------
def test_logits_to_keep():
    _, model, _ = pair(METHODS["merge"]())
    inputs = llava_inputs([TWO, ONE])
    with torch.no_grad():
        whole = model(**inputs).logits
        places = torch.tensor([0, 3, inputs["input_ids"].shape[1] - 1])
        torch.testing.assert_close(model(**inputs, logits_to_keep=2).logits, whole[:, -2:])
        torch.testing.assert_close(model(**inputs, logits_to_keep=places).logits, whole[:, places])


@pytest.mark.parametrize("use_cache", [True, False])
def test_hidden_states_have_the_callers_length(use_cache):
    method = METHODS["merge"]()
    plain, model, _ = pair(method)
    inputs = llava_inputs([ONE, TWO])
    with torch.no_grad():
        output = model(**inputs, output_hidden_states=True, use_cache=use_cache)
    batch, length = inputs["input_ids"].shape
    assert [h.shape for h in output.hidden_states] == [(batch, length, HIDDEN)] * 7
    for b in range(batch):
        prompt = oracle.shorten(plain, oracle.row(inputs, b), method)
        padding = int((inputs["attention_mask"][b] == 0).sum())
        kept = torch.zeros(length, dtype=torch.bool)
        kept[prompt.columns + padding] = True
        for hidden in output.hidden_states:
            assert not hidden[b, ~kept].any()
        torch.testing.assert_close(output.hidden_states[0][b, kept], prompt.embeds[0])
        expected = oracle.hidden_states(plain, prompt)
        torch.testing.assert_close(output.hidden_states[-1][b, kept], expected, **oracle.TOLERANCE)


def test_attentions_are_those_of_the_short_sequence():
    method = METHODS["prune"]()
    plain, model, _ = pair(method, attn="eager")
    inputs = llava_inputs([ONE])
    n = len(oracle.shorten(plain, inputs, method))
    with torch.no_grad():
        output = model(**inputs, output_attentions=True)
    assert [a.shape for a in output.attentions] == [(1, 4, n, n)] * 6
    generated = generate(model, inputs, 3, output_attentions=True)
    assert [step[0].shape[-1] for step in generated.attentions] == [n, n + 1, n + 2]


def test_tuples_instead_of_outputs():
    _, model, _ = pair(METHODS["merge"]())
    inputs = llava_inputs([TWO])
    with torch.no_grad():
        output, values = model(**inputs), model(**inputs, return_dict=False)
    assert isinstance(values, tuple)
    assert torch.equal(values[0], output.logits)
    assert values[1].get_seq_length() == inputs["input_ids"].shape[1]


def test_embedded_prompt_with_pixels():
    method = METHODS["merge"]()
    plain, model, _ = pair(method)
    inputs = llava_inputs([TWO])
    expected = oracle.answer(plain, inputs, method)
    embedded = dict(inputs, inputs_embeds=model.get_input_embeddings()(inputs["input_ids"]).detach())
    del embedded["input_ids"]
    with torch.no_grad():
        logits = model(**embedded).logits
    torch.testing.assert_close(logits[0, -1], expected.logits[0], **oracle.TOLERANCE)
    got = generate(model, embedded)  # answers with the new tokens alone
    assert torch.equal(got.sequences[0], expected.tokens)


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("name", METHODS)
def test_loss_and_gradients_are_the_oracles(name, attn):
    method = METHODS[name]()
    plain, model, handle = pair(method, attn=attn)
    inputs = llava_inputs([TWO])
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == VIDEO, -100)
    projected = []
    model.model.multi_modal_projector.register_forward_hook(lambda module, args, output: projected.append(output))

    expected = oracle.loss(plain, inputs, labels, method)
    got = model(**inputs, labels=labels).loss
    torch.testing.assert_close(got, expected, **oracle.TOLERANCE)

    projected[0].retain_grad()
    expected.backward()
    got.backward()
    for wanted, parameter in zip(plain.parameters(), model.parameters()):
        assert (wanted.grad is None) == (parameter.grad is None)
        if wanted.grad is not None:
            assert parameter.grad.isfinite().all()
            scale = float(wanted.grad.abs().max())
            torch.testing.assert_close(parameter.grad, wanted.grad, atol=1e-3 * scale + 1e-7, rtol=1e-2)
    assert model.model.multi_modal_projector.linear_1.weight.grad.any()
    # A token gets a gradient if it survives or is merged into a survivor, and no other one does.
    flow = model.model.apply_pooling(projected[0].grad).abs().sum(-1).view(2, -1)
    for step in handle.trace.last.steps:
        reduction = step.reduction
        assert torch.equal(flow[step.video] > 0, (oracle.matrix(reduction) != 0).any(0))


@pytest.mark.parametrize("positions", ["keep", "renumber"])
def test_padding_on_the_right(positions):
    """As trainers pad: the logits of every row are those of the row alone."""
    method = METHODS["merge"](positions=positions)
    plain, model, _ = pair(method)
    inputs = llava_inputs([ONE, TWO])
    padding = [int(n) for n in (inputs["attention_mask"] == 0).sum(1)]
    right = dict(inputs)
    for key in ("input_ids", "attention_mask"):
        right[key] = torch.stack([values.roll(-n) for values, n in zip(inputs[key], padding)])
    with torch.no_grad():
        for use_cache in (True, False):
            got = model(**right, use_cache=use_cache).logits
            for b in range(2):
                prompt = oracle.shorten(plain, oracle.row(right, b), method)
                expected = plain.lm_head(oracle.hidden_states(plain, prompt))
                torch.testing.assert_close(got[b, prompt.columns], expected, **oracle.TOLERANCE)


def test_gradient_checkpointing_gives_the_same_gradients():
    method = METHODS["merge"]()
    _, model, _ = pair(method)
    _, thrifty, _ = pair(method)
    inputs = llava_inputs([TWO])
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == VIDEO, -100)
    recomputed = []

    def counting_checkpoint(*args: Any) -> Any:
        recomputed.append(1)
        return checkpoint(*args, use_reentrant=False)

    for layer in thrifty.model.language_model.layers:
        layer.gradient_checkpointing, layer._gradient_checkpointing_func = True, counting_checkpoint
    thrifty.train()
    losses = [m(**inputs, labels=labels, use_cache=False).loss for m in (model, thrifty)]
    assert len(recomputed) == 6
    torch.testing.assert_close(*losses)
    for value in losses:
        value.backward()
    for wanted, parameter in zip(model.parameters(), thrifty.parameters()):
        assert (wanted.grad is None) == (parameter.grad is None)
        if wanted.grad is not None:
            torch.testing.assert_close(parameter.grad, wanted.grad, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", METHODS)
def test_inference_mode_and_autocast(name):
    _, model, _ = pair(METHODS[name]())
    inputs = llava_inputs([ONE, TWO])
    with torch.no_grad():
        expected = model(**inputs).logits
    with torch.inference_mode():
        assert torch.equal(model(**inputs).logits, expected)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert model(**inputs).logits.isfinite().all()


# -- the cache ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", METHODS)
def test_cache_stores_the_survivors_and_tells_the_callers_length(name):
    method = METHODS[name]()
    plain, model, _ = pair(method)
    inputs = llava_inputs([ONE, TWO])
    batch, length = inputs["input_ids"].shape
    stored = max(len(oracle.shorten(plain, oracle.row(inputs, b), method)) for b in range(batch))
    assert stored == 6 + 2 * (method.budget((FRAMES, 2, 2)) + 1)
    with torch.no_grad():
        cache = model(**inputs, use_cache=True).past_key_values
    assert [layer.keys.shape[2] for layer in cache.layers] == [stored] * 6
    assert cache.get_seq_length() == length
    cache = generate(model, inputs, 5).past_key_values
    assert [layer.keys.shape[2] for layer in cache.layers] == [stored + 4] * 6
    assert cache.get_seq_length() == length + 4


def test_padding_is_only_what_the_longest_row_needs():
    plain, model, _ = pair(METHODS["prune"]())
    words = list(range(20, 20 + video_length(FRAMES)))
    inputs = llava_inputs([ONE, words])  # the text row becomes the longer one
    (arrived,) = decoder_inputs(model, **inputs)
    assert arrived.shape[1] == len(words)
    padding = int((inputs["input_ids"][1] == PAD).sum())
    (placed,) = decoder_inputs(plain, **inputs)
    assert torch.equal(arrived[1], placed[1, padding:])
