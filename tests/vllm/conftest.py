"""Tests with vLLM, whose CPU build needs an environment of its own: scripts/test_vllm.sh makes it and runs them.

Without the variable that it sets, nothing here is collected.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

if "VIDCOMPRESS_VLLM" not in os.environ:
    collect_ignore_glob = ["*"]
else:
    os.environ |= {
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),  # tiny models; read when torch is imported
        "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine in this process, so that tests can look inside
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "WARNING"),
    }
    import checkpoints


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory):
    """`checkpoint(kind)`: the folder of a tiny model, made once."""
    root, made = tmp_path_factory.mktemp("checkpoints"), {}

    def get(kind: str) -> Path:
        if kind not in made:
            made[kind] = checkpoints.save(kind, root / kind)
        return made[kind]

    return get


@pytest.fixture(scope="session")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `good.mp4`, and `corrupt.mp4`, of which only the beginning is an mp4."""
    folder = tmp_path_factory.mktemp("clips")
    good = checkpoints.write_mp4(folder / "good.mp4", checkpoints.clip(8))  # as many frames as the server takes
    (folder / "corrupt.mp4").write_bytes(good.read_bytes()[:200] + b"\0" * 2000)
    return folder
