"""The guard: trained tiny models' answers under compression are those that were recorded, and faults would show.

`tests/golden/tinyqa-llava_onevision.json` was written by

    vidcompress eval --clips 12 --methods fastvid,infomerge,unified,hieravid,fastv,uniform_frames,random \
        --retention 1.0,.1 --threads 1 --out tests/golden/tinyqa-llava_onevision.json

and that of Qwen2-VL, whose tokens have three rotary positions, by the same with `--model tiny-qwen2-vl` and
`--methods fastvid,infomerge,fastv,uniform_tokens,random`. All other methods are held to what they answered about the
first clips when everything was asked (benchmarks/results).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from vidcompress.eval import checkpoints
from vidcompress.eval.results import Results, Run
from vidcompress.eval.run import evaluate
from vidcompress.tokens import Reduction

RECORDED = {
    backbone: Results.load(Path(__file__).parent / "golden" / f"tinyqa-{backbone}.json")
    for backbone in checkpoints.NAMES
}
RUNS = [(backbone, run.method) for backbone, results in RECORDED.items() for run in results.runs]
CLIPS, RATIO = 12, 0.1
TOLERATED = 2
"""Answers of 96 that another machine's arithmetic may turn."""

COMMITTED = {
    backbone: Results.load(Path(__file__).parent.parent / "benchmarks" / "results" / f"tinyqa-{backbone}.json")
    for backbone in checkpoints.NAMES
}
FIRST = 2
"""Clips that the other methods are asked about."""

every_backbone = pytest.mark.parametrize("backbone", [*RECORDED])


@pytest.fixture(scope="module")
def loaded() -> dict[str, tuple[Any, Any]]:
    """Of every backbone model and processor."""
    return {
        backbone: (
            AutoModelForImageTextToText.from_pretrained(checkpoints.path(backbone), dtype="float32").eval(),
            AutoProcessor.from_pretrained(checkpoints.path(backbone)),
        )
        for backbone in RECORDED
    }


@pytest.fixture(scope="module")
def asked(loaded) -> dict[str, Results]:
    """All methods at 10 %, and the uncompressed models."""
    return {
        backbone: run(loaded, backbone, [method for other, method in RUNS if other == backbone and method != "none"])
        for backbone in RECORDED
    }


def run(loaded: dict[str, tuple[Any, Any]], backbone: str, methods: list[str]) -> Results:
    settings = {"methods": methods, "retention_ratios": [RATIO], "limit": CLIPS}
    return list(evaluate(*loaded[backbone], name=checkpoints.NAMES[backbone], **settings))[-1][0]


def flips(one: Run, other: Run) -> int:
    return sum(a != b for a, b in zip(one.choices, other.choices))


def found(results: Results, method: str) -> Run:
    own = results.find(method, 1.0 if method == "none" else RATIO)
    assert own is not None
    return own


@every_backbone
def test_the_record_is_of_this_model_and_these_questions(backbone, asked):
    RECORDED[backbone].continues(asked[backbone], Path("tinyqa.json"))


@pytest.mark.parametrize(("backbone", "method"), RUNS)
def test_answers_are_those_recorded(backbone, method, asked):
    own, recorded = found(asked[backbone], method), found(RECORDED[backbone], method)
    assert flips(own, recorded) <= TOLERATED
    kept = (recorded.before, recorded.kept, recorded.mean_kept)
    assert (own.before, own.kept, own.mean_kept) == pytest.approx(kept, abs=0.5)


@every_backbone
@pytest.mark.parametrize("ratio", [RATIO, 0.3], ids=["10%", "the others at 30%"])
def test_all_other_methods_answer_as_when_everything_was_asked(backbone, ratio, loaded):
    committed = COMMITTED[backbone]
    others = {r.method for r in committed.runs if (backbone, r.method) not in RUNS}
    least = {name: min(r.retention_ratio for r in committed.runs if r.method == name) for name in others}
    methods = [name for name in sorted(others) if max(RATIO, least[name]) == ratio]
    assert methods
    settings = {"methods": methods, "retention_ratios": [ratio], "limit": FIRST}
    again = list(evaluate(*loaded[backbone], name=checkpoints.NAMES[backbone], **settings))[-1][0]
    for method in methods:
        own, before = again.find(method, ratio), committed.find(method, ratio)
        assert own is not None and before is not None
        assert sum(a != b for a, b in zip(own.choices, before.choices)) <= 1, method  # zip: the first clips


def test_floors(asked):
    """The uncompressed model is good, methods beat chance, and the best come close."""
    results = asked["llava_onevision"]
    types = RECORDED["llava_onevision"].counted()
    share = {r.method: results.accuracy(r, types)[0] for r in results.runs}
    assert share["none"] >= 0.95
    for method in share.keys() - {"none", "random", "uniform_frames", "hieravid"}:  # which leaves 3 tokens at last
        assert share[method] >= share["random"] + 0.05, method
    assert max(share[m] for m in share.keys() - {"none"}) >= share["none"] - 0.15


def test_qwen_is_good_without_compression(asked):
    results = asked["qwen2_vl"]
    assert results.accuracy(found(results, "none"), RECORDED["qwen2_vl"].counted())[0] >= 0.95


def in_reverse(tokens: torch.Tensor) -> torch.Tensor:
    return tokens.flip(0)


def a_frame_later(tokens: torch.Tensor) -> torch.Tensor:
    return tokens.roll(36, 0)


@every_backbone
@pytest.mark.parametrize(
    ("before", "after"), [(None, in_reverse), (a_frame_later, None)], ids=["order reversed", "frame off by one"]
)
def test_faults_trip_it(backbone, before, after, loaded, monkeypatch):
    """Survivors in the wrong order, or taken from the next frame: far more answers turn than are tolerated."""
    apply = Reduction.apply

    def wrong(self: Reduction, tokens: torch.Tensor, *args: object) -> torch.Tensor:
        moved = apply(self, tokens if before is None else before(tokens), *args)
        return moved if after is None else after(moved)

    monkeypatch.setattr(Reduction, "apply", wrong)
    own = run(loaded, backbone, ["fastvid"])
    assert flips(found(own, "fastvid"), found(RECORDED[backbone], "fastvid")) > 3 * TOLERATED
