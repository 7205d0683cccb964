"""Asking questions of a model, results files and their statistics, and the command."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

import vidcompress
from vidcompress.eval import asking, checkpoints, run, tables, trainings
from vidcompress.eval.results import Results, Run
from vidcompress.eval.suites import load_suite
from vidcompress.method import Method, list_methods
from vidcompress.tokens import Reduction, Site, VideoTokens
from vidcompress.video import Video, prepare_inputs

PATH = checkpoints.path("llava_onevision")


@pytest.fixture(scope="module")
def model():
    return AutoModelForImageTextToText.from_pretrained(PATH, dtype="float32").eval()


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(PATH)


@pytest.fixture(scope="module")
def sheets(model, processor):
    return asking.prepare(model, processor, load_suite("tinyqa", 3))


def generated(model, processor, clip, question) -> str:
    """The first word that `generate` writes."""
    count = len(clip.frames)
    video = Video(clip.frames, 8.0, count, count / 8, tuple(range(count)), clip.name)
    inputs = prepare_inputs(processor, video, question.text)
    ids = model.generate(**inputs, max_new_tokens=1, do_sample=False)
    return processor.decode(ids[0, -1])


@pytest.mark.parametrize("compression", [None, "fastvid", "unified", "fastv"])
def test_answers_are_those_that_generate_writes(compression, model, processor, sheets):
    sheet = sheets[0]
    handle = None if compression is None else vidcompress.apply(model, compression, retention_ratio=0.3)
    try:
        reply = asking.ask(model, sheet)
        written = [generated(model, processor, sheet.clip, question) for question in sheet.clip.questions]
    finally:
        if handle is not None:
            handle.remove()
    chosen = [question.options[i] for question, i in zip(sheet.clip.questions, reply.choices)]
    assert chosen == written


@pytest.mark.parametrize("compression", ["infomerge", "unified_pool"])
def test_continuing_from_the_clip_is_asking_anew(compression, model, sheets):
    with vidcompress.apply(model, compression, retention_ratio=0.2), torch.inference_mode():
        in_turn, _ = asking._ask_in_turn(model, sheets[1])
        apart, _ = asking._ask_apart(model, sheets[1])
    for one, other in zip(in_turn, apart):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_counts_are_those_of_the_trace(model, sheets):
    plain = asking.ask(model, sheets[0])
    assert (plain.before, plain.kept, plain.mean_kept, plain.compression_ms) == (864, 864, 864, 0)
    with vidcompress.apply(model, "random", retention_ratio=0.1):
        outer = asking.ask(model, sheets[0])
    assert (outer.before, outer.kept, outer.mean_kept) == (864, 86, 86) and outer.compression_ms > 0
    with vidcompress.apply(model, "fastv", retention_ratio=0.5):
        inner = asking.ask(model, sheets[0])
    assert (inner.before, inner.kept, inner.mean_kept) == (864, 432, 648)  # from layer 2 of 4


@pytest.mark.parametrize("backbone", ["llava_onevision", "qwen2_vl"])
@pytest.mark.parametrize("compression", [None, "fastvid", "fastv"])
def test_clips_of_two_sizes_in_one_suite(compression, backbone):
    """A tall clip is answered alike whether a wide one was asked before or not; tokens are those of its own grid."""
    path = checkpoints.path(backbone)
    model = AutoModelForImageTextToText.from_pretrained(path, dtype="float32").eval()
    sheets = asking.prepare(model, AutoProcessor.from_pretrained(path), load_suite("tinyqa-wide", 2))
    assert [sheet.clip.frames.shape[1:3] for sheet in sheets] == [(60, 84), (84, 60)]

    def ask(some: list[asking.Sheet]) -> list[asking.Reply]:
        handle = None if compression is None else vidcompress.apply(model, compression, retention_ratio=0.3)
        try:
            return [asking.ask(model, sheet) for sheet in some]
        finally:
            if handle is not None:
                handle.remove()

    after, alone = ask(sheets)[1], ask(sheets[1:])[0]
    assert (after.choices, after.kept, after.mean_kept) == (alone.choices, alone.kept, alone.mean_kept)
    assert after.before == {"llava_onevision": 24 * 6 * 6, "qwen2_vl": 12 * 7 * 5}[backbone]


# -- runs and files ----------------------------------------------------------------------------------------------------
def evaluated(model, processor, **settings) -> Results:
    return list(run.evaluate(model, processor, name="tiny", **{"limit": 2} | settings))[-1][0]


def test_an_interrupted_run_goes_on(model, processor, tmp_path):
    out = tmp_path / "results.json"
    settings = {"methods": ["random", "fastvid"], "retention_ratios": [0.5, 0.1], "out": out}
    steps = run.evaluate(model, processor, name="tiny", limit=2, **settings)
    for _ in range(3):
        next(steps)
    steps.close()
    half = Results.load(out)
    assert [(r.method, r.retention_ratio) for r in half.runs] == [("none", 1.0), ("random", 0.5), ("random", 0.1)]
    whole = evaluated(model, processor, **settings)
    assert [r.seconds for r in whole.runs[:3]] == [r.seconds for r in half.runs]  # not asked again
    assert [(r.method, r.retention_ratio) for r in whole.runs[3:]] == [("fastvid", 0.5), ("fastvid", 0.1)]
    assert Results.load(out) == whole
    assert list(run.evaluate(model, processor, name="tiny", limit=2, **settings)) == []
    fresh = evaluated(model, processor, methods=["random", "fastvid"], retention_ratios=[0.5, 0.1])
    assert [r.choices for r in fresh.runs] == [r.choices for r in whole.runs]


@pytest.fixture
def drawing(monkeypatch):
    """`random` draws from torch's own generator, as a method of someone else might."""

    def reduce(self: Method, tokens: VideoTokens, site: Site) -> Reduction:
        kept = torch.randperm(len(tokens))[: self.budget(tokens.grid)].sort().values
        return Reduction(kept, len(tokens))

    monkeypatch.setattr(list_methods()["random"], "reduce", reduce)


