"""Counts what a GPU would be asked to launch for a video, without one.

    python scripts/launch_report.py                          # FastVID, InfoMerge and Unified's pool at 10 %
    python scripts/launch_report.py --methods fastvid --grid 8x6x6

Triton's interpreter runs the kernels, one launch each, and everything else is cut into pieces as for a GPU. Operators
count one each, those on the host's own numbers too; copies to the device are not seen. `vidcompress bench` on a GPU
counts by the profiler instead. Interpreted kernels are slow: channels are few, which no count depends on.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

os.environ |= {"TRITON_INTERPRET": "1", "VIDCOMPRESS_OPS": "kernel"}  # read when triton and ops are imported

import torch
from torch.utils._python_dispatch import _disable_current_modes

from vidcompress import load
from vidcompress.bench import decide, merge, synthetic
from vidcompress.commands.shared import sides_of
from vidcompress.ops.launch import launch
from vidcompress.profiling import count_launches

OPS = Path(importlib.import_module("vidcompress.ops").__file__ or "").parent


def as_on_a_gpu(launched: Counter[str]) -> None:
    """Sizes are a GPU's from now on, and kernels are counted by name; what interprets them is not."""

    def record(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
        launched[kernel.fn.__name__.strip("_")] += all(grid)
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
    parser.add_argument("--retention", type=float, default=0.1)
    options = parser.parse_args()
    launched: Counter[str] = Counter()
    as_on_a_gpu(launched)
    device = torch.device("cpu")
    tokens = synthetic(sides_of(options.grid), 16, torch.bfloat16, device)
    print(f"{'method':16} {'launches':>8} {'waits':>5}  kernels")
    for name in options.methods.split(","):
        method: Any = load(name, retention_ratio=options.retention)
        launched.clear()

        def work(method: Any = method) -> object:
            return merge(decide(method, tokens), tokens.features)

        seen = count_launches(work, device)
        kernels = ", ".join(f"{count} {kernel}" for kernel, count in sorted(launched.items()))
        print(f"{name:16} {seen.kernels + launched.total():8} {seen.waits:5}  {kernels}")


if __name__ == "__main__":
    sys.exit(main())
