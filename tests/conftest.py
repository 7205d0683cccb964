"""What every test needs: no network, one thread, a torchvision that loads, tiny models."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported

import pytest
import torch

from vidcompress.compat import ensure_torchvision

if torch.cuda.is_available():
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # asked for when only deterministic operations may run
else:
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported, which torch does not do by itself
ensure_torchvision()  # looked for when transformers is imported

import tiny  # noqa: E402  (imports transformers)

torch.set_num_threads(1)


@pytest.fixture
def llava():
    """`tiny.llava`: builds a new tiny LLaVA-OneVision at every call."""
    return tiny.llava


@pytest.fixture
def llava_inputs():
    """`tiny.llava_inputs`: prompts in which "V" marks a video and "I" an image, and their pixels."""
    return tiny.llava_inputs