@pytest.fixture
def asked(monkeypatch) -> list[str]:
    """Names of the clips that are asked about; a KeyboardInterrupt comes before the one after the seventh."""
    names: list[str] = []

    def ask(model: torch.nn.Module, sheet: asking.Sheet) -> asking.Reply:
        if len(names) == 7:
            raise KeyboardInterrupt
        names.append(sheet.clip.name)
        return asking.ask(model, sheet)

    monkeypatch.setattr(run, "ask", ask)
    return names


def test_a_run_that_is_interrupted_goes_on_with_the_next_clip(drawing, asked, model, processor, tmp_path, monkeypatch):
    out, part = tmp_path / "results.json", tmp_path / "results.json.part"
    settings = {"methods": ["random"], "retention_ratios": [0.02], "limit": 5, "out": out}
    with pytest.raises(KeyboardInterrupt):
        evaluated(model, processor, **settings)
    half = json.loads(part.read_text())
    assert asked == [f"tinyqa-{i:03d}" for i in [0, 1, 2, 3, 4, 0, 1]] and len(half["replies"]) == 2
    part.write_text(json.dumps(half | {"seconds": 1000.0}))
    asked.clear()
    torch.manual_seed(99)  # another process begins elsewhere
    whole = evaluated(model, processor, **settings)
    assert asked == ["tinyqa-002", "tinyqa-003", "tinyqa-004"]
    assert whole.runs[1].seconds > 1000 and [path.name for path in tmp_path.iterdir()] == [out.name]
    monkeypatch.setattr(run, "ask", asking.ask)
    fresh = evaluated(model, processor, **settings | {"out": None})
    assert [(r.choices, r.before, r.kept, r.mean_kept) for r in whole.runs] == [
        (r.choices, r.before, r.kept, r.mean_kept) for r in fresh.runs
    ]


@pytest.mark.parametrize(
    ("fact", "value"),
    [
        ("schema", 0),
        ("suite", {"name": "other"}),
        ("model", {"name": "other"}),
        ("setup", {"torch": "0.1"}),
        ("method", "uniform_tokens"),
        ("retention_ratio", 0.5),
        ("settings", []),
    ],
)
def test_a_part_of_another_run_is_not_taken(fact, value, asked, model, processor, tmp_path):
    out, part = tmp_path / "results.json", tmp_path / "results.json.part"
    settings = {"methods": ["random"], "retention_ratios": [0.02], "limit": 6, "out": out}
    with pytest.raises(KeyboardInterrupt):
        evaluated(model, processor, **settings)
    half = json.loads(part.read_text())
    assert fact in half["run"]
    part.write_text(json.dumps(half | {"run": half["run"] | {fact: value}}))
    asked.clear()
    evaluated(model, processor, **settings)
    assert asked == [f"tinyqa-{i:03d}" for i in range(6)]


@pytest.mark.parametrize("text", ["", "[]", "{}", "no json"])
def test_a_part_that_is_none_is_overwritten(text, model, processor, tmp_path):
    (tmp_path / "results.json.part").write_text(text)
    assert len(evaluated(model, processor, out=tmp_path / "results.json").runs) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


