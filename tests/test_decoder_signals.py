"""What a decoder layer says of the video, against the attention matrices and hidden states of a plain eager model."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import (
    FRAMES,
    LATE,
    METHODS,
    ONE,
    SPECIAL,
    TWO,
    VIDEO,
    Attentive,
    generate,
    llava,
    llava_inputs,
    without_head,
)
from torch import Tensor, nn
from transformers import DynamicCache, Qwen3Config, StaticCache
from transformers.cache_utils import DynamicLayer

import vidcompress
from vidcompress import Reduction, Site, VideoTokens
from vidcompress.engine.decoder_signals import DECODER_SIGNALS, cached_keys

ROWS = [ONE, TWO, LATE]
CLOSE = {"atol": 1e-5, "rtol": 1e-3}
INSIDE = DECODER_SIGNALS - {"first_look"}
"""Those of a layer that the prompt passes; tests/test_baseline_dytok.py tries the look before it."""


class Listener(Attentive):
    """Asks for every signal at once."""

    needs = INSIDE  # type: ignore[assignment]

    def reduce(self, tokens: VideoTokens, site: Site) -> Reduction:
        self.seen.append(tokens)
        return self.top(tokens, site, tokens.signal("text_attention"))


def listen(model: Any, layer: int, **call: Any) -> list[VideoTokens]:
    """What a method at `layer` is shown of every video of one forward."""
    method = Listener(layers=(layer,))
    with torch.no_grad(), vidcompress.apply(model, method):
        model(**call)
    return method.seen


@torch.no_grad()
def told(model: Any, layer: int, inputs: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """The same from a whole forward of an eager model: softmax matrices of `layer` and of the one before."""
    output = model(**inputs, output_attentions=True, output_hidden_states=True, use_cache=False)
    ids, real = inputs["input_ids"], inputs["attention_mask"].bool()
    hidden, found = output.hidden_states[layer], []
    for b in range(len(ids)):
        video = (ids[b] == VIDEO).nonzero().squeeze(1)
        after = torch.arange(ids.shape[1]) > video[-1]
        text = (after & real[b] & ~torch.isin(ids[b], torch.tensor(SPECIAL))).nonzero().squeeze(1)
        for places in video.view(-1, 4 * FRAMES + 1)[:, :-1]:
            now, before = (output.attentions[i][b].float() for i in (layer, layer - 1))
            heads = now[:, text][..., places]
            found.append(
                {
                    "text_attention": heads.mean(0).amax(0),
                    "text_attention.heads": heads,
                    "last_query_attention": now[:, -1, places].mean(0),
                    "last_query_attention.previous": before[:, -1, places].mean(0),
                    "text_hidden": hidden[b, text],
                    "last_text_hidden": hidden[b, -1],
                    "features": hidden[b, places],
                }
            )
    return found


def compare(seen: list[VideoTokens], expected: list[dict[str, Tensor]], **tolerance: Any) -> None:
    tolerance = tolerance or CLOSE
    assert len(seen) == len(expected)
    for tokens, video in zip(seen, expected):
        assert set(tokens.signals) == INSIDE
        for name, signal in tokens.signals.items():
            torch.testing.assert_close(
                signal.float(), video[name].float(), msg=lambda m, n=name: f"{n}: {m}", **tolerance
            )
        if tokens.features.dtype == torch.float32:
            torch.testing.assert_close(tokens.features, video["features"], **CLOSE)


# -- against eager attention -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("layer", [1, 3, 5])
def test_signals_are_those_of_eager_attention(layer, attn):
    inputs = llava_inputs(ROWS)
    expected = told(llava("eager"), layer, inputs)
    compare(listen(llava(attn), layer, **inputs), expected)
    assert len(expected) == 4
    for video in expected:
        assert video["text_attention"].std() > 1e-3  # attention that says something


@pytest.mark.parametrize("heads, groups", [(4, 1), (4, 4), (8, 2), (1, 1)])
def test_grouped_queries(heads, groups):
    shape = {"num_attention_heads": heads, "num_key_value_heads": groups}
    inputs = llava_inputs(ROWS)
    seen = listen(llava(**shape), 2, **inputs)
    compare(seen, told(llava("eager", **shape), 2, inputs))
    assert seen[0].signal("text_attention.heads").shape == (heads, 3, 4 * FRAMES)


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_normed_queries_and_keys(attn):
    """Qwen3 norms every head's queries and keys, and its heads may be wider than the model."""

    def qwen3(attn: str) -> Any:
        model = llava(attn, text_class=Qwen3Config, head_dim=32)
        generator = torch.Generator().manual_seed(3)
        for layer in model.model.language_model.layers:
            for norm in (layer.self_attn.q_norm, layer.self_attn.k_norm, layer.input_layernorm):
                norm.weight.data = torch.rand(norm.weight.shape, generator=generator) + 0.5
        return model

    inputs = llava_inputs(ROWS)
    compare(listen(qwen3(attn), 3, **inputs), told(qwen3("eager"), 3, inputs))


