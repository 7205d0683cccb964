"""Costs: every published row from the real dimensions, and the KV cache as it is measured."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
import tiny
import torch
from transformers import DynamicCache, GPT2Config, LlavaOnevisionConfig, Qwen2Config, SiglipVisionConfig, StaticCache
from vidcompress.patches.llava_onevision import LlavaOnevisionPatch

import vidcompress
from vidcompress import Method, Reduction, Site, VideoTokens
from vidcompress.costs import (
    FORMULAS,
    MODELS,
    Dimensions,
    dimensions,
    estimate,
    flops,
    kv_cache_bytes,
    measured_kv_bytes,
)
from vidcompress.method import Pipeline

OV, LV, SMALL = "llava-onevision-7b", "llava-video-7b", "llava-onevision-0.5b"


@dataclass(kw_only=True)
class Halves(Method):
    """Keeps the first half of the tokens at each of some sites; -1 is the projector."""

    layers: tuple[int, ...] = (1,)

    def sites(self, depth: int = 28) -> list[Site]:
        return [Site(layer, stage) for stage, layer in enumerate(self.layers)]

    def count(self, site: Site, grid: tuple[int, int, int], entered: int, before: int) -> int:
        return max(1, before // 2)

    def reduce(self, tokens: VideoTokens, site: Site) -> Reduction:
        return Reduction(torch.arange(max(1, len(tokens) // 2)), len(tokens))


def tera(formula, model, frames=None, compression=None, *, extra=0, **settings):
    """10^12 operations of a model's default video under a named method, and of `extra` tokens more in every layer."""
    of = MODELS[model]
    chosen = None if compression is None else vidcompress.load(compression, **settings)
    found = estimate(of, of.grid(frames), chosen, formulas=[formula], text_tokens=extra)
    return sum(found.flops[formula]) / 1e12


def rounds_to(value, printed, above=0.0):
    """Whether `value`, or one that is larger by less than `above`, is printed as `printed`."""
    half = 0.5 * 10 ** -len(printed.partition(".")[2])
    return float(printed) - half - above <= value <= float(printed) + half


def is_row(printed, formula, model, compression, **settings):
    """Whether a method costs what a paper printed: we keep whole tokens, where a paper's formula may take r * N."""
    value, more = (tera(formula, model, None, compression, extra=extra, **settings) for extra in (0, 1))
    return rounds_to(value, printed, more - value)


# -- published rows ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("formula", "model", "frames", "printed"),
    [
        ("infomerge", OV, 32, "48.8"),  # Table 1
        ("infomerge", LV, 64, "94.1"),  # Table 2
        ("unified", OV, 32, "41.4"),  # Table 1
        ("unified", OV, 16, "19.0"),  # Table 3
        ("unified", LV, 64, "80.9"),  # Table 2
        ("unified", SMALL, 32, "3.54"),  # Table 2
        ("hieravid", LV, 64, "80.2"),  # Table 1
        ("hieravid", OV, 32, "40.8"),  # Table 2
    ],
)
def test_uncompressed_rows(formula, model, frames, printed):
    assert rounds_to(tera(formula, model, frames), printed)
    assert tera(formula, model) == tera(formula, model, 64 if model == LV else 32)


@pytest.mark.parametrize(
    ("model", "compression", "ratio", "printed"),
    [
        # Table 1, whose n is exactly r N
        (OV, "infomerge", 0.15, "6.3"),
        (OV, "infomerge", 0.10, "4.2"),
        (OV, "infomerge", 0.05, "2.1"),
        (OV, "fastv", 0.15, "9.4"),
        (OV, "fastv", 0.10, "7.4"),
        (OV, "fastv", 0.05, "5.4"),
        # Table 2, whose n is a whole number a frame
        (LV, "fastvid", 0.15, "11.0"),
        (LV, "fastvid", 0.10, "6.9"),
        (LV, "fastv", 25 / 169, "16.9"),
        (LV, "fastv", 16 / 169, "13.1"),
    ],
)
def test_rows_of_infomerge(model, compression, ratio, printed):
    assert is_row(printed, "infomerge", model, compression, retention_ratio=ratio)