def test_ratios_that_a_method_does_not_go_to_are_left_out(model, processor):
    found = evaluated(model, processor, methods=["pyramiddrop"], retention_ratios=[0.5, 0.05])
    assert [(r.method, r.retention_ratio) for r in found.runs] == [("none", 1.0), ("pyramiddrop", 0.5)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": 99}, "has schema 99; this version of vidcompress reads schema 1"),
        ({"schema": None}, "has schema None"),
        ({"suite": {"name": "other"}}, "holds results of another suite"),
        ({"model": {"name": "other"}}, "holds results of another model"),
    ],
)
def test_files_of_something_else(change, message, model, processor, tmp_path):
    out = tmp_path / "results.json"
    evaluated(model, processor, out=out)
    out.write_text(json.dumps(json.loads(out.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        evaluated(model, processor, out=out)


@pytest.mark.parametrize("text", ["", "{}", "[1]", "no json"])
def test_files_that_hold_no_results(text, tmp_path):
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(ValueError, match="is no results file"):
        Results.load(tmp_path / "results.json")


def test_what_cannot_be_evaluated(model, processor):
    with vidcompress.apply(model, "random"), pytest.raises(ValueError, match="compressed already"):
        evaluated(model, processor)
    with pytest.raises(ValueError, match=r"ratio 1\.5 is not in"):
        evaluated(model, processor, methods=["random"], retention_ratios=[1.5])
    assert "dycoke" in run.choose("all") and "dycoke_decoding" not in run.choose("all")
    with pytest.raises(ValueError, match="names no method"):
        run.choose(" , ")
    with pytest.raises(ValueError, match="unknown compression 'infomerg'"):
        run.choose("random,infomerg")


def test_checkpoints_that_do_not_ship():
    with pytest.raises(ValueError, match="no tiny 'qwen3_vl' ships; there are: llava_onevision, qwen2_vl"):
        checkpoints.path("qwen3_vl")


def test_checkpoints_go_by_name(tmp_path, monkeypatch):
    assert checkpoints.located("tiny-llava-onevision") == str(PATH)
    assert checkpoints.located("llava-hf/llava-onevision-qwen2-0.5b-ov-hf").startswith("llava-hf/")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny-qwen2-vl").mkdir()
    assert checkpoints.located("tiny-qwen2-vl") == "tiny-qwen2-vl"


def test_a_template_with_the_question_first_is_refused(model, processor):
    import copy

    turned = copy.copy(processor)
    turned.chat_template = "{{ messages[0]['content'][1]['text'] }} <video> ?"
    with pytest.raises(ValueError, match="does not put the question after the video"):
        asking.prepare(model, turned, load_suite("tinyqa", 1))


# -- statistics --------------------------------------------------------------------------------------------------------
def results(*runs: Run, types: str = "aabbaabb", clips=(0, 0, 0, 0, 1, 1, 1, 1), answers: str = "01010101") -> Results:
    return Results({"name": "s"}, {}, {}, list(clips), list(types), answers, list(runs))


def one(method: str, ratio: float, choices: str) -> Run:
    return Run(method, ratio, [], choices, 10, 5, 5, 1.0, 1.0)


def test_accuracy_and_its_error():
    found = results(one("x", 0.5, "01010000"))
    share, error = found.accuracy(found.runs[0], ["a", "b"])
    assert share == 0.75 and error == pytest.approx(math.sqrt(0.75 * 0.25 / 8))
    assert found.accuracy(found.runs[0], ["a"])[0] == 0.75
    assert math.isnan(found.accuracy(found.runs[0], ["c"])[0])


def test_types_that_the_plain_model_cannot_answer_do_not_count():
    assert results(one("none", 1.0, "01110111")).counted() == ["a"]  # of b it misses half
    assert results(one("x", 0.5, "01110111")).counted() == ["a", "b"]  # not known


def test_paired_differences_by_clip():
    """Two clips of four questions: +2 in one, -1 in the other."""
    found = results(one("x", 0.5, "01010010"), one("y", 0.5, "10010110"))
    mean, error = found.difference(found.runs[0], found.runs[1], ["a", "b"])
    sums = [2, -1]
    expected = sum(sums) / 8
    assert mean == expected
    assert error == pytest.approx(math.sqrt(2 * sum((s - 4 * expected) ** 2 for s in sums)) / 8)
    assert found.difference(found.runs[0], found.runs[0], ["a", "b"]) == (0, 0)
    alone = results(one("x", 0.5, "0101"), types="aabb", clips=(0,) * 4, answers="0101")
    assert math.isnan(alone.difference(alone.runs[0], alone.runs[0], ["a"])[1])


def test_clustered_errors_are_those_of_a_simulation():
    """Clips whose questions are right or wrong together: the error is that seen over many draws of clips."""
    rng = np.random.default_rng(0)

    def draw() -> Results:
        mine = np.repeat(rng.random(60) < 0.6, 5)
        theirs = np.repeat(rng.random(60) < 0.5, 5)
        runs = [one(n, 0.5, "".join("0" if ok else "1" for ok in right)) for n, right in (("x", mine), ("y", theirs))]
        return results(*runs, types="a" * 300, clips=np.repeat(np.arange(60), 5).tolist(), answers="0" * 300)

    drawn = [draw() for _ in range(300)]
    pairs = [d.difference(*d.runs, ["a"]) for d in drawn]
    seen = np.std([mean for mean, _ in pairs])
    assert np.mean([error for _, error in pairs]) == pytest.approx(seen, rel=0.15)


def test_tables_and_plot(tmp_path):
    plain, floor = one("none", 1.0, "01010101"), one("random", 0.5, "01010000")
    found = results(plain, floor, one("better", 0.5, "01010101"), one("worse", 0.5, "10101010"))
    header, rows = tables.accuracy_rows(found)
    assert header == ("method", "50%") and [row[0] for row in rows] == ["better", "random", "worse"]
    assert rows[0][1].startswith("100.0 ±0.0 (+25.0 ±") and rows[1][1] == "75.0 ±15.3"
    assert tables.type_rows(found, 0.5)[1][0] == ("none", "100", "100")
    assert tables.cost_rows(found, 0.5)[1][0][:4] == ("better", "10", "5.0", "5.0")
    found.runs[-1].kept = 3
    assert tables.kept_rows(found)[1] == [("better", "5"), ("random", "5"), ("worse", "5 (3)")]
    assert tables.headline(found) == "uncompressed 100.0 ±0.0 % over 2 types"
    tables.plot(found, tmp_path / "folder" / "accuracy.png")
    assert (tmp_path / "folder" / "accuracy.png").stat().st_size > 10_000


# -- seeds -------------------------------------------------------------------------------------------------------------
def trained(*choices: str) -> Results:
    """A model that answers all of "a" but only half of "b" uncompressed, and so under methods x, y, z."""
    runs = [one(name, 0.5, own) for name, own in zip("xyz", choices, strict=True)]
    return results(one("none", 1.0, "01110111"), *runs)


def test_seeds_in_tables():
    # Right answers to "a" of four: x 4, y 2, z 0 and x 4, y 4, z 0; and the other training: x 0, y 2, z 4 twice.
    first = [trained("01010101", "01111011", "10101010"), trained("01010101", "01010101", "10101010")]
    second = [trained("10101010", "01111011", "01010101"), trained("10101010", "01111011", "01010101")]
    both = {"one": first, "two": second}
    assert trainings.common_types(both) == ["a"]
    header, rows = trainings.plain_rows(both)
    assert header == ("training", "a", "b")
    assert rows == [("one", "100.0 ±0.0", "50.0 ±0.0"), ("two", "100.0 ±0.0", "50.0 ±0.0")]
    header, rows = trainings.method_rows(both, 0.5, {"all": ["a"], "rest": ["b"]})
    assert header == ("method", "all, one", "all, two", "rest, one", "rest, two")
    assert [row[:3] for row in rows] == [
        ("x", "100.0 ±0.0", "0.0 ±0.0"), ("y", "75.0 ±35.4", "50.0 ±0.0"), ("z", "0.0 ±0.0", "100.0 ±0.0")
    ]  # fmt: skip
    header, rows = trainings.agreement_rows(both)
    assert header == ("pairs of models", "50%") and [row[0] for row in rows] == ["one", "two", "one against two"]
    tied = math.sqrt(3) / 2  # ranks 2 1 0 against 1.5 1.5 0
    assert rows[0][1] == f"{tied:.2f} ({tied:.2f} to {tied:.2f})" and rows[1][1].startswith("1.00")
    assert rows[2][1].endswith(f"(-1.00 to {-tied:.2f})")
    with pytest.raises(ValueError, match="not asked under x at 20%"):
        trainings.method_rows(both, 0.2, {"all": ["a"]})
    assert trainings.alike(*first, 0.5) == pytest.approx(tied) and trainings.alike(first[1], second[1], 0.5) < -0.8
    first[0].runs.pop()  # z, which is then left out
    assert trainings.alike(first[0], second[0], 0.5) == pytest.approx(-1)
