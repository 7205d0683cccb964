"""Which implementation of an op runs: the fastest that the tensors' device has, unless VIDCOMPRESS_OPS forces one."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable
from typing import Any

import torch

KINDS = ("naive", "torch", "kernel")
"""Slowest first. An op that lacks one uses the one before it."""


def implementation(op: str, device: torch.device) -> Callable[..., Any]:
    """The function `op` of its folder's `kernel.py` on a CUDA device that Triton is installed for, else of `torch.py`.

    VIDCOMPRESS_OPS forces `naive`, `torch` or `kernel`, for debugging; what an op does not have is `torch.py`, then
    `naive.py`. Forced kernels run on CPU tensors too, in Triton's interpreter, if TRITON_INTERPRET=1 is set.

    Raises ValueError if VIDCOMPRESS_OPS names something else, ImportError if it asks for kernels without Triton.
    """
    wanted = os.environ.get("VIDCOMPRESS_OPS")
    if wanted is None:
        return _load(op, "kernel" if device.type == "cuda" and _has_triton() else "torch")
    if wanted not in KINDS:
        raise ValueError(f"VIDCOMPRESS_OPS must be 'naive', 'torch' or 'kernel', got {wanted!r}")
    if wanted == "kernel" and not _has_triton():
        command = 'pip install "vidcompress-transformers[triton]"'
        raise ImportError(f"VIDCOMPRESS_OPS=kernel needs Triton, which is not installed: {command}")
    return _load(op, wanted)


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _load(op: str, wanted: str) -> Callable[..., Any]:
    names = [f"vidcompress.ops.{op}.{kind}" for kind in KINDS[KINDS.index(wanted) :: -1]]
    name = next(name for name in names if importlib.util.find_spec(name) is not None)
    return getattr(importlib.import_module(name), op)
