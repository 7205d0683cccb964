"""What vLLM is started with is checked before anything is loaded; nothing asked for is ever served uncompressed."""

from __future__ import annotations

import pytest
from transformers import Qwen3VLConfig
from vllm.engine.arg_utils import EngineArgs

from vidcompress.serving import plugin
from vidcompress.serving.settings import Serving


def config_of(folder, compression, **options):
    """The engine's config, as its API server makes it."""
    overrides = {} if compression is None else {"hf_overrides": {"vidcompress": compression}}
    arguments = EngineArgs(model=str(folder), enforce_eager=True, max_model_len=512, **overrides, **options)
    return arguments.create_engine_config()


def test_a_yaml_and_a_mapping(checkpoint, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("method: vidcom2\nretention_ratio: 0.4\n")
    for said in (str(path), {"method": "vidcom2", "retention_ratio": 0.4}):
        config = config_of(checkpoint("qwen2_vl"), said).model_config.hf_config
        assert Serving.of(config).method.retention_ratio == 0.4
        assert config.architectures == [plugin.ARCHITECTURES["qwen2_vl"]]


def test_without_a_word_nothing_changes(checkpoint):
    made = config_of(checkpoint("qwen2_vl"), None, video_pruning_rate=None)
    assert made.model_config.hf_config.architectures == ["Qwen2VLForConditionalGeneration"]
    assert Serving.of(made.model_config.hf_config) is None


@pytest.mark.parametrize(
    ("said", "options", "reason"),
    [
        ("fastv", {}, "fastv cannot be served: it needs last_query_attention.previous"),
        ("infomrege", {}, "did you mean 'infomerge'"),
        ({"method": "vidcom2", "retention_ratio": 1.5}, {}, r"retention_ratio must be in \(0, 1"),
        ("vidcom2", {"video_pruning_rate": 0.5}, "together with --video-pruning-rate"),
        ("vidcom2", {"model_impl": "transformers"}, "together with --model-impl transformers"),
        ("infomerge", {"mm_encoder_tp_mode": "data"}, "together with --mm-encoder-tp-mode data"),
    ],
    ids=str,
)
def test_refused_at_the_start(said, options, reason, checkpoint):
    with pytest.raises(ValueError, match=reason):
        config_of(checkpoint("qwen2_5_vl"), said, **options)


def test_a_model_that_cannot_be_served_is_refused(tmp_path):
    Qwen3VLConfig(architectures=["Qwen3VLForConditionalGeneration"]).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="cannot compress 'qwen3_vl' in a server"):
        config_of(tmp_path, "vidcom2", skip_tokenizer_init=True)
    assert config_of(tmp_path, None, skip_tokenizer_init=True).model_config.hf_config.architectures
