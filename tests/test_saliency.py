"""Signals out of the vision tower, against the tower's own attention matrices and a full SigLIP's pooling head."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import (
    FRAMES,
    METHODS,
    ONE,
    TWO,
    Prune,
    anatomy,
    generate,
    llava,
    llava_inputs,
    new_tokens,
    randomise,
    step_logits,
    without_head,
)
from torch import Tensor
from transformers import SiglipConfig, SiglipModel

import vidcompress
from vidcompress import Reduction, Site, VideoTokens
from vidcompress.engine import saliency

FALLBACK = "takes its saliency from SigLIP's pooling head"


@dataclass(kw_only=True)
class Received(Prune):
    """Notes the videos it is shown. Asks for the attention that tokens receive."""

    needs = frozenset({"saliency.received"})
    seen: list[VideoTokens] = field(default_factory=list)

    def reduce(self, tokens: VideoTokens, site: Site) -> Reduction:
        self.seen.append(tokens)
        return super().reduce(tokens, site)

    def signals(self, name: str) -> Tensor:
        """[videos, ...] of all videos it was shown."""
        return torch.stack([tokens.signal(name) for tokens in self.seen])


@dataclass(kw_only=True)
class Keyed(Received):
    """Asks for the tower's keys."""

    needs = frozenset({"tower_keys"})


@dataclass(kw_only=True)
class KeyedReceived(Keyed):
    """Asks for these, and for the attention."""

    needs = frozenset({"tower_keys", "saliency.received"})


@dataclass(kw_only=True)
class Headed(Received):
    """Asks for all there is."""

    needs = frozenset({"frame_features", "saliency.head", "saliency.received"})
    siglip_head: str | None = "auto"


def run(model: Any, call: str, inputs: dict[str, Tensor], **kwargs: Any) -> None:
    if call == "generate":
        generate(model, inputs, 2, **kwargs)
    else:
        with torch.no_grad():
            model(**inputs, **kwargs)


def stacked(signals: list[dict[str, Tensor]], name: str) -> Tensor:
    return torch.stack([s[name] for s in signals])


# -- received attention ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("call", ["forward", "generate"])
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize(
    "selected, layer", [(-1, -1), (-2, -2), (3, 2), (2, 1), ([-1, -2], -1), ([1, -2], -2)], ids=str
)
def test_received_is_the_column_mean_of_the_last_used_layer(selected, layer, attn, call):
    model = llava(attn, vision_feature_layer=selected)
    inputs = llava_inputs([TWO, ONE])
    expected = oracle.tower_signals(model, inputs["pixel_values_videos"], layer)
    method = Received()
    with vidcompress.apply(model, method):
        run(model, call, inputs)
    assert len(method.seen) == 3
    torch.testing.assert_close(method.signals("saliency.received"), stacked(expected, "saliency.received"))


@pytest.mark.parametrize("call", ["forward", "generate"])
def test_received_follows_the_layer_that_the_call_selects(call):
    model = llava()
    inputs = llava_inputs([ONE])
    expected = oracle.tower_signals(model, inputs["pixel_values_videos"], -2)
    method = Received()
    with vidcompress.apply(model, method):
        run(model, call, inputs, vision_feature_layer=-2)
    torch.testing.assert_close(method.signals("saliency.received"), stacked(expected, "saliency.received"))


@pytest.mark.parametrize("image_size, tokens", [(56, 4), (70, 9), (28, 1)])
def test_received_is_pooled_as_the_features_are(image_size, tokens):
    model = llava(image_size=image_size)
    inputs = llava_inputs([ONE], image_size=image_size)
    seen = []
    pool = type(model.model).apply_pooling
    model.model.apply_pooling = lambda features: seen.append(features) or pool(model.model, features)
    method = Received()
    with vidcompress.apply(model, method):
        run(model, "forward", inputs)
    features, scores = seen  # each once: the projected patches, and one score a patch
    assert features.shape[:2] == scores.shape[:2] and scores.shape[2] == 1
    torch.testing.assert_close(scores.sum((1, 2)), torch.ones(FRAMES))
    del model.model.apply_pooling
    expected = oracle.tower_signals(model, inputs["pixel_values_videos"])
    assert expected[0]["saliency.received"].shape == (FRAMES * tokens,)
    torch.testing.assert_close(method.signals("saliency.received"), stacked(expected, "saliency.received"))


