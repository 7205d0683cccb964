"""Loading with the word `compression`, through every door transformers has, on a checkpoint saved to disk."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from checkpoint import make_checkpoint, make_clip
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
    LlavaOnevisionForConditionalGeneration,
    PreTrainedModel,
    pipeline,
)

import vidcompress

CLASSES = [LlavaOnevisionForConditionalGeneration, AutoModelForImageTextToText, AutoModelForMultimodalLM]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def compression(checkpoint):
    return {"method": "infomerge", "retention_ratio": 0.1, "siglip_head": str(checkpoint / "siglip")}


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    return vidcompress.load_video(make_clip(tmp_path_factory.mktemp("clip") / "clip.mp4"), num_frames=8)


@pytest.fixture
def enabled():
    vidcompress.enable()
    yield
    vidcompress.disable()


def kept(model, checkpoint, video):
    """(before, after) of one generate with `model`."""
    inputs = vidcompress.prepare_inputs(AutoProcessor.from_pretrained(checkpoint), video, "What happens?")
    inputs = inputs.to(model.device, model.dtype)
    model.generate(**inputs, max_new_tokens=2, do_sample=False)
    last = vidcompress.handle_of(model).trace.last
    return last.before, last.after


def test_from_pretrained(checkpoint, compression, video):
    model = vidcompress.from_pretrained(checkpoint, compression=compression)
    assert isinstance(model, LlavaOnevisionForConditionalGeneration)
    assert kept(model, checkpoint, video) == (8 * 16, 12)


def test_without_compression_the_model_is_plain(checkpoint):
    model = vidcompress.from_pretrained(checkpoint)
    assert vidcompress.handle_of(model) is None


def test_changed_import(checkpoint, compression, video):
    model = vidcompress.AutoModelForImageTextToText.from_pretrained(checkpoint, compression=compression)
    assert kept(model, checkpoint, video) == (128, 12)


@pytest.mark.parametrize("cls", CLASSES, ids=lambda c: c.__name__)
def test_enabled_classes_take_the_word(cls, enabled, checkpoint, compression, video):
    model = cls.from_pretrained(checkpoint, compression=compression)
    assert kept(model, checkpoint, video) == (128, 12)


def test_loading_arguments_go_through(enabled, checkpoint, compression, video):
    model, info = LlavaOnevisionForConditionalGeneration.from_pretrained(
        checkpoint,
        compression=compression,
        config=AutoConfig.from_pretrained(checkpoint),
        output_loading_info=True,
        device_map="cpu",
        dtype=torch.bfloat16,
        attn_implementation="eager",
    )
    assert not info["missing_keys"] and model.dtype == torch.bfloat16
    assert model.config._attn_implementation == "eager"
    assert kept(model, checkpoint, video) == (128, 12)
    model, info = vidcompress.from_pretrained(checkpoint, compression=compression, output_loading_info=True)
    assert vidcompress.handle_of(model) is not None and not info["missing_keys"]


@pytest.mark.parametrize("task", ["image-text-to-text", "any-to-any"])
def test_pipelines(task, enabled, checkpoint, compression, video):
    message = [{"role": "user", "content": [{"type": "video", "video": video.frames}, {"type": "text", "text": "So?"}]}]
    options = {
        "generate_kwargs": {"max_new_tokens": 4, "do_sample": False},
        "processor_kwargs": {"do_sample_frames": False, "video_metadata": [video.metadata()]},
    }
    by_word = pipeline(task, model=str(checkpoint), model_kwargs={"compression": compression})
    answer = by_word(text=message, **options)
    assert vidcompress.handle_of(by_word.model).trace.last.after == 12
    model = vidcompress.from_pretrained(checkpoint, compression=compression)
    by_model = pipeline(task, model=model, processor=AutoProcessor.from_pretrained(checkpoint))
    assert by_model(text=message, **options) == answer


def test_disable_gives_transformers_back(checkpoint, compression):
    before = PreTrainedModel.__dict__["from_pretrained"]
    vidcompress.enable()
    vidcompress.enable()
    assert PreTrainedModel.__dict__["from_pretrained"] is not before
    vidcompress.disable()
    vidcompress.disable()
    assert PreTrainedModel.__dict__["from_pretrained"] is before
    with pytest.raises(TypeError, match="compression"):
        LlavaOnevisionForConditionalGeneration.from_pretrained(checkpoint, compression=compression)


def test_bad_compression_is_refused_before_weights_are_read(enabled, checkpoint, tmp_path, monkeypatch):
    text = json.loads((checkpoint / "config.json").read_text())["text_config"]
    (tmp_path / "config.json").write_text(json.dumps({**text, "model_type": "qwen2"}))

    def read(*args, **kwargs):
        raise AssertionError("weights were read")

    monkeypatch.setattr(PreTrainedModel, "_load_pretrained_model", read)
    for load in (vidcompress.from_pretrained, LlavaOnevisionForConditionalGeneration.from_pretrained):
        with pytest.raises(ValueError, match="did you mean 'infomerge'"):
            load(checkpoint, compression="infomreg")
        with pytest.raises(ValueError, match="retention_ratio"):
            load(checkpoint, compression={"method": "infomerge", "retention_ratio": 0})
    with pytest.raises(ValueError, match=r"no patch for model_type 'qwen2'.*llava_onevision"):
        vidcompress.from_pretrained(tmp_path, compression="infomerge")


def test_a_refused_head_leaves_a_plain_model(checkpoint):
    model = vidcompress.from_pretrained(checkpoint)
    before = set(model.__dict__), set(model.model.__dict__)
    with pytest.raises(FileNotFoundError):
        vidcompress.apply(model, "infomerge", siglip_head="/no/such/siglip")
    assert vidcompress.handle_of(model) is None
    assert (set(model.__dict__), set(model.model.__dict__)) == before


def test_nothing_of_it_is_saved(checkpoint, compression, tmp_path):
    plain = vidcompress.from_pretrained(checkpoint)
    model = vidcompress.from_pretrained(checkpoint, compression=compression)
    plain.save_pretrained(tmp_path / "plain")
    model.save_pretrained(tmp_path / "compressed")
    for name in ("config.json", "generation_config.json", "model.safetensors"):
        assert (tmp_path / "plain" / name).read_bytes() == (tmp_path / "compressed" / name).read_bytes()
    assert list(plain.state_dict()) == list(model.state_dict())


def test_switching_keeps_what_works(checkpoint, compression, video):
    model = vidcompress.from_pretrained(checkpoint, compression=compression)
    handle = vidcompress.handle_of(model)
    assert handle.switch("uniform_frames", retention_ratio=0.25) is handle
    assert kept(model, checkpoint, video) == (128, 32)
    with pytest.raises(ValueError, match="unknown compression"):
        handle.switch("nothing")
    with pytest.raises(FileNotFoundError):
        handle.switch("fastvid", siglip_head="/no/such/siglip")
    assert kept(model, checkpoint, video) == (128, 32) and handle.compression.name == "uniform_frames"
    handle.remove()
    with pytest.raises(ValueError, match="removed"):
        handle.switch("random")


def test_handle_of_a_copy_is_its_own(checkpoint, compression):
    model = vidcompress.from_pretrained(checkpoint, compression=compression)
    twin = copy.deepcopy(model)
    vidcompress.handle_of(model).remove()
    assert vidcompress.handle_of(model) is None
    assert vidcompress.handle_of(twin).model is twin and vidcompress.handle_of(twin).active


@pytest.mark.parametrize("thing", [None, "model", object()])
def test_apply_wants_a_model(thing):
    with pytest.raises(TypeError, match="transformers model"):
        vidcompress.apply(thing, "uniform_tokens")


def test_ratio_beside_the_word(enabled, checkpoint):
    for load in (vidcompress.from_pretrained, *(c.from_pretrained for c in CLASSES)):
        model = load(pretrained_model_name_or_path=checkpoint, compression="random", retention_ratio=0.5)
        assert vidcompress.handle_of(model).compression.methods[0].retention_ratio == 0.5
        with pytest.raises(ValueError, match="needs a method"):
            load(checkpoint, retention_ratio=0.5)


def test_a_named_head_stays_when_the_method_changes(checkpoint, compression, video):
    model = vidcompress.from_pretrained(checkpoint, compression=compression)
    handle = vidcompress.handle_of(model)
    handle.switch("fastvid")
    kept(model, checkpoint, video)
    assert handle.trace.last.head == compression["siglip_head"]
    with pytest.warns(UserWarning, match="none was asked for"):
        handle.switch("fastvid", siglip_head="none")
    kept(model, checkpoint, video)
    assert handle.trace.last.head is None
    assert handle.trace.last.compression[0]["method"] == "fastvid"


def test_surrounding_precision_does_not_reach_the_decision(checkpoint, compression, video):
    model = vidcompress.from_pretrained(checkpoint, compression=compression)
    kept(model, checkpoint, video)
    before = vidcompress.handle_of(model).trace.last.steps[0].reduction
    torch.set_float32_matmul_precision("medium")
    try:
        kept(model, checkpoint, video)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert torch.equal(vidcompress.handle_of(model).trace.last.steps[0].reduction.keep, before.keep)
