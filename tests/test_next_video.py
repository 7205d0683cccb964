"""LLaVA-NeXT-Video: a tower that is no SigLIP, another decoder, no newline; and the video models that are refused."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import oracle
import pytest
import torch
from tiny import METHODS, ONE, TWO, Prune, generate, step_logits
from tiny_next_video import TOKENS, next_inputs, next_video
from torch import Tensor
from torch.nn import functional

import vidcompress
from vidcompress import patches


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
