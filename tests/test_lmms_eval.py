"""What lmms-eval is given, tried without it (tests/lmms_stub.py); `make test-lmms-eval` runs lmms-eval itself."""

from __future__ import annotations

import importlib
import json

import lmms_stub
import numpy as np
import pytest
import torch
import transformers
from checkpoint import TEMPLATE, make_checkpoint, make_clip
from lmms_stub import Request

from vidcompress.answering import Question, answer
from vidcompress.integrations.asking import cut, draft_of, generation_of
from vidcompress.integrations.journal import Journal, key_of
from vidcompress.integrations.processes import Process
from vidcompress.integrations.settings import Settings
from vidcompress.measure import ask
from vidcompress.video import load_video


# -- settings ----------------------------------------------------------------------------------------------------------
def parse(**given):
    return Settings.parse(
        {"pretrained": "owner/model", "batch_size": 1, "device": None, "max_batch_size": None} | given
    )


def test_what_is_no_setting_of_the_run_is_one_of_the_method():
    found = parse(compression="infomerge", retention_ratio=0.05, penalty_strength=3, max_num_frames=64, batch_size="4")
    assert (found.max_num_frames, found.batch_size, found.sampling()) == (64, 4, {"max_frames": 64})
    (method,) = found.facts()["compression"]
    assert method["method"] == "infomerge" and method["penalty_strength"] == 3
    assert method["temperature"] == 2.0  # the paper's row for 5 %
    assert found.facts()["schema"] == 1 and found.facts()["versions"]["torch"] == torch.__version__
    json.dumps(found.facts())
    assert parse().compression is None and parse(compression="none").facts()["compression"] == []
    assert parse(fps=2).sampling() == {"fps": 2}
    options = parse(dtype="float16", attn_implementation="eager", revision="abc", device_map="auto").loading("cpu")
    assert options == {
        "compression": None, "dtype": "float16", "device_map": "auto", "attn_implementation": "eager",
        "revision": "abc",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"pretrained": None}, "pretrained=... is missing"),
        ({"compression": "infomreg"}, "did you mean 'infomerge'"),
        (
            {"compression": "infomerge", "retention": 0.1},
            "no setting 'retention'.*model_args of their own: .*max_num_fr",
        ),
        ({"compression": "infomerge", "retention_ratio": 2}, "retention_ratio"),
        ({"retention_ratio": 0.1}, "retention_ratio: unknown, and no setting of a method without compression"),
        ({"max_num_frames": 0}, "max_num_frames=0: a whole number of at least 1"),
        ({"max_num_frames": 8, "fps": 1}, "give one of the two"),
        ({"fps": -1}, "fps=-1 is no positive number"),
        ({"batch_size": "auto"}, "batch_size='auto' is no whole number"),
        ({"dtype": "int8"}, "dtype='int8' is unknown; one of: auto, bfloat16"),
        ({"device": "cpu", "device_map": "auto"}, "give one of the two"),
    ],
)
def test_bad_settings_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        parse(**given)


# -- processes ---------------------------------------------------------------------------------------------------------
def launched(monkeypatch, **variables):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


def test_a_process_is_one_of_all_hosts(monkeypatch):
    launched(monkeypatch)
    assert Process.current() == Process(0, 1, 0)
    launched(monkeypatch, RANK="5", WORLD_SIZE="8", LOCAL_RANK="1")  # the second host of two with four each
    assert Process.current() == Process(5, 8, 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert Process.current().device(None) == Process.current().device("cuda") == "cuda:1"
    assert Process.current().device("cpu") == "cpu"
    with pytest.raises(ValueError, match=r"device='cuda:0' for 8 processes"):
        Process.current().device("cuda:0")
    with pytest.raises(ValueError, match="local rank 4 has no GPU of its own: there are 4"):
        Process(4, 8, 4).device(None)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"WORLD_SIZE": "2"}, "RANK=None beside WORLD_SIZE=2"),
        ({"WORLD_SIZE": "2", "RANK": "x", "LOCAL_RANK": "0"}, "RANK='x'"),
        ({"WORLD_SIZE": "2", "RANK": "2", "LOCAL_RANK": "0"}, "RANK=2 is not one of WORLD_SIZE=2"),
    ],
)
def test_a_launcher_that_contradicts_itself_is_refused(monkeypatch, variables, message):
    launched(monkeypatch, **variables)
    with pytest.raises(ValueError, match=message):
        Process.current()