@pytest.mark.parametrize("dtype, atol", [(torch.bfloat16, 5e-3), (torch.float16, 1e-3)])
def test_half_precision(dtype, atol):
    inputs = llava_inputs(ROWS)
    inputs["pixel_values_videos"] = inputs["pixel_values_videos"].to(dtype)
    seen = listen(llava().to(dtype), 2, **inputs)
    assert seen[0].signal("text_attention").dtype == torch.float32 and seen[0].signal("text_hidden").dtype == dtype
    wanted = told(llava("eager").to(dtype), 2, inputs)
    for name in ("text_hidden", "last_text_hidden"):
        for tokens, video in zip(seen, wanted):
            torch.testing.assert_close(tokens.signal(name), video[name], atol=0.1, rtol=0.1)
            video[name] = tokens.signal(name)
    compare(seen, wanted, atol=atol, rtol=0.05)


def test_padding_on_the_right_and_caller_positions():
    inputs = llava_inputs([ONE, TWO])
    padding = [int(n) for n in (inputs["attention_mask"] == 0).sum(1)]
    right = dict(inputs)
    for key in ("input_ids", "attention_mask"):
        right[key] = torch.stack([values.roll(-n) for values, n in zip(inputs[key], padding)])
    seen = listen(llava(), 2, **right, position_ids=torch.arange(right["input_ids"].shape[1])[None] + 7)
    only = inputs["pixel_values_videos"]
    alone = []
    for b, videos in enumerate((only[:1], only[1:])):
        n = int(inputs["attention_mask"][b].sum())
        row = {"input_ids": right["input_ids"][b : b + 1, :n], "pixel_values_videos": videos}
        alone += told(llava("eager"), 2, row | {"attention_mask": torch.ones(1, n).long()})
    compare(seen, alone)


# -- behind earlier turns ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_keys_of_earlier_turns_count(attn, kind):
    """A turn of words, its rows padded, and then a video: the softmax runs over both."""
    words = llava_inputs([[20, 21, 22, 23], [24, 25]])
    video = llava_inputs([["V", 7, 8], ["V", 9, 10]])
    both = {key: torch.cat([words[key], video[key]], 1) for key in ("input_ids", "attention_mask")}
    both["pixel_values_videos"] = video["pixel_values_videos"]
    expected = told(llava("eager"), 3, both)
    model = llava(attn)
    text = model.config.get_text_config()
    cache = DynamicCache(config=text) if kind == "dynamic" else StaticCache(config=text, max_cache_len=64)
    with torch.no_grad():
        model(**words, past_key_values=cache)
    second = dict(video, attention_mask=both["attention_mask"])
    compare(listen(model, 3, **second, past_key_values=cache), expected)
    without = listen(llava(attn), 3, **video)
    assert (without[0].signal("last_query_attention") - expected[0]["last_query_attention"]).abs().max() > 1e-3


def test_a_cache_that_hides_its_keys_is_refused():
    class Hidden(DynamicLayer):
        """Keeps its keys elsewhere, as a quantised cache does."""

        def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            if hasattr(self, "whole"):
                self.keys, self.values = self.whole
            self.whole = super().update(keys, values, *args, **kwargs)
            self.keys = self.values = keys[:, :, :0]
            return self.whole

        def get_seq_length(self) -> int:
            return self.whole[0].shape[2] if hasattr(self, "whole") else 0

    def cache(model: Any) -> DynamicCache:
        cache = DynamicCache(config=model.config.get_text_config())
        cache.layers = [Hidden() for _ in cache.layers]
        return cache

    model = llava()
    words, video = torch.tensor([[20, 21, 22]]), llava_inputs([["V", 7, 8]])
    second = {"input_ids": video["input_ids"], "pixel_values_videos": video["pixel_values_videos"]}
    with torch.no_grad():
        with vidcompress.apply(model, Attentive(layers=(2,))):
            model(**video, past_key_values=cache(model))  # nothing lies before it
            past = cache(model)
            model(input_ids=words, past_key_values=past)
            with pytest.raises(ValueError, match=r"DynamicCache does not keep the keys of layer 2 .*StaticCache"):
                model(**second, past_key_values=past)
        past = cache(model)
        with vidcompress.apply(model, Attentive(layers=(2,), signal="text_hidden")):  # asks for no keys
            model(input_ids=words, past_key_values=past)
            model(**second, past_key_values=past)


