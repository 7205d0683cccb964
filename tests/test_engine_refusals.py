"""What cannot be served is refused with a clear error, before any work, and leaves nothing half-applied."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import tiny
import torch
from tiny import (
    METHODS,
    ONE,
    TWO,
    VIDEO,
    Prune,
    anatomy,
    compress,
    generate,
    llava,
    llava_inputs,
    new_tokens,
    step_logits,
)
from torch import nn
from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM

import vidcompress
from vidcompress import Reduction, Site, VideoTokens


@dataclass(kw_only=True)
class Needy(Prune):
    needs = frozenset({"optical_flow", "saliency.received"})


@dataclass(kw_only=True)
class Inner(Prune):
    layer: int = 6

    def sites(self, depth: int = 28) -> list[Site]:
        return [Site.decoder(self.layer)]


@dataclass(kw_only=True)
class Greedy(Prune):
    """Keeps one token too many for a video whose first token is bright: no lawful method does."""

    def reduce(self, tokens: VideoTokens, site: Site) -> Reduction:
        kept = self.budget(tokens.grid) + (1 if tokens.features[0, 0] > 0 else 2)
        return Reduction(torch.arange(kept), len(tokens))


@pytest.fixture
def model() -> Any:
    model = llava()
    compress(model, METHODS["infomerge"]())
    return model


@pytest.fixture
def tower_runs(model) -> list[int]:
    """Grows by one whenever the vision tower runs."""
    runs: list[int] = []
    model.model.vision_tower.register_forward_pre_hook(lambda module, args: runs.append(1))
    return runs


def run(model: Any, call: str, **inputs: Any) -> Any:
    """`model(**inputs)` or `model.generate(**inputs)`, as `call` says."""
    if call == "generate":
        return model.generate(**inputs, max_new_tokens=2)
    with torch.no_grad():
        return model(**inputs, use_cache="without cache" not in call)


def still_works(model: Any) -> None:
    """The compressed model answers as one that was never refused anything."""
    untouched = llava()
    compress(untouched, METHODS["infomerge"]())
    for texts in ([ONE], [TWO, [7, 8, 9]]):
        inputs = llava_inputs(texts, seed=1)
        assert torch.equal(step_logits(generate(model, inputs, 3)), step_logits(generate(untouched, inputs, 3)))
    assert len(model._vidcompress.trace) >= 2


# -- calls -------------------------------------------------------------------------------------------------------------
CHUNKED = GenerationConfig(prefill_chunk_size=8, max_new_tokens=3, pad_token_id=0)


@pytest.mark.parametrize(
    "own, args, settings",
    [
        (None, (), {"prefill_chunk_size": 8}),
        (None, (), {"generation_config": CHUNKED}),
        (None, (None, CHUNKED), {}),
        (8, (), {}),
    ],
    ids=["keyword", "generation_config", "generation_config by position", "the model's own"],
)
def test_chunked_prefill_with_a_video(model, tower_runs, own, args, settings):
    model.generation_config.prefill_chunk_size = own
    with pytest.raises(ValueError, match=r"prefill_chunk_size=8 with a video.*use prefill_chunk_size=None"):
        model.generate(*args, **llava_inputs([ONE]), **settings)
    assert not tower_runs
    model.generation_config.prefill_chunk_size = None
    still_works(model)


def test_chunked_prefill_of_words_is_the_models_own_matter(model):
    words = llava_inputs([[7, 8, 9, 10, 11, 12, 13]])
    expected = generate(llava(), words, prefill_chunk_size=3)
    assert torch.equal(generate(model, words, prefill_chunk_size=3).sequences, expected.sequences)


@pytest.mark.parametrize("call", ["forward", "generate", "forward without cache"])
@pytest.mark.parametrize("kind", ["4-D", "3-D", "dict"])
def test_prepared_masks(model, tower_runs, kind, call):
    inputs = llava_inputs([ONE])
    n = inputs["input_ids"].shape[1]
    full = torch.ones(1, 1, n, n, dtype=torch.bool).tril()
    mask = {"4-D": full, "3-D": full[0], "dict": {"full_attention": full}}[kind]
    named = "a dict of masks" if kind == "dict" else rf"shape \(1, .*{n}\)"
    with pytest.raises(ValueError, match=rf"attention_mask is {named}.*pass a 2-D mask \[batch, length\] or none"):
        run(model, call, **dict(inputs, attention_mask=mask))
    assert not tower_runs
    still_works(model)


def test_prepared_mask_on_a_compressed_cache(model):
    inputs = llava_inputs([ONE])
    with torch.no_grad():
        cache = model(**inputs, use_cache=True).past_key_values
    n = cache.get_seq_length() + 1
    with pytest.raises(ValueError, match="attention_mask is shape"):
        model(
            input_ids=torch.tensor([[5]]),
            attention_mask=torch.ones(1, 1, 1, n, dtype=torch.bool),
            past_key_values=cache,
        )
    assert cache.get_seq_length() == n - 1
    still_works(model)


@pytest.mark.parametrize("call", ["forward", "generate"])
def test_placeholders_without_a_video(model, tower_runs, call):
    inputs = llava_inputs([TWO])
    del inputs["pixel_values_videos"]
    with pytest.raises(ValueError, match="holds 50 video placeholders but no video: pass pixel_values_videos"):
        run(model, call, **inputs)
    assert not tower_runs
    still_works(model)


@pytest.mark.parametrize("call", ["forward", "generate"])
@pytest.mark.parametrize("cut", [1, 7, 25])
def test_truncated_prompt(model, call, cut):
    inputs = llava_inputs([["V", "V"]])
    for key in ("input_ids", "attention_mask"):
        inputs[key] = inputs[key][:, : 50 - cut]
    with pytest.raises(ValueError, match=rf"(?i)video.* {50 - cut}\b"):
        run(model, call, **inputs)
    still_works(model)


def test_video_without_placeholders(model):
    inputs = dict(llava_inputs([[5, 6, 7]]), pixel_values_videos=llava_inputs([ONE])["pixel_values_videos"])
    with pytest.raises(ValueError, match=r"(?i)video.* 0\b"):
        model(**inputs)
    still_works(model)


def test_placeholders_of_other_frames(model):
    inputs = llava_inputs([ONE], frames=6)
    inputs["pixel_values_videos"] = inputs["pixel_values_videos"][:, :4]
    with pytest.raises(ValueError, match=r"(?i)video.* 25\b"):
        model(**inputs)
    still_works(model)


def test_placeholders_that_do_not_fit_row_by_row(model):
    """In all there are enough, but the first row has one and a half videos."""
    places = [VIDEO] * 25
    inputs = tiny.left_padded([[5, *places, *places[:12]], [6, *places[12:]]])
    inputs["pixel_values_videos"] = llava_inputs([TWO])["pixel_values_videos"]
    with pytest.raises(ValueError, match=r"row 0 has 37 video placeholders.*\[25, 25\] placeholders each"):
        model(**inputs)
    still_works(model)


accepts_encoded = pytest.mark.skipif(
    "mm_encoder_outputs" not in inspect.signature(type(llava()).forward).parameters,
    reason="this transformers does not take encoded videos",
)


@accepts_encoded
@pytest.mark.parametrize("call", ["forward", "generate"])
def test_video_encoded_by_another_model(model, tower_runs, call):
    inputs = llava_inputs([ONE])
    encoded = llava().model.get_video_features(inputs.pop("pixel_values_videos"), return_dict=True)
    with pytest.raises(ValueError, match="mm_encoder_outputs were not encoded by this model since compression"):
        run(model, call, **inputs, mm_encoder_outputs={"video": encoded})
    assert not tower_runs
    still_works(model)


@accepts_encoded
def test_video_encoded_beforehand_by_the_model_itself(model):
    inputs = llava_inputs([TWO])
    expected = generate(model, inputs)
    with torch.no_grad():
        logits = model(**inputs).logits
        encoded = {"video": model.get_video_features(inputs.pop("pixel_values_videos"), return_dict=True)}
        assert torch.equal(model(**inputs, mm_encoder_outputs=dict(encoded)).logits, logits)
    assert torch.equal(generate(model, inputs, mm_encoder_outputs=encoded).sequences, expected.sequences)


# -- models and methods ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "method, message",
    [
        (Needy(), r"Needy needs \['optical_flow'\], which llava_onevision does not provide .*text_attention"),
        (Inner(layer=6), r"Inner acts at the input of layer 6; this decoder has 6 layers, 0 to 5"),
        (vidcompress.load([METHODS["prune"](), Inner(layer=9)]), r"Inner acts at the input of layer 9; .* 6 layers"),
        (
            vidcompress.load("text_aware_merge", layer=18),
            r"text_aware_merge acts at the input of layer 18; .* 6 layers",
        ),
    ],
)
def test_methods_that_cannot_be_served(method, message):
    model = llava()
    before = anatomy(model)
    with pytest.raises(ValueError, match=message):
        vidcompress.apply(model, method)
    assert anatomy(model) == before and vidcompress.handle_of(model) is None
    compress(model, METHODS["infomerge"]())
    still_works(model)


def test_a_refused_switch_keeps_the_present_method(model):
    handle = vidcompress.handle_of(model)
    for method in (Needy(), Inner(layer=6), "infomrge"):
        with pytest.raises(ValueError):
            handle.switch(method)
    assert handle.compression.name == "infomerge"
    still_works(model)


def test_sliding_windows():
    model = llava(use_sliding_window=True, sliding_window=8, max_window_layers=3)
    assert "sliding_attention" in model.config.text_config.layer_types
    before = anatomy(model)
    with pytest.raises(ValueError, match=r"sliding-window layers.*use_sliding_window=False"):
        vidcompress.apply(model, METHODS["prune"]())
    assert anatomy(model) == before


def test_backbone_without_a_patch():
    config = Qwen2Config(vocab_size=20, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    model = Qwen2ForCausalLM(config)
    before = anatomy(model)
    with pytest.raises(ValueError, match="no patch for model_type 'qwen2'") as error:
        vidcompress.apply(model, "uniform_tokens")
    for backbone in vidcompress.list_backbones():
        assert backbone in str(error.value)
    assert "llava_onevision" in vidcompress.list_backbones()
    assert anatomy(model) == before


@pytest.mark.parametrize("thing", [None, "llava", nn.Linear(2, 2)])
def test_no_model_at_all(thing):
    with pytest.raises(TypeError, match=f"expected a transformers model, got {type(thing).__name__}"):
        vidcompress.apply(thing, "uniform_tokens")


def test_model_that_keeps_its_parts_elsewhere():
    model = llava()
    model.model.decoder = model.model.language_model
    del model.model.language_model
    with pytest.raises(ValueError, match=r"has no `language_model.layers` in transformers \d.*tested with"):
        vidcompress.apply(model, "uniform_tokens")


def test_method_that_breaks_its_budget():
    model = llava()
    handle = compress(model, Greedy(retention_ratio=0.25))
    with pytest.raises(RuntimeError, match=r"Greedy kept [78] tokens of 24 at projector, not 6"):
        generate(model, llava_inputs([ONE]), 2)
    handle.remove()
    compress(model, METHODS["infomerge"]())
    still_works(model)


# -- NaN and inf -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "part, named",
    [
        (lambda model: model.model.multi_modal_projector.linear_2.bias, "^projector output (?!.*saliency)"),
        (
            lambda model: model.model.vision_tower.encoder.layers[-1].self_attn.q_proj.bias,
            "^projector output and .*saliency.head",
        ),
    ],
    ids=["projector", "tower"],
)
@pytest.mark.parametrize("call", ["forward", "generate"])
def test_features_that_are_not_finite(model, part, named, value, call):
    weight = part(model).data
    healthy = weight.clone()
    weight[0] = value
    with pytest.raises(ValueError, match=rf"{named}.*of video 0 \(row 0\) holds NaN or inf"):
        run(model, call, **llava_inputs([[9, 10], ONE][::-1]))
    weight.copy_(healthy)
    still_works(model)


def test_the_video_that_is_not_finite_is_named(model):
    inputs = llava_inputs([ONE, TWO])
    inputs["pixel_values_videos"][2, 3] = float("nan")
    with pytest.raises(ValueError, match=r"of video 2 \(row 1\) holds NaN or inf.*Look at the input frames"):
        model(**inputs)
    still_works(model)


# -- nothing is skipped in silence -------------------------------------------------------------------------------------
def replace_decoder(model: Any) -> None:
    other = type(model.model.language_model)(model.config.text_config).eval()
    other.load_state_dict(model.model.language_model.state_dict())
    model.model.language_model = other


def replace_decoder_call(model: Any) -> None:
    """As a wrapper does that calls the decoder's forward itself."""

    class Wrapper(nn.Module):
        def __init__(self, decoder: nn.Module) -> None:
            super().__init__()
            self.decoder = decoder
            self.get_input_embeddings = decoder.get_input_embeddings

        def forward(self, **kwargs: Any) -> Any:
            return self.decoder.forward(**kwargs)

    model.model.language_model = Wrapper(model.model.language_model)


