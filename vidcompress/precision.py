"""Decisions are taken in the precision they ask for, whatever surrounds them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch

_lock = threading.Lock()
_inside = 0
_outer = "highest"


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Switches a surrounding autocast off, and TF32 or bf16 shortcuts of fp32 products.

    The latter setting belongs to the process: while any thread is inside, it is "highest" for all.
    """
    global _inside, _outer
    with _lock:
        if not _inside:
            _outer = torch.get_float32_matmul_precision()
            if _outer != "highest":
                torch.set_float32_matmul_precision("highest")
        _inside += 1
    has_autocast = torch.amp.is_autocast_available(device.type)
    try:
        with torch.autocast(device.type, enabled=False) if has_autocast else nullcontext():
            yield
    finally:
        with _lock:
            _inside -= 1
            if not _inside and _outer != "highest":
                torch.set_float32_matmul_precision(_outer)