# -- what is asked -----------------------------------------------------------------------------------------------------
def test_generation_settings():
    asked = {
        "max_new_tokens": 16,
        "temperature": 0,
        "top_p": 1.0,
        "num_beams": 1,
        "do_sample": False,
        "until": ["\n\n"],
    }
    assert generation_of(asked) == ({"max_new_tokens": 16, "num_beams": 1, "do_sample": False}, ["\n\n"])
    assert generation_of({"max_gen_toks": 8, "image_aspect_ratio": "pad", "until": "X"}) == (
        {"max_new_tokens": 8, "do_sample": False}, ["X"],
    )  # fmt: skip
    sampled = {"temperature": 0.7, "top_p": 0.9}
    assert generation_of(sampled)[0] == {**sampled, "max_new_tokens": 64, "do_sample": True}
    assert cut("A. cat\n\nB. dog", ["B", "\n\n"]) == "A. cat" and cut("A", ["B"]) == "A" and cut("A", []) == "A"


def test_messages_keep_their_order():
    messages = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": [
            {"type": "text", "text": "first"}, {"type": "video", "url": "a.mp4"},
            {"type": "image", "url": "picture"}, {"type": "text", "text": "then"},
        ]},
    ]  # fmt: skip
    draft = draft_of(messages, 16)
    assert (draft.films, draft.pictures) == (["a.mp4"], ["picture"])
    assert [part["type"] for part in draft.conversation[1]["content"]] == ["text", "video", "image", "text"]
    assert draft.conversation[0]["content"] == [{"type": "text", "text": "be brief"}]
    assert "a.mp4" not in json.dumps(draft.conversation)


def test_many_images_are_a_video():
    pictures = [np.full((20, 30, 3), 10 * i, np.uint8) for i in range(4)]
    content = [*({"type": "image", "url": picture} for picture in pictures), {"type": "text", "text": "what?"}]
    draft = draft_of([{"role": "user", "content": content}], 4)
    assert [part["type"] for part in draft.conversation[0]["content"]] == ["video", "text"]
    (clip,) = draft.question(load_video).clips
    assert clip.frames[:, 0, 0, 0].tolist() == [0, 10, 20, 30]
    few = draft_of([{"role": "user", "content": content}], 5)
    assert len(few.pictures) == 4 and not few.films


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"type": "audio", "url": "a.wav"}, "shows audio"),
        ({"type": "video", "url": "a.mp4", "start_time": 3.0}, "a part of a video"),
    ],
)
def test_what_cannot_be_shown_is_refused(part, message):
    with pytest.raises(ValueError, match=message):
        draft_of([{"role": "user", "content": [part]}], 16)


# -- the record --------------------------------------------------------------------------------------------------------
def test_a_journal_is_read_by_all_and_forgives_half_a_line(tmp_path):
    facts = {"schema": 1, "pretrained": "m", "ratio": 0.1}
    for rank in (0, 1):
        journal = Journal(tmp_path, facts, rank)
        journal.add([{"key": f"{rank}", "answer": "ja ü\n"}])
        journal.close()
    with (tmp_path / "answers-1.jsonl").open("a") as file:
        file.write('{"key": "2", "answer": "cut o')
    journal = Journal(tmp_path, facts, 1)
    assert journal.get("0") == {"key": "0", "answer": "ja ü\n"} and journal.get("1") and journal.get("2") is None
    journal.add([{"key": "2", "answer": "whole"}])
    journal.close()
    assert sorted(Journal(tmp_path, facts, 7).answers) == ["0", "1", "2"]
    with pytest.raises(ValueError, match=r"ratio: 0.1 there, 0.2 now\); give another folder"):
        Journal(tmp_path, facts | {"ratio": 0.2})
    journal = Journal(tmp_path, facts, 1)
    journal.drop(lambda entry: entry["key"] == "0")
    journal.close()
    assert sorted(Journal(tmp_path, facts).answers) == ["1", "2"]


def test_a_damaged_journal_is_not_overlooked(tmp_path):
    Journal(tmp_path, {}).close()
    (tmp_path / "answers-3.jsonl").write_text('{"key": "a"}\nnonsense\n')
    with pytest.raises(ValueError, match=r"answers-3\.jsonl, line 2, is no answer"):
        Journal(tmp_path, {})


def test_keys_tell_questions_apart():
    base = key_of("task", "test", 3, [{"role": "user"}], {"max_new_tokens": 4})
    assert base == key_of("task", "test", 3, [{"role": "user"}], {"max_new_tokens": 4})
    assert len({base, key_of("task", "test", 4, [{"role": "user"}], {"max_new_tokens": 4}), key_of("task")}) == 3


# -- answers -----------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny")


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    return [str(make_clip(folder / f"{i}.mp4", frames=n)) for i, n in enumerate((20, 12, 3))]


@pytest.fixture
def plugin(monkeypatch):
    """The module of the model class, and what it logs."""
    logged = lmms_stub.install(monkeypatch)
    launched(monkeypatch)
    return importlib.import_module("vidcompress.integrations.lmms_eval_model"), logged