@pytest.mark.parametrize(
    ("model", "ratio", "outer", "both"),
    [
        (OV, 0.10, "4.0", "3.4"),  # Table 1, "(w/o M)" and "Ours"
        (OV, 0.05, "2.2", None),  # see the next test
        (OV, 0.02, "1.2", "1.1"),
        (OV, 0.01, "0.9", "0.8"),
        (LV, 0.02, "1.5", "1.4"),  # Table 2
        (LV, 0.01, "1.2", "1.1"),
        (SMALL, 0.02, "0.07", "0.06"),
        (SMALL, 0.01, "0.05", "0.05"),  # of its 24 layers too, 18 see all tokens
    ],
)
def test_rows_of_unified(model, ratio, outer, both):
    assert rounds_to(tera("unified", model, None, "unified_pool", retention_ratio=ratio), outer)
    assert both is None or rounds_to(tera("unified", model, None, "unified", retention_ratio=ratio, layer=18), both)


@pytest.mark.parametrize(("ratio", "printed"), [(0.10, "3.4"), (0.05, "2.0"), (0.02, "1.1"), (0.01, "0.8")])
def test_rows_of_unified_with_nineteen_full_layers(ratio, printed):
    """The printed 2.0 T is the one row in which the paper's K = 18 cannot count from 0."""
    assert rounds_to(tera("unified", OV, None, "unified", retention_ratio=ratio, layer=19), printed)
    ours = tera("unified", OV, None, "unified", retention_ratio=ratio)
    assert rounds_to(ours, {"2.0": "1.92"}.get(printed, printed))


@pytest.mark.parametrize(
    ("model", "ratio", "printed"),
    [
        (OV, 0.10, "7.9"),  # Table 1; what it labels 15, 12 and 11 % is 5, 2 and 1 %
        (OV, 0.05, "6.4"),
        (OV, 0.02, "5.5"),
        (OV, 0.01, "5.2"),
        (LV, 0.02, "10.2"),  # Table 2
        (LV, 0.01, "9.7"),
        (SMALL, 0.02, "0.50"),
        (SMALL, 0.01, "0.48"),
    ],
)
def test_rows_of_unified_for_fastv(model, ratio, printed):
    """This paper lets FastV run three full layers, the others two."""
    assert is_row(printed, "unified", model, "fastv", retention_ratio=ratio, layer=3)


@pytest.mark.parametrize(
    ("model", "ratios"),
    [(OV, {30: 26.3, 20: 18.5, 10: 9.3}), (LV, {30: 24.5, 20: 17.2, 10: 8.5})],  # Tables 2 and 1
)
@pytest.mark.parametrize("percent", [30, 20, 10])
def test_rows_of_hieravid(model, ratios, percent):
    share = tera("hieravid", model, None, f"hieravid-{percent}") / tera("hieravid", model)
    assert abs(100 * share - ratios[percent]) < 0.3


@pytest.mark.parametrize(
    ("model", "compression", "ratio", "printed"),
    [
        (OV, "uniform_tokens", 0.3, "10.6"),  # Table 2, PruMerge
        (OV, "uniform_tokens", 0.2, "6.9"),
        (OV, "uniform_tokens", 0.1, "3.4"),
        (LV, "uniform_tokens", 0.3, "19.1"),  # Table 1, PruMerge
        (LV, "uniform_tokens", 0.2, "12.3"),
        (LV, "uniform_tokens", 0.1, "5.9"),
        (OV, "fastv", 0.3, "12.7"),
        (OV, "fastv", 0.2, "9.3"),
        (OV, "fastv", 0.1, "6.037"),
        (LV, "fastv", 0.3, "23.5"),
        (LV, "fastv", 0.2, "17.1"),
        (LV, "fastv", 0.1, "11.21"),
    ],
)
def test_rows_of_hieravid_for_others(model, compression, ratio, printed):
    assert is_row(printed, "hieravid", model, compression, retention_ratio=ratio)


# -- the formulas ------------------------------------------------------------------------------------------------------
SQUARE = Dimensions(layers=2, hidden=8, intermediate=20, heads=4, kv_heads=2, head_dim=2)


