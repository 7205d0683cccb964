"""How much memory the tensors of a piece of work take at once: counted, not measured, so the same on any machine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class _Living(TorchDispatchMode):
    """The storages that operators made and that are still alive."""

    def __init__(self) -> None:
        super().__init__()
        self.living: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        output = func(*args, **(kwargs or {}))
        for x in tree_leaves(output):
            if isinstance(x, Tensor) and x.untyped_storage()._cdata not in given:
                storage = x.untyped_storage()
                self.living[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.living = {key: entry for key, entry in self.living.items() if not entry[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.living.values()))
        return output


def peak_bytes(work: Callable[[], object]) -> int:
    """Most bytes that tensors made by `work` take at once, what it returns included; not what operators use inside."""
    with torch.no_grad(), _Living() as seen:
        work()
    return seen.peak
