"""LLaVA-NeXT-Video: a tower that is no SigLIP, another decoder, no newline; and the video models that are refused."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import oracle
import pytest
import torch
from test_engine_generate import agrees, empty_cache, followed_by
from test_engine_inner import stored
from test_engine_llava_video import CASES, of
from test_matrix import read_next_video
from tiny import METHODS, ONE, TWO, Prune, compress, generate, step_logits
from tiny_next_video import TOKENS, next_inputs, next_video
from torch import Tensor
from torch.nn import functional

import vidcompress
from vidcompress import patches
from vidcompress.method import Pipeline


class Keyed(Prune):
    """Asks for the tower's keys."""

    needs = frozenset({"tower_keys"})


def shortened(model: Any, inputs: dict[str, Tensor], handle: Any, positions: str) -> Tensor:
    """The last token's logits for one row, by hand: features placed, columns dropped as the trace says."""
    base, ids = model.model, inputs["input_ids"]
    handle.remove()
    embeds = base.get_input_embeddings()(ids)
    features = base.get_video_features(inputs["pixel_values_videos"]).pooler_output
    video = (ids == model.config.video_token_id)[0]
    features = torch.cat([f.reshape(-1, f.shape[-1]) for f in features])
    stays = ~video
    columns, start = video.nonzero().squeeze(1), 0
    for step in handle.trace.last.steps:
        mine = columns[start : start + step.before]
        merged = step.reduction.apply(features[start : start + step.before])
        stays[mine[step.reduction.keep]] = True
        embeds[0, mine[step.reduction.keep]] = merged
        start += step.before
    kept = stays.nonzero().squeeze(1)
    places = kept if positions == "keep" else torch.arange(len(kept))
    hidden = base.language_model(inputs_embeds=embeds[:, kept], position_ids=places[None]).last_hidden_state
    return model.lm_head(hidden[:, -1])


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("positions", ["keep", "renumber"])
@pytest.mark.parametrize("text", [ONE, TWO])
@torch.no_grad()
def test_prefill_equals_a_prompt_shortened_by_hand(attn, positions, text):
    model, inputs = next_video(attn), next_inputs([text])
    handle = vidcompress.apply(model, "infomerge", retention_ratio=0.4, positions=positions)
    logits = model(**inputs).logits[:, -1]
    expected = shortened(model, inputs, handle, positions)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(model(**inputs).logits[:, -1], expected, rtol=1e-2)


@torch.no_grad()
def test_received_is_what_patches_receive_in_the_selected_layer():
    model, inputs = next_video("eager"), next_inputs([ONE])
    pixels = inputs["pixel_values_videos"]
    seen: list[Any] = []
    layer = model.model.vision_tower.encoder.layers[model.config.vision_feature_layer]
    layer.self_attn.register_forward_hook(lambda module, args, output: seen.append(output[1]))
    model.model.get_video_features(pixels)
    received = seen[0].mean((1, 2))[:, 1:].view(len(pixels[0]), 1, 4, 4)  # the class token's row counts
    expected = functional.avg_pool2d(received, 2).flatten(1)
    with vidcompress.apply(model, METHODS["infomerge"]()):
        signals = model.model.get_video_features(pixels).vidcompress.videos[0].signals
    torch.testing.assert_close(signals["saliency.head"], expected, rtol=1e-4, atol=1e-7)
    assert "frame_features" not in signals  # the mean of each frame's tokens stands in