def replace_rotary_embedding(model: Any) -> None:
    decoder = model.model.language_model
    decoder.rotary_emb = type(decoder.rotary_emb)(decoder.config)


@pytest.mark.parametrize("call", ["forward", "generate"])
@pytest.mark.parametrize("bypass", [replace_decoder, replace_decoder_call, replace_rotary_embedding])
def test_hooks_that_were_bypassed(model, bypass: Callable[[Any], None], call):
    """Without the decoder's hooks nothing is reduced, without the rotary one the positions are wrong."""
    whole = copy.copy(model.model._modules)
    rotary = model.model.language_model.rotary_emb
    bypass(model)
    with pytest.raises(RuntimeError, match="not called through its hook"):
        run(model, call, **llava_inputs([ONE]))
    # Prompts without a video need no hook.
    words = llava_inputs([[7, 8, 9]])
    assert torch.equal(new_tokens(generate(model, words), words), new_tokens(generate(llava(), words), words))
    model.model._modules.update(whole)
    model.model.language_model.rotary_emb = rotary
    still_works(model)


@pytest.mark.parametrize("how", ["forward", "generate"])
def test_placeholders_without_their_video_in_a_later_turn(how):
    model = llava()
    compress(model, METHODS["merge"]())
    cache = generate(model, llava_inputs([ONE]), 3).past_key_values
    later = llava_inputs([ONE])["input_ids"]
    with pytest.raises(ValueError, match="placeholders but no video"):
        if how == "forward":
            model(input_ids=later, past_key_values=cache)
        else:
            ids = torch.cat([torch.full((1, cache.get_seq_length()), 5), later], 1)
            generate(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, 2, past_key_values=cache)


def test_a_mask_that_is_no_tensor():
    model = llava()
    compress(model, METHODS["merge"]())
    inputs = llava_inputs([ONE])
    with pytest.raises(TypeError, match="attention_mask is a list"):
        model(**inputs | {"attention_mask": inputs["attention_mask"].tolist()})