@pytest.mark.parametrize("call", ["forward", "generate"])
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("selected, layer", [(-1, -1), (2, 1), ([1, -2], -2)], ids=str)
def test_keys_are_the_mean_over_heads_of_the_last_used_layer(selected, layer, attn, call):
    model = llava(attn, vision_feature_layer=selected)
    inputs = llava_inputs([TWO, ONE])
    expected = oracle.tower_signals(model, inputs["pixel_values_videos"], layer)
    method = Keyed()
    with vidcompress.apply(model, method):
        run(model, call, inputs)
    keys = method.signals("tower_keys")
    assert keys.shape == (3, FRAMES * 4, 8)
    torch.testing.assert_close(keys, stacked(expected, "tower_keys"))


@pytest.mark.parametrize("image_size, tokens", [(70, 9), (28, 1)])
def test_keys_are_pooled_as_the_features_are(image_size, tokens):
    model = llava(image_size=image_size)
    inputs = llava_inputs([ONE], image_size=image_size)
    method = Keyed()
    with vidcompress.apply(model, method):
        run(model, "forward", inputs)
    expected = stacked(oracle.tower_signals(model, inputs["pixel_values_videos"]), "tower_keys")
    assert expected.shape == (1, FRAMES * tokens, 8)
    torch.testing.assert_close(method.signals("tower_keys"), expected)


def test_keys_alone_ask_for_no_attention(monkeypatch):
    def never(*args: Any) -> Any:
        raise AssertionError("attention was worked out")

    inputs = llava_inputs([ONE])
    both, alone = KeyedReceived(), Keyed()
    model = llava()
    with vidcompress.apply(model, both):
        run(model, "forward", inputs)
    monkeypatch.setattr(saliency, "column_mean_attention", never)
    with vidcompress.apply(model, alone):
        run(model, "forward", inputs)
    assert set(alone.seen[0].signals) == {"tower_keys"}
    assert torch.equal(alone.signals("tower_keys"), both.signals("tower_keys"))


def test_keys_of_a_half_precision_tower_are_fp32():
    model = llava().to(torch.bfloat16)
    inputs = llava_inputs([ONE])
    inputs["pixel_values_videos"] = inputs["pixel_values_videos"].bfloat16()
    method = Keyed()
    with vidcompress.apply(model, method):
        run(model, "forward", inputs)
    expected = stacked(oracle.tower_signals(llava(), llava_inputs([ONE])["pixel_values_videos"]), "tower_keys")
    assert method.signals("tower_keys").dtype == torch.float32
    torch.testing.assert_close(method.signals("tower_keys"), expected, atol=5e-2, rtol=0.1)


@dataclass(kw_only=True)
class KeyedInside(Keyed):
    """Looks again inside the LLM, where some tokens are gone."""

    def sites(self, depth: int = 28) -> list[Site]:
        return [Site.projector(), Site.decoder(2, 1)]

    def reduce(self, tokens: VideoTokens, site: Site) -> Reduction:
        self.seen.append(tokens)
        every_other = torch.arange(len(tokens)) % 2 == 1
        return Reduction.pruning(every_other)


def test_keys_follow_the_tokens_that_are_left():
    model, inputs, method = llava(), llava_inputs([ONE]), KeyedInside(retention_ratio=0.5)
    with vidcompress.apply(model, method):
        run(model, "forward", inputs)
    first, second = method.seen
    assert len(second) < len(first)
    assert torch.equal(second.signal("tower_keys"), first.signal("tower_keys")[second.index])


def test_received_of_a_half_precision_tower_is_fp32():
    model = llava().to(torch.bfloat16)
    inputs = llava_inputs([ONE])
    inputs["pixel_values_videos"] = inputs["pixel_values_videos"].bfloat16()
    method = Received()
    with vidcompress.apply(model, method):
        run(model, "forward", inputs)
    got = method.signals("saliency.received")
    expected = stacked(oracle.tower_signals(llava(), llava_inputs([ONE])["pixel_values_videos"]), "saliency.received")
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, expected, atol=2e-2, rtol=0.1)


def test_signals_are_outside_the_graph():
    model = llava()
    method = Received()
    inputs = llava_inputs([ONE])
    with vidcompress.apply(model, method):
        model(**inputs).logits.sum().backward()
    assert not method.signals("saliency.received").requires_grad
    assert not method.seen[0].features.requires_grad
    assert model.model.multi_modal_projector.linear_1.weight.grad.any()


# -- what the tower is not asked for -----------------------------------------------------------------------------------
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_no_attention_matrix_is_requested(attn):
    model = llava(attn)
    tower = model.model.vision_tower
    calls: list[dict[str, Any]] = []
    weights = []
    with vidcompress.apply(model, Received()):
        tower.register_forward_pre_hook(lambda module, args, kwargs: calls.append(kwargs), with_kwargs=True)
        for layer in tower.encoder.layers:
            layer.self_attn.register_forward_hook(lambda module, args, output: weights.append(output[1]))
        assert tower.config._attn_implementation == attn
        run(model, "forward", llava_inputs([ONE]))
        run(model, "generate", llava_inputs([ONE]))
        assert tower.config._attn_implementation == attn
    assert len(calls) == 2 and not any(call.get("output_attentions") for call in calls)
    assert len(weights) == 6
    if attn == "sdpa":
        assert all(w is None for w in weights)


