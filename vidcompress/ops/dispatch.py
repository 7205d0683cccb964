"""Which implementation of an op runs: the fast one, unless `VIDCOMPRESS_OPS=naive` asks for the definition."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable
from typing import Any


def implementation(op: str) -> Callable[..., Any]:
    """The function `op` of its folder's `torch.py`, or of `naive.py` where that is all there is or all that is wanted.

    Raises ValueError if VIDCOMPRESS_OPS names something else than `naive` or `torch`.
    """
    wanted = os.environ.get("VIDCOMPRESS_OPS", "torch")
    if wanted not in ("naive", "torch"):
        raise ValueError(f"VIDCOMPRESS_OPS must be 'naive' or 'torch', got {wanted!r}")
    return _load(op, wanted)


@functools.cache
def _load(op: str, wanted: str) -> Callable[..., Any]:
    name = f"vidcompress.ops.{op}.{wanted}"
    if importlib.util.find_spec(name) is None:
        name = f"vidcompress.ops.{op}.naive"
    return getattr(importlib.import_module(name), op)
