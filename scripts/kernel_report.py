"""Compiles every Triton kernel for an H200 (sm_90), as the ops launch it, and prints what it takes. Needs no GPU.

    python scripts/kernel_report.py                 # a table
    python scripts/kernel_report.py --json out.json

Registers are those of a thread, of which 65,536 share a multiprocessor; spills are the bytes of local memory a thread
uses for want of them; shared memory is that of a program, 227 KiB at most. `wgmma` are Hopper's asynchronous products
on tensor cores, `mma` the older ones, `fma` those without; `cp.async` are copies that overlap with them.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

os.environ.pop("TRITON_INTERPRET", None)  # read when triton is imported; interpreted kernels cannot be compiled

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from vidcompress.ops.launch import OPTIONS

TYPES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.uint8: "u8",
}


@dataclass(frozen=True)
class Report:
    """What a compiled kernel takes: registers a thread, bytes of spills a thread, bytes of shared memory a program."""

    case: str
    kernel: str
    warps: int
    registers: int
    spills: int
    shared: int
    products: str
    asynchronous: bool


def compiled(case: str, kernel: Any, arguments: tuple[Any, ...], constants: dict[str, Any]) -> Report:
    """Compiles a kernel for the types, alignments and constants of one launch."""
    options = {name: constants.pop(name) for name in ("num_warps", "num_stages") if name in constants} | OPTIONS
    given = dict(zip(kernel.arg_names, arguments)) | constants
    fixed = {n: v for n, v in given.items() if n in constants or (type(v) is int and v == 1)}
    signature, attributes = {}, {}
    for place, name in enumerate(kernel.arg_names):
        value = given[name]
        if name in fixed:
            signature[name] = "constexpr"
        elif isinstance(value, Tensor):
            signature[name] = f"*{TYPES[value.dtype]}"
        else:
            signature[name] = "fp32" if isinstance(value, float) else "i32" if abs(value) < 2**31 else "i64"
        # The launcher tells the compiler what is a multiple of 16; without that there are no wide copies.
        if name not in fixed and (isinstance(value, Tensor) or (isinstance(value, int) and value % 16 == 0)):
            attributes[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=fixed, attrs=attributes)
    binary = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    ptx = binary.asm["ptx"]
    registers, spills = usage(binary.asm["cubin"])
    products = next((kind for kind in ("wgmma", "mma.sync", "fma") if kind in ptx), "none").removesuffix(".sync")
    return Report(
        case, kernel.__name__.strip("_"), options.get("num_warps", 4), registers, spills, binary.metadata.shared,
        products, "cp.async" in ptx,
    )  # fmt: skip


def usage(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of local memory a thread, as the tool says that comes with Triton."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        said = subprocess.run([tool, "-res-usage", path], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", said)
    if found is None:
        raise RuntimeError(f"{tool.name} says nothing of registers: {said!r}")
    return int(found[1]), int(found[2])


# -- one launch of every kind, at the sizes of LLaVA-OneVision-7B ------------------------------------------------------
def row_with_peaks(module: Any, dtype: torch.dtype, neighbours: int, ties: str = "index") -> None:
    module.row_scores(torch.empty(2048, 3584, dtype=dtype), torch.ones(2048, dtype=torch.bool), neighbours, ties)


def around_a_leader(module: Any) -> None:
    every = torch.arange(2048)
    points = module.Points(torch.empty(2048, 3584, dtype=torch.bfloat16), every, every)
    points.scan(every, every, torch.zeros(3584, dtype=torch.float64), 15)
    points.scan(every, None, None, 15)


def column_mean_attention(module: Any, dtype: torch.dtype, channels: int) -> None:
    query = torch.empty(1, 16, 729, channels, dtype=dtype)
    module.column_mean_attention(query, query, channels**-0.5)


def dpp_map(module: Any, n: int) -> None:
    module.together([(torch.ones(n, 64), torch.zeros(n), 8)], 1e-6, "dot")


def frames(length: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(length, 196, 3584, dtype=dtype)


def select_in_turn(module: Any, positions: int) -> None:
    scores = torch.empty(32, positions)
    static = torch.zeros(1, positions, dtype=torch.bool)
    module.select_in_turn(scores, (0.1, 0.0), [(0, 32)], static, torch.zeros(32, dtype=torch.long))
    module.select_in_turn(scores, None, [(0, 32)], static, torch.zeros(32, dtype=torch.long))


def frames_with_peaks(module: Any, dtype: torch.dtype, n: int = 196) -> None:
    x = torch.empty(1, n, 3584, dtype=dtype)
    candidates, noisy = torch.ones(1, n, dtype=torch.bool), n > 196
    module.density_peaks(x, candidates, 4, "strict" if noisy else "index", torch.zeros(1, n) if noisy else None)


def anchor_merge(module: Any, dtype: torch.dtype, count: int) -> None:
    members = torch.ones(2, 196, dtype=torch.bool)
    module.anchor_merge(torch.empty(2, 196, 3584, dtype=dtype), members, members, [count, 0], [(0, 2), (0, 2)], 0.6)


def merge(module: Any, dtype: torch.dtype) -> None:
    slot = torch.arange(32)
    module.merge(torch.empty(64, 3584, dtype=dtype), slot, slot, slot, torch.ones(32))


def through_means(module: Any) -> None:
    slot, marks = torch.arange(64), torch.ones(32, 196, dtype=torch.bool)
    module.through_means(slot, slot, torch.ones(64), 0, marks, [(0, 8), (8, 32)], torch.zeros((), dtype=torch.long))


def breaches(module: Any) -> None:
    slot = torch.arange(64)
    module.breaches(slot, slot, slot, torch.ones(64), 64)


def nearest(module: Any, measure: str) -> None:
    module.nearest(torch.empty(64, 3584, dtype=torch.bfloat16), torch.empty(188, 3584, dtype=torch.bfloat16), measure)


def density_clusters(module: Any) -> None:
    module.density_clusters(torch.empty(196, 3584, dtype=torch.bfloat16), 20, 7)


def retention_pool(module: Any, dtype: torch.dtype) -> None:
    module.retention_pool(torch.empty(5000, 3584, dtype=dtype), torch.arange(5000), 0.8, 600)


def spectral_entropies(module: Any, dtype: torch.dtype) -> None:
    flat, group = torch.empty(256, 3584, dtype=dtype), [(0, 128), (1, 128)]
    module.rows_of(flat, [(0, 128), (128, 100)])
    module.finish(torch.eye(128, dtype=torch.float64).expand(2, -1, -1).contiguous(), group, torch.zeros(2).double())


def with_means(module: Any, dtype: torch.dtype) -> None:
    module.with_means(torch.empty(8, 196, 3584, dtype=dtype), torch.zeros(8, 196, dtype=torch.bool), [(0, 8)])


CASES: list[tuple[str, str, Callable[[Any], None]]] = [
    ("density_clusters", "196 tokens", density_clusters),
    ("density_peaks", "bf16, k = 7", lambda m: row_with_peaks(m, torch.bfloat16, 7)),
    ("density_peaks", "bf16, k = 20", lambda m: row_with_peaks(m, torch.bfloat16, 20, "strict")),
    ("density_peaks", "fp32, k = 7", lambda m: row_with_peaks(m, torch.float32, 7)),
    ("density_peaks", "bf16, around a leader", around_a_leader),
    ("density_peaks", "frames in bf16", lambda m: frames_with_peaks(m, torch.bfloat16)),
    ("density_peaks", "frames in fp32", lambda m: frames_with_peaks(m, torch.float32)),
    ("density_peaks", "frames of 729, noisy", lambda m: frames_with_peaks(m, torch.bfloat16, 729)),
    ("density_peaks", "frames of 2048, noisy", lambda m: frames_with_peaks(m, torch.bfloat16, 2048)),
    ("anchor_merge", "bf16, 24 anchors", lambda m: anchor_merge(m, torch.bfloat16, 24)),
    ("anchor_merge", "fp32, 90 anchors", lambda m: anchor_merge(m, torch.float32, 90)),
    ("merge", "bf16", lambda m: merge(m, torch.bfloat16)),
    ("merge", "fp32", lambda m: merge(m, torch.float32)),
    ("top_tokens", "196 positions", lambda m: m.top_tokens(torch.empty(32, 196), torch.zeros(32, dtype=torch.long))),
    ("top_tokens", "4096 positions", lambda m: m.top_tokens(torch.empty(1, 4096), 9)),
    ("column_mean_attention", "bf16, d = 72", lambda m: column_mean_attention(m, torch.bfloat16, 72)),
    ("column_mean_attention", "bf16, d = 128", lambda m: column_mean_attention(m, torch.bfloat16, 128)),
    ("column_mean_attention", "fp32, d = 72", lambda m: column_mean_attention(m, torch.float32, 72)),
    ("cosine_fingerprint", "bf16, 16 frames", lambda m: m.cosine_fingerprint(frames(16, torch.bfloat16))),
    ("cosine_fingerprint", "bf16, 32 frames", lambda m: m.cosine_fingerprint(frames(32, torch.bfloat16))),
    ("cosine_fingerprint", "fp32, 32 frames", lambda m: m.cosine_fingerprint(frames(32, torch.float32))),
    ("dpp_map", "196 tokens", lambda m: dpp_map(m, 196)),
    ("dpp_map", "1568 tokens", lambda m: dpp_map(m, 1568)),
    ("dpp_map", "4096 tokens", lambda m: dpp_map(m, 4096)),
    ("breaches", "64 triplets", breaches),
    ("through_means", "64 triplets", through_means),
    ("nearest", "bf16, euclidean", lambda m: nearest(m, "euclidean")),
    ("nearest", "bf16, cosine", lambda m: nearest(m, "cosine")),
    ("retention_pool", "bf16", lambda m: retention_pool(m, torch.bfloat16)),
    ("retention_pool", "fp32", lambda m: retention_pool(m, torch.float32)),
    ("places", "32 frames", lambda m: m.places(torch.ones(32, 196, dtype=torch.bool), [196] * 32)),
    ("spectral_entropies", "bf16", lambda m: spectral_entropies(m, torch.bfloat16)),
    ("with_means", "bf16", lambda m: with_means(m, torch.bfloat16)),
    ("select_in_turn", "196 positions", lambda m: select_in_turn(m, 196)),
    ("select_in_turn", "729 positions", lambda m: select_in_turn(m, 729)),
]


def reports() -> list[Report]:
    """Of every kernel, by calling what launches it and compiling instead."""
    out: list[Report] = []
    modules: list[Any] = [importlib.import_module(f"vidcompress.ops.{op}.kernel") for op, _, _ in CASES]
    launching: list[Any] = [m for name, m in sys.modules.items() if re.match(r"vidcompress\.ops\.\w+\.kernel", name)]
    with contextlib.ExitStack() as stack:
        # What no kernel has written is read by the host.
        stack.enter_context(patch.object(torch, "empty", torch.zeros))
        for (op, what, call), module in zip(CASES, modules, strict=True):

            def record(
                kernel: Any, grid: Any, *arguments: Any, case: tuple[str, str] = (op, what), **constants: Any
            ) -> None:
                if kernel.fn.__module__.startswith(f"vidcompress.ops.{case[0]}.kernel"):
                    out.append(compiled(", ".join(case), kernel, arguments, constants))

            for launcher in launching:
                if hasattr(launcher, "launch"):
                    stack.enter_context(patch.object(launcher, "launch", record))
            call(module)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE", help="write the figures to this file too")
    options = parser.parse_args()
    rows = reports()
    print(f"triton {triton.__version__}, sm_90")
    print(f"{'case':38} {'kernel':14} {'warps':>5} {'regs':>5} {'spills':>6} {'shared':>7} products cp.async")
    for r in rows:
        overlap = "yes" if r.asynchronous else "no"
        print(
            f"{r.case:38} {r.kernel:14} {r.warps:5} {r.registers:5} {r.spills:6} {r.shared:7} {r.products:8} {overlap}"
        )
    if options.json:
        Path(options.json).write_text(json.dumps([asdict(r) for r in rows], indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
