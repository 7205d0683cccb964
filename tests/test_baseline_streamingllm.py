"""StreamingLLM: the recorded evictions of the official cache, and exact counts on any video."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from vidcompress import load
from vidcompress.method import floor
from vidcompress.methods.streamingllm import StreamingLLM
from vidcompress.tokens import Grid, Reduction, Site, VideoTokens

GOLDEN = Path(__file__).parent / "golden" / "baselines" / "streamingllm.safetensors"
SITE = Site.decoder(2)


def decide(method: StreamingLLM, n: int) -> Reduction:
    tokens = VideoTokens(torch.randn(n, 4, generator=torch.Generator().manual_seed(0)), (1, 1, n), torch.arange(n))
    return method.decide(tokens, SITE)


def recorded() -> list[tuple[str, int, int, Tensor, Tensor]]:
    """(case and step, sinks, window, positions cached before, and after) of every eviction."""
    with safe_open(GOLDEN, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        cases = json.loads(file.metadata()["cases"])
    found = []
    for name, facts in cases.items():
        steps = [tensors[f"{name}.step{i:02}.cached"] for i in range(len(facts["ops"]))]
        for i, (kind, *coming) in enumerate(facts["ops"]):
            if kind != "append":  # room is made for what is coming
                recent = facts["recent_size"] - sum(coming)
                found.append((f"{name}-{i}", facts["start_size"], recent, steps[i - 1], steps[i]))
    return found


@pytest.mark.parametrize(
    ("sinks", "recent", "before", "after"), [r[1:] for r in recorded()], ids=[r[0] for r in recorded()]
)
@pytest.mark.parametrize("implementation", ["torch", "naive"])
def test_as_recorded(
    sinks: int, recent: int, before: Tensor, after: Tensor, implementation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VIDCOMPRESS_OPS", implementation)
    reduction = decide(StreamingLLM(sinks=sinks, recent=recent), len(before))
    assert torch.equal(before[reduction.keep], after)


def test_sinks_and_window_by_hand() -> None:
    assert decide(StreamingLLM(sinks=2, recent=3), 9).keep.tolist() == [0, 1, 6, 7, 8]
    assert decide(StreamingLLM(sinks=0, retention_ratio=0.5), 9).keep.tolist() == [5, 6, 7, 8]
    assert decide(StreamingLLM(retention_ratio=0.5), 9).keep.tolist() == [0, 1, 2, 8]
    assert decide(StreamingLLM(retention_ratio=0.01), 9).keep.tolist() == [8]
    assert decide(StreamingLLM(recent=5), 9).is_identity


@pytest.mark.parametrize("grid", [(1, 1, 1), (1, 3, 3), (7, 1, 1), (32, 2, 2)], ids=str)
def test_counts_are_exact(grid: Grid) -> None:
    n = grid[0] * grid[1] * grid[2]
    for ratio in (0.01, 0.1, 0.29, 0.5, 0.9, 1.0):
        for features in (torch.randn(n, 8), torch.ones(n, 8)):
            tokens = VideoTokens(features.bfloat16(), grid, torch.arange(n))
            method = StreamingLLM(retention_ratio=ratio)
            reduction = method.decide(tokens, SITE)
            assert method.exact and len(reduction) == max(1, floor(ratio * n))
            assert reduction.keep[-1] == n - 1 and reduction.slot is None
            whole = replace(tokens, features=tokens.features.float())
            assert torch.equal(reduction.keep, method.decide(whole, SITE).keep)
            assert reduction.is_identity == (len(reduction) == n)


@pytest.mark.parametrize("settings", [{"retention_ratio": 0.0}, {"sinks": -1}, {"recent": 0}, {"layer": -1}])
def test_bad_settings_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must be"):
        load("streamingllm", **settings)
