"""What is recorded of a prompt, and that recording can be switched off altogether."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import compress, llava, llava_inputs, video_grid

from vidcompress.engine import plan, saliency
from vidcompress.methods.infomerge import InfoMerge
from vidcompress.tokens import Reduction, Site
from vidcompress.trace import Prompt, Step, Trace

TEXT = [5, 6, "V", 7]
TWO_VIDEOS = [5, "V", 6, "V", 7, 8]


def step(before: int = 8, after: int = 2, **facts: Any) -> Step:
    reduction = Reduction(torch.arange(after), before, notes={"segments": [(0, 2)]})
    return Step(
        **{
            "row": 0,
            "video": 0,
            "site": Site.projector(),
            "method": "infomerge",
            "grid": (2, 2, 2),
            "before": before,
            "after": after,
            "newlines": 1,
            "seconds": 0.5,
            "reduction": reduction,
        }
        | facts
    )


# -- the records -------------------------------------------------------------------------------------------------------
def test_counts_add_up_over_videos_and_rows() -> None:
    prompt = Prompt([step(), step(30, 5, video=1), step(10, 10, row=1)], length_before=60, length_after=29)
    assert (prompt.before, prompt.after) == (48, 17)
    # Every video counts once: as it entered its first site, and as it left its last.
    prompt.steps += [step(2, 1, site=Site.decoder(1)), step(5, 4, video=1, site=Site.decoder(1))]
    assert (prompt.before, prompt.after) == (48, 15)
    assert (Prompt().before, Prompt().after) == (0, 0)


def test_history_is_bounded() -> None:
    trace = Trace(history=3)
    assert trace.last is None and len(trace) == 0
    for length in range(5):
        trace.prompts.append(Prompt(length_before=length))
    assert [p.length_before for p in trace] == [2, 3, 4] and len(trace) == 3
    assert trace.last is trace[-1] and trace[0].length_before == 2
    trace.clear()
    assert len(trace) == 0 and trace.last is None
    assert Trace().prompts.maxlen


def test_to_dict_is_json(tmp_path: Path) -> None:
    trace = Trace()
    mixed = Reduction(
        torch.tensor([1]), 2, *(torch.tensor([x]) for x in (0, 0, 0.5)), {"weights": torch.tensor([0.25])}
    )
    inner = step(2, 1, site=Site.decoder(3), reduction=mixed, row=1, video=4, newlines=0)
    trace.prompts.append(
        Prompt([step(), inner], 20, 9, 0.25, 0.125, [{"method": "random", "seed": 0}], "some/head", [9, 8], 0.0625)
    )
    trace.last.look_seconds, trace.last.looked_at = 0.03125, [2, 3]
    content = trace.to_dict()
    path = tmp_path / "trace.json"
    trace.save(path)
    trace.save(str(path))
    assert json.loads(path.read_text(encoding="utf-8")) == content == json.loads(json.dumps(content))
    (prompt,) = content["prompts"]
    steps = prompt.pop("steps")
    assert prompt == {
        "before": 10,
        "after": 3,
        "length_before": 20,
        "length_after": 9,
        "layer_lengths": [9, 8],
        "seconds": 0.25,
        "inner_seconds": 0.0625,
        "look_seconds": 0.03125,
        "looked_at": [2, 3],
        "evictions": [],
        "signal_seconds": 0.125,
        "compression": [{"method": "random", "seed": 0}],
        "head": "some/head",
    }
    assert steps[0] == {
        "row": 0,
        "video": 0,
        "site": "projector",
        "method": "infomerge",
        "grid": [2, 2, 2],
        "before": 8,
        "after": 2,
        "newlines": 1,
        "seconds": 0.5,
        "keep": [0, 1],
        "num_source": 8,
        "merge": None,
        "notes": {"segments": [[0, 2]]},
    }
    assert steps[1]["site"] == "decoder[3]" and (steps[1]["row"], steps[1]["video"]) == (1, 4)
    assert steps[1]["merge"] == {"slot": [0], "source": [0], "weight": [0.5]}
    assert steps[1]["notes"] == {"weights": [0.25]}


def test_repr() -> None:
    trace = Trace()
    assert repr(trace) == "Trace(no video seen yet)"
    trace.prompts += [Prompt([step()]), Prompt([step(), step(10, 3, video=1)])]
    assert repr(trace) == "Trace(2 prompts: 8 -> 2, 18 -> 5)"
    trace.prompts.popleft()
    assert repr(trace) == "Trace(1 prompt: 18 -> 5)"
    trace.enabled = False
    assert repr(trace) == "Trace(off)"
    assert repr(Trace(enabled=False)) == "Trace(off)"


# -- recording ---------------------------------------------------------------------------------------------------------
def forward(model: Any, text: list, frames: int = 6) -> None:
    with torch.no_grad():
        model(**llava_inputs([text], frames))


def test_what_a_prompt_leaves() -> None:
    model = llava()
    method = InfoMerge(retention_ratio=0.3)
    trace = compress(model, method).trace
    length = llava_inputs([TWO_VIDEOS])["input_ids"].shape[1]
    forward(model, TWO_VIDEOS)
    forward(model, TEXT, frames=3)
    first, second = trace
    grid = video_grid(6)
    n = grid[0] * grid[1] * grid[2]
    kept = method.budget(grid)
    assert (first.before, first.after) == (2 * n, 2 * kept)
    assert (first.length_before, first.length_after) == (length, length - 2 * (n - kept))
    assert [(s.row, s.video, s.grid, s.before, s.after, s.newlines) for s in first.steps] == [
        (0, v, grid, n, kept, 1) for v in (0, 1)
    ]
    assert second.steps[0].grid == video_grid(3)
    for prompt in trace:
        assert prompt.seconds >= sum(s.seconds for s in prompt.steps) > 0 and prompt.signal_seconds > 0
        for taken in prompt.steps:
            assert taken.site == Site.projector() and taken.method == "infomerge"
            assert len(taken.reduction) == taken.after and taken.reduction.num_source == taken.before
            assert taken.reduction.notes.keys() >= {"segments", "weights", "salient", "anchors"}
    assert json.loads(json.dumps(trace.to_dict()))["prompts"][0]["steps"][1]["keep"] == [
        *first.steps[1].reduction.keep.tolist()
    ]


def test_a_server_does_not_grow() -> None:
    model = llava(layers=1)
    trace = compress(model, InfoMerge(retention_ratio=0.3)).trace
    for _ in range(trace.prompts.maxlen + 2):
        forward(model, TEXT, frames=1)
    assert len(trace) == trace.prompts.maxlen


@pytest.fixture
def clocks(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Who of the library reads a clock or waits for the device."""
    asked: list[str] = []
    original = time.perf_counter

    def perf_counter() -> float:
        asker = sys._getframe(1).f_globals.get("__name__", "")
        if asker.startswith("vidcompress"):
            asked.append(f"{asker} reads the clock")
        return original()

    monkeypatch.setattr(time, "perf_counter", perf_counter)
    for module in (plan, saliency):
        monkeypatch.setattr(module, "synchronise", lambda device: asked.append("waits for the device"))
    return asked


def test_off_costs_nothing(clocks: list[str]) -> None:
    model = llava()
    handle = compress(model, InfoMerge(retention_ratio=0.3))
    forward(model, TWO_VIDEOS)
    assert any("clock" in c for c in clocks) and any("waits" in c for c in clocks)
    assert len(handle.trace) == 1
    handle.trace.enabled = False
    clocks.clear()
    forward(model, TWO_VIDEOS)
    assert len(handle.trace) == 1
    assert not clocks
    handle.remove()
    forward(model, TEXT)
    handle = compress(model, InfoMerge(retention_ratio=0.3), trace=False)
    forward(model, TWO_VIDEOS)
    assert len(handle.trace) == 0 and not handle.trace.enabled
    assert not clocks
    handle.trace.enabled = True
    forward(model, TEXT)
    assert len(handle.trace) == 1 and clocks
