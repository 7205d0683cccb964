"""The guard: a trained tiny model's answers under compression are those that were recorded, and faults would show.

`tests/golden/tinyqa.json` was written by

    vidcompress eval --clips 12 --methods fastvid,infomerge,unified,hieravid,fastv,uniform_frames,random \
        --retention 1.0,.1 --threads 1 --out tests/golden/tinyqa.json
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from vidcompress.eval import checkpoints
from vidcompress.eval.results import Results, Run
from vidcompress.eval.run import evaluate
from vidcompress.tokens import Reduction

RECORDED = Results.load(Path(__file__).parent / "golden" / "tinyqa.json")
METHODS = [run.method for run in RECORDED.runs if run.method != "none"]
CLIPS, RATIO = 12, 0.1
TOLERATED = 2
"""Answers of 96 that another machine's arithmetic may turn."""


@pytest.fixture(scope="module")
def model():
    return AutoModelForImageTextToText.from_pretrained(checkpoints.path(), dtype="float32").eval()


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(checkpoints.path())


@pytest.fixture(scope="module")
def asked(model, processor):
    """All methods at 10 %, and the uncompressed model."""
    return run(model, processor, METHODS)


def run(model, processor, methods: list[str]) -> Results:
    settings = {"methods": methods, "retention_ratios": [RATIO], "limit": CLIPS}
    return list(evaluate(model, processor, name=checkpoints.NAMES["llava_onevision"], **settings))[-1][0]


def flips(one: Run, other: Run) -> int:
    return sum(a != b for a, b in zip(one.choices, other.choices))


def recorded(method: str, ratio: float = RATIO) -> Run:
    found = RECORDED.find(method, ratio)
    assert found is not None
    return found


def test_the_record_is_of_this_model_and_these_questions(asked):
    RECORDED.continues(asked, Path("tinyqa.json"))


@pytest.mark.parametrize("method", ["none", *METHODS])
def test_answers_are_those_recorded(method, asked):
    own = asked.find(method, 1.0 if method == "none" else RATIO)
    assert flips(own, recorded(method, own.retention_ratio)) <= TOLERATED
    assert (own.before, own.kept, own.mean_kept) == pytest.approx(
        [getattr(recorded(method, own.retention_ratio), name) for name in ("before", "kept", "mean_kept")], abs=0.5
    )


def test_floors(asked):
    """The uncompressed model is good, methods beat chance, and the best come close."""
    types = RECORDED.counted()
    share = {r.method: asked.accuracy(r, types)[0] for r in asked.runs}
    assert share["none"] >= 0.95
    for method in set(METHODS) - {"random", "uniform_frames", "hieravid"}:  # which leaves 3 tokens to the last layer
        assert share[method] >= share["random"] + 0.05, method
    assert max(share[m] for m in METHODS) >= share["none"] - 0.15


def in_reverse(tokens: torch.Tensor) -> torch.Tensor:
    return tokens.flip(0)


def a_frame_later(tokens: torch.Tensor) -> torch.Tensor:
    return tokens.roll(36, 0)


@pytest.mark.parametrize(
    ("before", "after"), [(None, in_reverse), (a_frame_later, None)], ids=["order reversed", "frame off by one"]
)
def test_faults_trip_it(before, after, model, processor, monkeypatch):
    """Survivors in the wrong order, or taken from the next frame: far more answers turn than are tolerated."""
    apply = Reduction.apply

    def wrong(self: Reduction, tokens: torch.Tensor, *args: object) -> torch.Tensor:
        moved = apply(self, tokens if before is None else before(tokens), *args)
        return moved if after is None else after(moved)

    monkeypatch.setattr(Reduction, "apply", wrong)
    own = run(model, processor, ["fastvid"]).find("fastvid", RATIO)
    assert flips(own, recorded("fastvid")) > 3 * TOLERATED
