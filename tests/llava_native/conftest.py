"""Tests of models of the authors' package `llava`, which needs a transformers of its own: scripts/test_llava_native.sh
runs them, in a second environment. Without the variable that it sets, nothing here is collected.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

EXCHANGE = "VIDCOMPRESS_LLAVA_NATIVE"
"""Names the folder in which the two environments leave what they compare (tests/test_llava_native.py reads it)."""

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported

if EXCHANGE not in os.environ:
    collect_ignore_glob = ["*"]
else:
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def exchange() -> Path:
    """The folder that the first environment reads afterwards."""
    return Path(os.environ[EXCHANGE])