def test_a_method_without_needs_records_nothing(monkeypatch):
    def never(*args: Any) -> Any:
        raise AssertionError("recorded")

    monkeypatch.setattr(saliency.SiglipSignals, "caught", never)
    model = llava()
    inputs = llava_inputs([ONE])
    with vidcompress.apply(model, Prune()) as handle:
        model(**inputs)
        handle.switch(Received())
        with pytest.raises(AssertionError, match="recorded"):
            model(**inputs)


def test_images_are_not_recorded(monkeypatch):
    frames: list[int] = []
    original = saliency.column_mean_attention

    def counting(query: Tensor, key: Tensor, scale: float) -> Tensor:
        frames.append(len(query))
        return original(query, key, scale)

    monkeypatch.setattr(saliency, "column_mean_attention", counting)
    model = llava()
    method = Received()
    with vidcompress.apply(model, method):
        for call in ("forward", "generate"):
            run(model, call, llava_inputs([[5, "I", 6]]))
        assert not frames
        inputs = llava_inputs([[5, "I", 6, "V", 7, "I"]])
        for call in ("forward", "generate"):
            run(model, call, inputs)
    assert frames == [FRAMES, FRAMES]
    expected = oracle.tower_signals(llava(), inputs["pixel_values_videos"])
    for got in method.signals("saliency.received"):
        torch.testing.assert_close(got, expected[0]["saliency.received"])


def test_time_for_signals_is_told_apart():
    model = llava()
    with vidcompress.apply(model, Received()) as handle:
        run(model, "forward", llava_inputs([ONE]))
        assert handle.trace.last.signal_seconds > 0
        handle.switch(Prune())
        run(model, "forward", llava_inputs([ONE]))
        assert handle.trace.last.signal_seconds == 0


# -- the pooling head --------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def siglip() -> SiglipModel:
    """A full SigLIP as large as the tiny tower."""
    text = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    vision = llava().config.vision_config.to_dict() | {"vision_use_head": True}
    config = SiglipConfig(vision_config=vision, text_config=text | {"vocab_size": 50})
    return randomise(SiglipModel(config), seed=5).eval()