@torch.no_grad()
def test_keys_are_those_of_the_selected_layer_without_the_class_token():
    model, inputs = next_video(), next_inputs([ONE])
    pixels = inputs["pixel_values_videos"]
    seen: list[Tensor] = []
    layer = model.model.vision_tower.encoder.layers[model.config.vision_feature_layer]
    hook = layer.register_forward_pre_hook(lambda module, args, kwargs: seen.append(args[0]), with_kwargs=True)
    model.model.get_video_features(pixels)
    hook.remove()
    patches_of = oracle.tower_keys(layer, seen[0])[:, 1:].transpose(1, 2).unflatten(2, (4, 4))
    expected = functional.avg_pool2d(patches_of, 2).flatten(2).transpose(1, 2)
    with vidcompress.apply(model, Keyed()):
        signals = model.model.get_video_features(pixels).vidcompress.videos[0].signals
    torch.testing.assert_close(signals["tower_keys"], expected, rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_batches_decoding_and_removal():
    model, plain = next_video(), next_video()
    batch = next_inputs([TWO, ONE])
    before = step_logits(generate(plain, batch, 4))
    with vidcompress.apply(model, "unified", retention_ratio=0.5) as handle:
        together = step_logits(generate(model, batch, 4))
        assert [s.before for s in handle.trace.last.steps[:3]] == [6 * TOKENS] * 3
        assert all(s.newlines == 0 for s in handle.trace.last.steps)
        for row, videos in enumerate((slice(0, 2), slice(2, 3))):
            real = batch["attention_mask"][row].bool()
            one = {
                "input_ids": batch["input_ids"][row, real][None],
                "attention_mask": batch["attention_mask"][row, real][None],
                "pixel_values_videos": batch["pixel_values_videos"][videos],
            }
            alone = step_logits(generate(model, one, 4))
            torch.testing.assert_close(together[row], alone[0], rtol=1e-4, atol=1e-4)
    assert torch.equal(before, step_logits(generate(model, batch, 4)))


@pytest.mark.parametrize(
    ("kind", "why"),
    [("video_llama_3", "drops video tokens"), ("internvl", "as images"), ("video_llava", "class token")],
)
def test_models_that_cannot_be_served_are_refused_with_the_reason(kind, why):
    with pytest.raises(ValueError, match=f"{kind} cannot be compressed: .*{why}.*vidcompress knows: .*llava_onevision"):
        patches.find(SimpleNamespace(model_type=kind))


# -- against the oracle ------------------------------------------------------------------------------------------------
def pair_of(method: Any, attn: str = "sdpa") -> tuple[Any, Any, Any]:
    """A plain model, an equal one that is compressed, and its handle."""
    plain, compressed = next_video(attn), next_video(attn)
    return plain, compressed, compress(compressed, method)


@pytest.mark.parametrize("name, positions, attn", CASES)
def test_every_row_of_a_padded_batch_as_recomputed(name, positions, attn):
    method = of(name, positions)
    plain, model, handle = pair_of(method, attn)
    inputs = next_inputs([ONE, [7, 8, 9], TWO])
    got = generate(model, inputs, 4)
    uncached = generate(model, inputs, 4, use_cache=False)
    lengths = []
    for b in range(3):
        alone = oracle.row(inputs, b)
        expected = oracle.answer(plain, alone, method, steps=4, read=read_next_video)
        agrees(got, inputs, expected, b)
        agrees(uncached, inputs, expected, b)
        lengths.append(oracle.shorten(plain, alone, method, read=read_next_video).lengths(6))
    assert handle.trace[0].layer_lengths == [max(each) for each in zip(*lengths)]
    assert stored(got.past_key_values) == [n + 3 for n in handle.trace[0].layer_lengths]


@pytest.mark.parametrize("name", ["merge", "outer and three"])
@pytest.mark.parametrize("positions", ["keep", "renumber"])
def test_two_turns_on_one_cache(name, positions):
    """A video in the first turn, words in the second, decided once; and what generate() wrote in between."""
    method = of(name, positions)
    plain, model, handle = pair_of(method)
    inputs = next_inputs([ONE, TWO])
    cache = empty_cache(model)
    second = followed_by(generate(model, inputs, 4, past_key_values=cache), inputs, [21, 22, 23])
    got = generate(model, second, 4, past_key_values=cache)
    whole = dict(second, pixel_values_videos=inputs["pixel_values_videos"])
    for b in range(2):
        turns = [(int(inputs["attention_mask"][b].sum()), method)]
        expected = oracle.answer(plain, oracle.row(whole, b), method, steps=4, turns=turns, read=read_next_video)
        agrees(got, second, expected, b)
    assert len(handle.trace) == 1


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_nothing_removed_is_bit_identical(attn):
    model, inputs = next_video(attn), next_inputs([TWO, ONE])
    plain = generate(model, inputs, 3)
    with compress(model, Pipeline([Prune(retention_ratio=1.0)])):
        kept = generate(model, inputs, 3)
    assert torch.equal(kept.sequences, plain.sequences)
    assert all(torch.equal(a, b) for a, b in zip(kept.logits, plain.logits, strict=True))