def test_cached_keys():
    keys = torch.randn(2, 3, 9, 4)
    cache = SimpleNamespace(layers=[SimpleNamespace(keys=keys), SimpleNamespace(keys=None), SimpleNamespace()])
    assert torch.equal(cached_keys(cache, 0, 5), keys[:, :, :5])
    assert cached_keys(None, 0, 5) is None and cached_keys(cache, 1, 0) is None
    for layer, stored in ((0, 10), (1, 2), (2, 2)):
        with pytest.raises(ValueError, match=f"does not keep the keys of layer {layer} as they are"):
            cached_keys(cache, layer, stored)


# -- what it leaves alone ----------------------------------------------------------------------------------------------
def test_the_layer_keeps_its_own_attention():
    model = llava("sdpa")
    weights = []
    for layer in model.model.language_model.layers:
        layer.self_attn.register_forward_hook(lambda module, args, output: weights.append(output[1]))
    listen(model, 3, **llava_inputs([TWO]))
    assert weights == [None] * 6
    assert model.model.language_model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("signal, calls", [("text_attention", 2), ("text_hidden", 1), ("last_query_attention", 2)])
def test_modules_are_called_once_more_where_a_method_acts_and_nowhere_else(signal, calls):
    """A row's keys are made once, for all its videos; signals that are no attention cost nothing."""
    model = llava()
    counts = [0] * 6

    def count(i: int, module: nn.Module, args: Any) -> None:
        counts[i] += 1

    for i, layer in enumerate(model.model.language_model.layers):
        layer.self_attn.k_proj.register_forward_pre_hook(lambda module, args, i=i: count(i, module, args))
    with torch.no_grad(), vidcompress.apply(model, Attentive(layers=(3,), signal=signal)):
        generate(model, llava_inputs([TWO]), 1)
    assert counts == [1, 1, 1, calls, 1, 1]


def test_signals_are_outside_the_graph():
    model = llava()
    method = Listener(layers=(2,))
    with vidcompress.apply(model, method):
        model(**llava_inputs([ONE])).logits.sum().backward()
    (tokens,) = method.seen
    assert not any(signal.requires_grad for signal in tokens.signals.values()) and not tokens.features.requires_grad
    assert model.model.multi_modal_projector.linear_1.weight.grad.any()


def test_signals_of_a_video_of_which_something_was_removed():
    """Behind another method: places in the grid, tower signals of the tokens that are left, and how many entered."""

    class Both(Attentive):
        needs = frozenset({"saliency.received", "frame_features", "text_attention"})  # type: ignore[assignment]

        def reduce(self, tokens: VideoTokens, site: Site) -> Reduction:
            self.seen.append(tokens)
            return self.top(tokens, site, tokens.signal("saliency.received"))

    model, inputs = llava(), llava_inputs([TWO])
    whole, left = Both(layers=(1,)), Both(layers=(2, 4))
    with torch.no_grad(), without_head():
        with vidcompress.apply(model, whole):
            model(**inputs)
        with vidcompress.apply(model, [METHODS["prune"](), left]) as handle:
            model(**inputs)
    outer, first = handle.trace.last.steps[:2], handle.trace.last.steps[2:4]
    for video in range(2):
        entered = outer[video].reduction.keep
        for tokens, index in (
            (left.seen[video], entered),
            (left.seen[2 + video], entered[first[video].reduction.keep]),
        ):
            assert torch.equal(tokens.index, index) and tokens.entered == len(entered)
            received = whole.seen[video].signal("saliency.received")
            assert torch.equal(tokens.signal("saliency.received"), received[index])
            assert torch.equal(tokens.signal("frame_features"), whole.seen[video].signal("frame_features"))
            assert tokens.signal("text_attention").shape == index.shape