def test_formulas_by_hand():
    n, d, m, d_kv = 10, 8, 20, 4
    assert flops("infomerge", SQUARE, [n, 0]) == [n * (2 * d**2 + 2 * d * d_kv) + 2 * n**2 * d + 3 * n * d * m, 0]
    prefill = 4 * n * d**2 + 2 * n**2 * d + 2 * n * d * m
    assert flops("hieravid", SQUARE, [n, n]) == [prefill] * 2
    steps = [4 * d**2 + 2 * d * m + 2 * d * (n + i) for i in range(1, 8)]
    assert flops("unified", SQUARE, [n, n], decode_tokens=7) == [prefill + sum(steps)] * 2
    assert flops("unified", SQUARE, [n, n], decode_tokens=0) == flops("hieravid", SQUARE, [n, n])


def test_decoding_is_what_lies_between_the_two_papers():
    of = MODELS[OV]
    lengths = [6272] * 28
    assert f"{sum(flops('unified', of, lengths, 0)) / 1e12:.3f}" == "40.765"
    assert f"{sum(flops('unified', of, lengths)) / 1e12:.3f}" == "41.416"


def test_only_unified_decodes():
    for name, formula in FORMULAS.items():
        changed = flops(name, SQUARE, [5, 5], 3) != flops(name, SQUARE, [5, 5], 0)
        assert changed == formula.decodes == (name == "unified")


def test_an_estimate_follows_every_layer():
    of = replace(SQUARE, layers=4)
    found = estimate(of, (4, 2, 2), Halves(layers=(-1, 1, 3)), text_tokens=5)
    assert found.sites == {"projector": 8, "decoder[1]": 4, "decoder[3]": 2}
    assert found.video_tokens == [8, 4, 4, 2] and found.mean_tokens == 4.5
    assert found.kv_bytes == [2 * 4 * 2 * n for n in (13, 9, 9, 7)]
    assert set(found.flops) == set(FORMULAS)
    assert found.flops["infomerge"] == flops("infomerge", of, [13, 9, 9, 7])
    plain = estimate(of, (4, 2, 2))
    assert (plain.compression, plain.sites, plain.video_tokens) == ("none", {}, [16] * 4)
    assert found.exact and not estimate(of, (4, 2, 2), tiny.AtMost()).exact


# -- dimensions --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("image_size", [56, 70, 84])
def test_dimensions_of_a_config(image_size):
    model = tiny.llava(layers=5, image_size=image_size)
    of = Dimensions.of(model.config)
    pixels = torch.empty(1, 3, 3, image_size, image_size)
    (encoded,) = LlavaOnevisionPatch().encoded(model, {"pixel_values_videos": pixels}, {})
    assert of.grid(3) == encoded.grid == tiny.video_grid(3, image_size)
    assert (of.layers, of.hidden, of.intermediate) == (5, tiny.HIDDEN, 96)
    assert (of.heads, of.kv_heads, of.head_dim) == (4, 2, 16)


@pytest.mark.parametrize("name", [OV, SMALL, "llava-onevision-72b"])
def test_a_published_config_gives_the_table(name):
    of = MODELS[name]
    text = Qwen2Config(
        num_hidden_layers=of.layers, hidden_size=of.hidden, intermediate_size=of.intermediate,
        num_attention_heads=of.heads, num_key_value_heads=of.kv_heads,
    )  # fmt: skip
    vision = SiglipVisionConfig(image_size=384, patch_size=14)
    config = LlavaOnevisionConfig(text_config=text.to_dict(), vision_config=vision.to_dict())
    assert Dimensions.of(config) == replace(of, frames=None, hub=None)


def test_a_text_decoder_has_no_frames():
    of = Dimensions.of(Qwen2Config(num_hidden_layers=2, hidden_size=64, num_attention_heads=4, num_key_value_heads=2))
    assert of.frame is None
    with pytest.raises(ValueError, match="give its grid"):
        of.grid(8)


def test_models_by_name_hub_id_and_folder(tmp_path):
    assert dimensions(OV) == dimensions("llava-hf/llava-onevision-qwen2-7b-ov-hf") == MODELS[OV]
    assert dimensions("lmms-lab/LLaVA-Video-7B-Qwen2").grid() == (64, 13, 13)
    tiny.llava(layers=3).config.save_pretrained(tmp_path)
    assert dimensions(tmp_path) == dimensions(str(tmp_path)) == Dimensions.of(tiny.llava(layers=3).config)


def test_importing_costs_needs_no_torch():
    code = "import sys, vidcompress.costs; print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


