"""What methods take beside the video: bounded for a video of any length, where a method looks at frames or shots."""

from __future__ import annotations

import pytest
import torch
from allocations import peak_bytes

from vidcompress.bench import decide, merge, synthetic
from vidcompress.method import list_methods

LOCAL = [
    "dycoke_outer",
    "fastvid",
    "hieravid",
    "prumerge",
    "prumerge_plus",
    "uniform_frames",
    "uniform_tokens",
    "visionzip",
]
"""Methods that compare tokens of a frame, or of a shot, only."""


def workspace(name: str, frames: int, channels: int = 3584, **settings: object) -> int:
    """Bytes beyond the video and what is left of it."""
    tokens = synthetic((frames, 14, 14), channels, torch.bfloat16, torch.device("cpu"))
    method = list_methods()[name](**settings)
    left = merge(decide(method, tokens), tokens.features)
    return peak_bytes(lambda: merge(decide(method, tokens), tokens.features)) - left.nbytes


def test_the_count_is_right():
    def work():
        a = torch.zeros(1000, dtype=torch.float32)  # 4000 bytes
        b = a + 1  # 8000
        del a
        c = b[:10] * 2  # 4040: a slice is nothing new
        return b.view(10, 100), c

    assert peak_bytes(work) == 8000


@pytest.mark.parametrize("name", LOCAL)
def test_workspace_of_local_methods(name):
    settings = {"retention_ratio": 0.5} if name == "dycoke_outer" else {"retention_ratio": 0.1}
    assert workspace(name, 64, **settings) <= 256e6


def test_workspace_of_infomerge():
    # Without the entropy, whose cost is a matrix of the shorter side of a segment, 20 to 103 MB.
    assert workspace("infomerge", 64, richness_weight=0.0) <= 256e6


@pytest.mark.parametrize("name", [*LOCAL, "infomerge"])
def test_workspace_does_not_grow_with_the_frames(name):
    """Beyond what is kept: by indices and weights, of which PruMerge has 33 a survivor, and by no copy of tokens."""
    settings = {"retention_ratio": 0.5} if name == "dycoke_outer" else {"retention_ratio": 0.1}
    frames = 160 if name in ("fastvid", "hieravid", "infomerge") else 64  # which fill their chunks
    short, long = (workspace(name, t, channels=256, **settings) for t in (frames, 2 * frames))
    assert long - short <= 300 * frames * 196
