"""Counts what a GPU would be asked to launch for a video, without one.

    python scripts/launch_report.py                          # FastVID, InfoMerge and Unified's pool at 10 %
    python scripts/launch_report.py --methods fastvid --grid 8x6x6
    python scripts/launch_report.py --methods infomerge --where      # line by line

Triton's interpreter runs the kernels, one launch each, and everything else is cut into pieces as for a GPU. Operators
on what would be the GPU's memory count one each, however many kernels they are (a sort, a Cholesky factor); those on
the host's own tensors do not. Copies to the GPU count apart. Waits are for what the host has to read. `vidcompress
bench` on a GPU counts by the profiler instead.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

os.environ |= {"TRITON_INTERPRET": "1", "VIDCOMPRESS_OPS": "kernel"}  # read when triton and ops are imported

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from vidcompress import load
from vidcompress.bench import decide, merge, synthetic
from vidcompress.commands.shared import sides_of
from vidcompress.ops.launch import launch
from vidcompress.profiling import FREE, WAITS

OPS = Path(importlib.import_module("vidcompress.ops").__file__ or "").parent


class Seen(TorchDispatchMode):
    """Counts what tensors that would be a GPU's are asked for, all of them being the host's.

    A tensor is the host's own if it was made without a device, copied by `.cpu()`, or computed from such tensors only.

    Attributes:
        operators, kernels: launches, by name.
        where: both, by the line that asks.
        copies: from the host.
        waits: for what the host has to read.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operators, self.kernels, self.where = Counter[str](), Counter[str](), Counter[str]()
        self.copies = self.waits = 0
        self._host: set[int] = set()
        self._alive: list[Any] = []  # nothing is freed, so that no address is given twice

    def watch(self, work: Callable[[], object]) -> None:
        """Runs some work and counts."""
        make, to, tolist = torch.tensor, Tensor.to, Tensor.tolist

        def tensor(*args: Any, device: Any = None, **kwargs: Any) -> Tensor:
            with _disable_current_modes():
                out = make(*args, **kwargs)
            self.copies += device is not None
            self.waits += device is not None  # for the copy
            return self._owned(out, device is None)

        def moved(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if not self._is_host(x) or not any(isinstance(a, torch.device) for a in (*args, *kwargs.values())):
                return to(x, *args, **kwargs)
            self.copies += 1
            self.waits += not kwargs.get("non_blocking")
            with _disable_current_modes():
                out = to(x.clone(), *args, **kwargs)
            return self._owned(out, False)

        def read(x: Tensor) -> Tensor:
            if self._is_host(x):
                return x
            self.waits += 1
            with _disable_current_modes():
                out = x.clone()
            return self._owned(out, True)

        with (
            patch.object(torch, "tensor", tensor),
            patch.object(Tensor, "to", moved),
            patch.object(Tensor, "cpu", read),
            patch.object(Tensor, "tolist", lambda x: tolist(read(x))),
            self,
        ):
            work()

    def launched(self, name: str, counter: Counter[str]) -> None:
        """Notes one launch, and which line of the library asks for it."""
        counter[name] += 1
        lines = [f for f in traceback.extract_stack() if Path(f.filename).is_relative_to(OPS.parent)]
        lines = [f for f in lines if Path(f.filename) != OPS / "launch.py"]
        if lines:
            place = Path(lines[-1].filename).relative_to(OPS.parent)
            self.where[f"{place}:{lines[-1].lineno}  {lines[-1].line}"] += 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = func.name().removeprefix("aten::").split(".")[0], kwargs or {}
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        own = all(map(self._is_host, given)) if given else kwargs.get("device") is None
        own |= name in ("lift_fresh", "scalar_tensor")  # a number in Python
        out = func(*args, **kwargs)
        if not own:
            places = args[1] if name in ("index", "index_put", "index_put_") else ()
            self.waits += name in WAITS or any(i is not None and i.dtype == torch.bool for i in places)
            if name not in FREE and name != "_local_scalar_dense":
                self.launched(name, self.operators)
        return self._owned(out, own)

    def _is_host(self, x: Tensor) -> bool:
        return x.untyped_storage().data_ptr() in self._host

    def _owned(self, out: Any, host: bool) -> Any:
        for x in tree_leaves(out):
            if isinstance(x, Tensor):
                self._alive.append(x)
                if host:
                    self._host.add(x.untyped_storage().data_ptr())
        return out


def as_on_a_gpu(seen: list[Seen]) -> None:
    """Sizes are a GPU's from now on, and kernels are counted by name; what interprets them is not."""

    def record(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
        if all(grid):
            seen[-1].launched(kernel.fn.__name__.strip("_"), seen[-1].kernels)
        with _disable_current_modes():
            launch(kernel, grid, *arguments, **constants)

    for path in sorted(OPS.glob("*/*.py")):
        module: Any = importlib.import_module(f"vidcompress.ops.{path.parent.name}.{path.stem}")
        for value in vars(module).values():
            if isinstance(value, dict) and value.keys() == {"cpu", "cuda"}:
                value["cpu"] = value["cuda"]
        if getattr(module, "launch", None) is launch:
            module.launch = record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", default="fastvid,infomerge,unified_pool", help="names, between commas")
    parser.add_argument("--grid", default="32x9x9", help="frames x rows x columns of tokens")
    parser.add_argument("--channels", type=int, default=704, help="only the spectral entropy's launches depend on them")
    parser.add_argument("--retention", type=float, default=0.1)
    parser.add_argument("--long", type=int, help="from so many tokens on density peaks are searched tile by tile")
    parser.add_argument("--where", action="store_true", help="say from which line, too")
    options = parser.parse_args()
    every = [Seen()]
    as_on_a_gpu(every)
    if options.long:
        importlib.import_module("vidcompress.ops.density_peaks.torch").TILED_ABOVE = options.long
    device = torch.device("cpu")
    tokens = synthetic(sides_of(options.grid), options.channels, torch.bfloat16, device)
    print(f"{'method':16} {'launches':>8} {'copies':>6} {'waits':>5}  of them kernels")
    for name in options.methods.split(","):
        method: Any = load(name, retention_ratio=options.retention)
        merge(decide(method, tokens), tokens.features)  # what is made once is made
        seen = Seen()
        every.append(seen)
        seen.watch(lambda method=method: merge(decide(method, tokens), tokens.features))
        kernels = ", ".join(f"{count} {kernel}" for kernel, count in sorted(seen.kernels.items()))
        launches = seen.operators.total() + seen.kernels.total()
        print(f"{name:16} {launches:8} {seen.copies:6} {seen.waits:5}  {kernels}")
        if options.where:
            print("\n".join(f"{count:8}  {line}" for line, count in seen.where.items()))


if __name__ == "__main__":
    sys.exit(main())