@pytest.fixture(scope="module")
def checkpoint(siglip, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("siglip")
    siglip.save_pretrained(folder)
    return folder


def with_tower_of(siglip: SiglipModel, **kwargs: Any) -> Any:
    """A model whose tower has SigLIP's weights."""
    model = llava(**kwargs)
    weights = siglip.vision_model.state_dict()
    own = model.model.vision_tower.state_dict()
    model.model.vision_tower.load_state_dict({key: weights[key] for key in own})
    return model


@torch.no_grad()
def head_signals(siglip: SiglipModel, model: Any, pixels: Tensor) -> list[dict[str, Tensor]]:
    """What every video should show, from the full SigLIP."""
    vision = siglip.vision_model
    output = vision(pixels.flatten(0, 1), output_hidden_states=True)
    states = vision.post_layernorm(output.hidden_states[-1])
    _, attention = vision.head.attention(vision.head.probe.expand(len(states), -1, -1), states, states)  # [F, 1, N]
    pooled = model.model.apply_pooling(attention.transpose(1, 2)).view(len(pixels), -1)
    features = output.pooler_output.view(len(pixels), pixels.shape[1], -1)
    return [{"saliency.head": pooled[v], "frame_features": features[v]} for v in range(len(pixels))]


@pytest.mark.parametrize("call", ["forward", "generate"])
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("source", ["file", "folder"])
def test_head_signals_are_those_of_the_full_siglip(siglip, checkpoint, source, attn, call):
    model = with_tower_of(siglip, attn=attn)
    inputs = llava_inputs([TWO, ONE])
    method = Headed(siglip_head=str(checkpoint / "model.safetensors" if source == "file" else checkpoint))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        handle = vidcompress.apply(model, method)
    run(model, call, inputs)
    handle.remove()
    expected = head_signals(siglip, model, inputs["pixel_values_videos"])
    for name in ("saliency.head", "frame_features"):
        torch.testing.assert_close(method.signals(name), stacked(expected, name), atol=1e-5, rtol=1e-4)
    received = oracle.tower_signals(model, inputs["pixel_values_videos"])
    torch.testing.assert_close(method.signals("saliency.received"), stacked(received, "saliency.received"))
    assert not torch.allclose(method.signals("saliency.head"), method.signals("saliency.received"), atol=1e-3)


@pytest.mark.parametrize("name", ["infomerge", "fastvid"])
def test_answers_with_a_head_as_recomputed(siglip, checkpoint, name):
    plain, model = with_tower_of(siglip), with_tower_of(siglip)
    method = METHODS[name](siglip_head=str(checkpoint))
    inputs = llava_inputs([TWO], seed=4)
    expected = oracle.answer(plain, inputs, method, signals=head_signals(siglip, plain, inputs["pixel_values_videos"]))
    fallback = oracle.answer(plain, inputs, method)
    vidcompress.apply(model, method)
    got = generate(model, inputs)
    assert torch.equal(new_tokens(got, inputs)[0], expected.tokens)
    torch.testing.assert_close(step_logits(got)[0], expected.logits, **oracle.TOLERANCE)
    assert (expected.logits[0] - fallback.logits[0]).abs().max() > 0.01  # the head makes a difference here


def test_the_head_is_no_part_of_the_model(siglip, checkpoint):
    plain, model = with_tower_of(siglip), with_tower_of(siglip)
    vidcompress.apply(model, Headed(siglip_head=str(checkpoint)))
    run(model, "forward", llava_inputs([ONE]))
    assert list(model.state_dict()) == list(plain.state_dict())
    assert [name for name, _ in model.named_modules()] == [name for name, _ in plain.named_modules()]


def test_a_head_of_another_width_is_refused(checkpoint, tmp_path):
    wide = {key: torch.cat([value, value], -1) for key, value in load_file(checkpoint / "model.safetensors").items()}
    save_file(wide, tmp_path / "wide.safetensors")
    model = llava()
    before = anatomy(model)
    with pytest.raises(ValueError, match=r"wide\.safetensors"):
        vidcompress.apply(model, Headed(siglip_head=str(tmp_path / "wide.safetensors")))
    with pytest.raises(FileNotFoundError, match=r"nowhere\.safetensors"):
        vidcompress.apply(model, Headed(siglip_head=str(tmp_path / "nowhere.safetensors")))
    assert anatomy(model) == before and vidcompress.handle_of(model) is None


def test_saliency_that_is_not_finite_is_named(siglip, checkpoint, tmp_path):
    weights = load_file(checkpoint / "model.safetensors")
    weights["vision_model.head.probe"][0, 0, 0] = float("nan")
    save_file(weights, tmp_path / "poisoned.safetensors")
    model = with_tower_of(siglip)
    method = Headed(siglip_head=str(tmp_path / "poisoned.safetensors"))
    inputs = llava_inputs([ONE])
    handle = vidcompress.apply(model, method)
    with pytest.raises(ValueError, match=r"^(?!projector).*saliency\.head.*of video 0 \(row 0\) holds NaN or inf"):
        run(model, "forward", inputs)
    handle.switch(Headed(siglip_head=str(checkpoint)))
    run(model, "forward", inputs)
    assert handle.trace.last.after < handle.trace.last.before


# -- without a head (decision D9) --------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "method, reason",
    [
        (METHODS["infomerge"](), "no published SigLIP head fits"),
        (METHODS["fastvid"](siglip_head="none"), "none was asked for"),
        (METHODS["fastvid"](siglip_head=None), "none was asked for"),
        (Headed(), "no published SigLIP head fits"),
    ],
)
def test_falling_back_is_said_exactly_once(method, reason):
    model = llava()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        vidcompress.apply(model, method)
        for seed in range(2):
            run(model, "forward", llava_inputs([TWO], seed=seed))
            run(model, "generate", llava_inputs([ONE], seed=seed))
    said = [str(w.message) for w in caught if FALLBACK in str(w.message)]
    assert len(said) == 1
    assert reason in said[0] and "set siglip_head to" in said[0]


def test_received_alone_needs_no_head_and_no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        vidcompress.apply(llava(), Received())


@pytest.mark.parametrize("call", ["forward", "generate"])
def test_fallback_signals_are_received_attention_and_mean_tokens(call):
    model = llava()
    inputs = llava_inputs([TWO, ONE])
    expected = oracle.tower_signals(model, inputs["pixel_values_videos"])
    method = Headed()
    with without_head(), vidcompress.apply(model, method):
        run(model, call, inputs)
    for name in method.needs:
        torch.testing.assert_close(method.signals(name), stacked(expected, name))
    torch.testing.assert_close(method.signals("saliency.head"), method.signals("saliency.received"), atol=0, rtol=0)
    assert method.seen[0].signal("frame_features").shape == (FRAMES, model.config.text_config.hidden_size)