# -- KV memory ---------------------------------------------------------------------------------------------------------
def prefilled(model, inputs, **kwargs):
    with torch.no_grad():
        return model(**inputs, use_cache=True, **kwargs).past_key_values


@pytest.mark.parametrize("layers", [(2,), (1, 4), (0, 3, 5), (-1,), (-1, 2, 4)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_predicted_kv_bytes_are_the_measured_ones(layers, dtype):
    model = tiny.llava().to(dtype)
    inputs = tiny.llava_inputs([tiny.ONE])
    inputs["pixel_values_videos"] = inputs["pixel_values_videos"].to(dtype)
    of, grid, method = Dimensions.of(model.config), tiny.video_grid(tiny.FRAMES), Halves(layers=layers)
    text = inputs["input_ids"].shape[1] - math.prod(grid)  # the newline too
    for compression in (None, method):
        handle = None if compression is None else tiny.compress(model, compression)
        cache = prefilled(model, inputs)
        lengths = [math.prod(grid)] * of.layers if handle is None else Pipeline([method]).lengths(grid, of.layers)
        measured = measured_kv_bytes(cache)
        assert measured == kv_cache_bytes(of, [text + n for n in lengths], dtype.itemsize)
        assert (len(set(measured)) > 1) == (compression is not None and any(layer > 0 for layer in layers))
    found = estimate(of, grid, method, text_tokens=text)
    assert [n * dtype.itemsize // 2 for n in found.kv_bytes] == measured


def test_a_static_cache_counts_with_what_it_allocated():
    model, inputs = tiny.llava(), tiny.llava_inputs([tiny.ONE])
    tiny.compress(model, Halves(layers=(2,)))
    cache = StaticCache(config=model.config, max_cache_len=80)
    assert measured_kv_bytes(cache) == [0] * 6
    prefilled(model, inputs, past_key_values=cache)
    assert measured_kv_bytes(cache) == kv_cache_bytes(Dimensions.of(model.config), [80] * 6, 4)


def test_a_cache_measures_all_rows():
    model = tiny.llava()
    cache = prefilled(model, tiny.llava_inputs([tiny.ONE, tiny.ONE]))
    assert measured_kv_bytes(cache) == [
        2 * n for n in measured_kv_bytes(prefilled(model, tiny.llava_inputs([tiny.ONE])))
    ]
    assert measured_kv_bytes(DynamicCache()) == []


# -- refusals ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: dimensions("llava-onevison-7b"), "did you mean 'llava-onevision-7b'"),
        (lambda: MODELS[OV].grid(0), "at least 1 frame, got 0"),
        (lambda: MODELS["qwen2-vl-7b"].grid(8), "give its grid"),
        (lambda: replace(MODELS[OV], frames=None).grid(), "number of frames"),
        (lambda: flops("infomreg", SQUARE, [1, 1]), "did you mean 'infomerge'"),
        (lambda: flops("unified", SQUARE, [1, 1], -1), "decode_tokens must be at least 0, got -1"),
        (lambda: flops("hieravid", SQUARE, [1]), "one count a decoder layer is needed: 2, got 1"),
        (lambda: kv_cache_bytes(SQUARE, [1, -3]), "at least 0, got -3"),
        (lambda: kv_cache_bytes(SQUARE, [1, 3], 0), "dtype_bytes must be at least 1"),
        (lambda: estimate(SQUARE, (4, 0, 2)), "empty side"),
        (lambda: estimate(SQUARE, (4, 2, 2), text_tokens=-1), "text_tokens must be at least 0"),
        (lambda: estimate(SQUARE, (4, 2, 2), Halves(layers=(2,))), "this decoder has 2 layers"),
        (lambda: Dimensions.of(GPT2Config()), "has no intermediate_size"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_caches_of_another_kind_are_refused():
    quantised = SimpleNamespace(layers=[SimpleNamespace(keys=None, values=None, _quantized_keys=None)])
    linear = SimpleNamespace(layers=[SimpleNamespace(conv_states={}, recurrent_states={})])
    for cache in (quantised, linear):
        with pytest.raises(TypeError, match="not plain keys and values"):
            measured_kv_bytes(cache)
    with pytest.raises(TypeError, match="transformers cache"):
        measured_kv_bytes(((torch.zeros(1), torch.zeros(1)),))
