"""The LLaVA-OneVision patch: what it says about the real 7B model, whose weights are not needed for that."""

from __future__ import annotations

import pytest
import torch
from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration, Qwen2Config

import vidcompress
from vidcompress import patches
from vidcompress.method import list_methods

QWEN2_7B = {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152000,
}


@pytest.fixture(scope="module")
def real():
    """The 7B model on the meta device."""
    config = LlavaOnevisionConfig(text_config=Qwen2Config(**QWEN2_7B).to_dict())
    with torch.device("meta"):
        return LlavaOnevisionForConditionalGeneration(config)


def test_grid_and_budgets_of_the_real_model(real):
    pixels = torch.empty(2, 32, 3, 384, 384, device="meta")
    videos = patches.find(real.config).encoded(real, {"pixel_values_videos": pixels}, {})
    assert [v.grid for v in videos] == [(32, 14, 14)] * 2
    assert [v.placeholders for v in videos] == [6273] * 2
    two = {"vision_feature_layer": -1, "vision_feature_select_strategy": "full"}
    features = real.model.get_video_features(pixels[:1, :2], **two)
    assert features.pooler_output.shape[1] - 2 * 196 in (0, 1)  # 5.17 appends the newline later
    assert vidcompress.load("infomerge", retention_ratio=0.10).budget((32, 14, 14)) == 627
    assert vidcompress.load("fastvid", retention_ratio=0.10).budget((32, 14, 14)) == 32 * 19


def test_saliency_comes_from_the_layer_before_the_features(real):
    patch = patches.find(real.config)
    layers = real.model.vision_tower.encoder.layers
    assert len(layers) == 26
    assert patch.signal_layer(real, {}) == 25
    assert patch.signal_layer(real, {"vision_feature_layer": -2}) == 24
    assert patch.signal_layer(real, {"vision_feature_layer": [3, 26]}) == 25
    with pytest.raises(ValueError, match="uses no layer"):
        patch.signal_layer(real, {"vision_feature_layer": 0})
    assert patch.pool_saliency(real, torch.empty(3, 729, device="meta")).shape == (3, 196)


def test_the_published_head_is_named_for_the_published_tower_only(real, llava):
    patch = patches.find(real.config)
    assert patch.default_head(real) == "google/siglip-so400m-patch14-384"
    assert patch.default_head(llava()) is None


@pytest.mark.filterwarnings("ignore:.*falls back")
@pytest.mark.parametrize("name", list_methods())
def test_every_method_goes_on_and_comes_off(name, real):
    before = set(real.__dict__), set(real.model.__dict__)
    with vidcompress.apply(real, name) as handle:
        assert handle.compression.name == name
    assert (set(real.__dict__), set(real.model.__dict__)) == before


def test_a_head_that_cannot_be_fetched_is_one_warning(real):
    with pytest.warns(UserWarning, match="google/siglip-so400m-patch14-384 could not be read") as caught:
        vidcompress.apply(real, "infomerge").remove()
    assert len([w for w in caught if "falls back" in str(w.message)]) == 1