def requests_about(model, clips, metadata=None, **generation):
    """One request a clip; the model is given the task they come from."""
    model.task_dict = {
        "task": {"test": [{"video": clip, "question": f"What is in {i}?"} for i, clip in enumerate(clips)]}
    }

    def messages(doc):
        parts = [{"type": "video", "url": doc["video"]}, {"type": "text", "text": doc["question"]}]
        return [{"role": "user", "content": parts}]

    settings = {"max_new_tokens": 3, "temperature": 0} | generation
    return [Request(("", messages, settings, i, "task", "test"), metadata or {}) for i in range(len(clips))]


def load(plugin, checkpoint, **given):
    settings = {"compression": "uniform_tokens", "retention_ratio": 0.25, "max_num_frames": 4, "dtype": "float32"}
    return plugin[0].VidCompress(pretrained=str(checkpoint), **settings | given)


def test_the_manifest_names_the_class(plugin):
    from vidcompress.integrations.lmms_eval import manifests

    (manifest,) = manifests()
    assert manifest.model_id == "vidcompress" and manifest.simple_class_path is None
    assert manifest.chat_class_path == f"{plugin[0].__name__}.{plugin[0].VidCompress.__name__}"
    assert plugin[0].VidCompress.is_simple is False


def test_batches_answer_as_single_questions(plugin, checkpoint, clips):
    model = load(plugin, checkpoint, batch_size=3)
    found = model.generate_until(requests_about(model, clips))
    for i, (clip, result) in enumerate(zip(clips, found)):
        alone = ask(model._model, model.processor, load_video(clip, max_frames=4), f"What is in {i}?", max_new_tokens=3)
        facts = result.token_counts.to_dict()["vidcompress"]
        cost = facts["cost"]
        assert result.text == alone.answer and result.token_counts.output_tokens == alone.new_tokens
        assert cost["frames"] == alone.frames == (4 if i < 2 else 3) and cost["pixels"] == alone.frames * 112 * 112
        assert (cost["tokens_before"], cost["tokens_after"]) == (alone.tokens_before, alone.tokens_after)
        assert cost["prompt_tokens"] == alone.prompt_before == result.token_counts.input_tokens
        assert cost["batch"] == (2 if i < 2 else 1)  # three frames do not stack with four
        assert facts["compression"][0]["retention_ratio"] == 0.25
    (logged,) = plugin[1]
    assert logged["additional_metrics"]["tokens_after"] == pytest.approx((16 + 16 + 12) / 3)
    assert logged["additional_metrics"]["answered_now"] == 3 and logged["total_gen_tokens"] > 0


def test_what_was_answered_is_not_asked_again(plugin, checkpoint, clips, tmp_path, monkeypatch):
    first = load(plugin, checkpoint, record=str(tmp_path / "record"))
    answers = [result.text for result in first.generate_until(requests_about(first, clips)[:2])]
    first._journal.close()
    second = load(plugin, checkpoint, record=str(tmp_path / "record"))
    seen = []
    decode = plugin[0].load_video
    monkeypatch.setattr(plugin[0], "load_video", lambda source, **how: seen.append(source) or decode(source, **how))
    found = second.generate_until(requests_about(second, clips))
    assert [result.text for result in found][:2] == answers and seen == [clips[2]]
    assert found[0].token_counts.vidcompress["cost"]["frames"] == 4
    assert plugin[1][-1]["additional_metrics"]["recorded"] == 2
    # Another question about the same document is another question.
    second.generate_until(requests_about(second, clips, max_new_tokens=2)[:1])
    assert seen == [clips[2], clips[0]]
    second._journal.close()


def test_repeats_are_asked_and_padding_is_not(plugin, checkpoint, clips, monkeypatch):
    model = load(plugin, checkpoint, batch_size=2)
    (request,) = requests_about(model, clips[:1])
    padding = Request(request.args, {"__padding_only__": True})
    sizes = []
    run = plugin[0].answer
    monkeypatch.setattr(plugin[0], "answer", lambda m, p, asked, **o: sizes.append(len(asked)) or run(m, p, asked, **o))
    found = model.generate_until([request, request, padding, padding])
    assert sizes == [2] and len({result.text for result in found}) == 1 and len(found) == 4


def test_errors_are_raised_and_name_the_document(plugin, checkpoint, clips, tmp_path, monkeypatch):
    (tmp_path / "bad.mp4").write_bytes(b"no video")
    model = load(plugin, checkpoint, record=str(tmp_path / "record"))
    asked = requests_about(model, [clips[0], str(tmp_path / "bad.mp4")])
    with pytest.raises(RuntimeError, match=r"task task, document 1: ValueError: .*bad\.mp4 is damaged"):
        model.generate_until(asked)
    assert len(model._journal.answers) == 1
    monkeypatch.setattr(model._model, "generate", lambda **given: 1 / 0)
    with pytest.raises(RuntimeError, match="task task, document 1: ZeroDivisionError"):
        model.generate_until(requests_about(model, [clips[0], clips[1]]))
    # One of several ends its process, for lmms-eval would catch the error and the others would wait.
    model._world_size = 2
    with pytest.raises(SystemExit) as end:
        model.generate_until(requests_about(model, [clips[0], clips[1]]))
    assert end.value.code == 1
    for refused in (model.loglikelihood, model.generate_until_multi_round):
        with pytest.raises(NotImplementedError, match="generate_until"):
            refused([])


def test_a_process_of_several_keeps_its_place(plugin, checkpoint, clips, tmp_path, monkeypatch):
    launched(monkeypatch, RANK="3", WORLD_SIZE="4", LOCAL_RANK="1")
    model = load(plugin, checkpoint, record=str(tmp_path))
    assert (model.rank, model.world_size, model.device.type, model.batch_size) == (3, 4, "cpu", 1)
    model.generate_until(requests_about(model, clips[:1]))
    assert (tmp_path / "answers-3.jsonl").read_text().count("\n") == 1
    with pytest.raises(ValueError, match="device_map='auto': 4 processes would share the GPUs"):
        load(plugin, checkpoint, device_map="auto")
    # What may fail in one process alone must not leave the others waiting.
    monkeypatch.setattr(plugin[0].VidCompress, "_start", lambda self, settings: 1 / 0)
    with pytest.raises(SystemExit):
        load(plugin, checkpoint)


def test_a_checkpoint_without_processor_is_refused_before_its_weights(plugin, tmp_path):
    import tiny

    tiny.llava().config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has no processor that can be loaded"):
        load(plugin, tmp_path)


def test_a_prompt_without_video(plugin, checkpoint):
    model = load(plugin, checkpoint)
    model.task_dict = {"task": {"test": [{}]}}
    asked = Request(("", lambda doc: [{"role": "user", "content": "Hello?"}], {"max_new_tokens": 2}, 0, "task", "test"))
    (found,) = model.generate_until([asked])
    cost = found.token_counts.vidcompress["cost"]
    assert (cost["frames"], cost["pixels"], cost["tokens_before"], cost["mean_length"]) == (0, 0, 0, None)


def test_qwen_in_a_batch():
    """Grids of their own: 2 x 2 patches of two frames are a token, and an odd frame is doubled."""
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=_bytes(), pad_token="<pad>", eos_token="<eos>", padding_side="left"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|vision_start|>", "<|vision_end|>"]})
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|image_pad|>", "<|video_pad|>"]}, False)
    ids = {name: tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in ("image_pad", "video_pad")}
    template = TEMPLATE.replace("<video>", "<|vision_start|><|video_pad|><|vision_end|>")
    processor = transformers.Qwen2VLProcessor(
        image_processor=transformers.Qwen2VLImageProcessor(min_pixels=28 * 28, max_pixels=56 * 56 * 8),
        tokenizer=tokenizer,
        video_processor=transformers.Qwen2VLVideoProcessor(min_pixels=28 * 28, max_pixels=56 * 56 * 8),
        chat_template=template,
    )
    model = _qwen(len(tokenizer), ids)
    from vidcompress import apply

    clip = load_video(np.random.default_rng(0).integers(0, 255, (5, 64, 96, 3), np.uint8))
    content = [{"type": "video"}, {"type": "text", "text": "so?"}]
    asked = [Question([{"role": "user", "content": content}], [clip])] * 2
    with apply(model, "uniform_tokens", retention_ratio=0.5):
        found = answer(model, processor, asked, max_new_tokens=2)
    for _, cost in found:
        assert (cost.frames, cost.pixels) == (5, 6 * 56 * 84)  # 64 x 96 pixels become 56 x 84
        assert (cost.tokens_before, cost.tokens_after, cost.batch) == (18, 9, 2)
    assert found[0][0] == found[1][0]
    with pytest.raises(ValueError, match="one answer a question"):
        answer(model, processor, asked, num_return_sequences=2)


def _bytes():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=260, special_tokens=["<pad>", "<eos>"], initial_alphabet=alphabet)
    bpe.train_from_iterator([], trainer)
    return bpe


def _qwen(vocabulary, ids):
    import tiny_qwen
    from tiny import randomise

    _, cls, text, vision = tiny_qwen._MODELS["qwen2_vl"]
    config = transformers.Qwen2VLConfig(
        text_config=text | {"vocab_size": vocabulary},
        vision_config=vision,
        image_token_id=ids["image_pad"],
        video_token_id=ids["video_pad"],
    )
    model = cls(config)
    model.generation_config.suppress_tokens = list(ids.values())
    return randomise(model).eval()
