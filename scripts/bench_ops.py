"""Times every op that has a fast implementation: naive, torch and (on a GPU) kernel, interleaved, with memory.

    python scripts/bench_ops.py                                     # 8x14x14x1024: a size the definitions can do
    python scripts/bench_ops.py --grid 32x14x14 --channels 3584 --implementations torch,kernel --out ops.json

Milliseconds are the median of `--repeat` rounds after one that warms up, megabytes the most beyond the inputs. Tokens
are shots of eight frames, as in `vidcompress bench`. The definitions are written to be read: bench_inside.py compares
with what a straightforward port of the papers would do.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import importlib.util
import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vidcompress.bench import synthetic
from vidcompress.profiling import count_launches, device_at_hand, machine, megabytes, milliseconds, save

IMPLEMENTATIONS = ("naive", "torch", "kernel")


def arguments(x: Tensor) -> dict[str, tuple[Any, ...]]:
    """What every op is called with, from tokens [T, P, C]: about a tenth of them is kept."""
    (t, p, _), device = x.shape, x.device
    draw = torch.Generator().manual_seed(1)
    n, flat, segment = t * p, x.flatten(0, 1), min(8, t)

    def rand(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=draw).to(device)

    anchors = rand(t, p).argsort(1) < max(1, p // 25)
    anchors &= (torch.arange(t, device=device) % 4 == 3)[:, None]
    counts = anchors.sum(1).tolist()
    reach = [(f - f % 8, min(t, f - f % 8 + 8)) for f in range(t)]
    keep = rand(n).argsort()[: max(1, n // 10)].sort().values
    slot = torch.randint(len(keep), (n,), generator=draw).to(device)
    weight = 1 / slot.bincount(minlength=len(keep))[slot].float()
    query, key = (torch.randn(4, 16, 729, 72, generator=draw).to(device) for _ in range(2))
    heads, keys = torch.randn(28, 50, 128, generator=draw), torch.randn(4, n + 50, 128, generator=draw)
    spans, still = [(f, min(t, f + 8)) for f in range(0, t, 8)], rand(t, p) < 0.05
    merged = (slot, torch.arange(n, device=device), weight)
    return {
        "anchor_merge": (x, ~anchors, anchors, counts, reach, 0.6),
        "bipartite_match": (flat, n // 4),
        "breaches": (keep, *merged, n),
        "column_mean_attention": (query, key, 72**-0.5),
        "components": (x[0], 0.7),
        "compose": ((torch.arange(n, device=device), *merged), (keep, *merged), n),
        "cosine_fingerprint": (x[:segment],),
        "cosine_fingerprints": (x, spans),
        "density_clusters": (flat, max(1, n // 30), 7),
        "density_peaks": (x, rand(t, p) > 0.1, 4),
        "density_peaks, global": (flat[None], torch.ones(1, n, dtype=torch.bool, device=device), 7),
        "dpp_map": (flat[: segment * p], rand(segment * p).log(), [segment * p], [max(1, segment * p // 10)]),
        "farthest_points": (flat[: segment * p], max(1, segment * p // 10)),
        "merge": (flat, keep, slot, torch.arange(n, device=device), weight),
        "nearest": (flat, flat[keep], "euclidean"),
        "places": (anchors, counts),
        "retention_pool": (flat, rand(n).argsort(), 0.7, max(1, n // 10)),
        "select_in_turn": (
            rand(t, p),
            (0.1, 0.0),
            spans,
            rand(len(spans), p) < 0.1,
            torch.full((t,), max(1, p // 20)),
        ),
        "spectral_entropies": (x, spans),
        "spectral_entropy": (flat[: segment * p],),
        "text_attention": (
            heads.to(device),
            keys.to(device),
            128**-0.5,
            n + torch.arange(50, device=device),
            torch.arange(n, device=device),
        ),
        "through_means": (*merged, 0, still, spans, torch.zeros((), dtype=torch.long, device=device)),
        "top_tokens": (rand(t, p), torch.full((t,), max(1, p // 10))),
        "window_change": (x[:segment],),
        "with_means": (x, still, spans),
    }


def implementations(op: str, wanted: list[str]) -> dict[str, Callable[..., Any]]:
    """Those of an op that exist, by name."""
    found = {}
    for name in wanted:
        module = f"vidcompress.ops.{op}.{name}"
        if importlib.util.find_spec(module) and (name != "kernel" or _has_kernels()):
            found[name] = getattr(importlib.import_module(module), op)
    return found


def _has_kernels() -> bool:
    return torch.cuda.is_available() and importlib.util.find_spec("triton") is not None


def main(given: list[str] | None = None) -> list[dict[str, Any]]:
    """Prints a table (or JSON), writes JSON if told where, and returns the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grid", default="8x14x14", help="frames x rows x columns")
    parser.add_argument("--channels", type=int, default=1024)
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--implementations", default=",".join(IMPLEMENTATIONS))
    parser.add_argument("--ops", help="some of them, by comma")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--out", type=Path, help="a JSON file")
    options = parser.parse_args(given)
    wanted = options.implementations.split(",")
    if not set(wanted) <= set(IMPLEMENTATIONS):
        parser.error(f"--implementations must be some of {', '.join(IMPLEMENTATIONS)}, got {options.implementations}")
    torch.set_num_threads(options.threads)
    device = device_at_hand()
    t, h, w = (int(side) for side in options.grid.split("x"))
    calls = arguments(synthetic((t, h, w), options.channels, getattr(torch, options.dtype), device).frames)
    chosen = options.ops.split(",") if options.ops else list(calls)
    if not set(chosen) <= set(calls):
        parser.error(f"--ops must be some of {', '.join(calls)}, got {options.ops}")
    work = {
        (name, way): functools.partial(run, *calls[name])
        for name in chosen
        for way, run in implementations(name.split(",")[0], wanted).items()
    }
    times: dict[tuple[str, str], list[float]] = {key: [] for key in work}
    for round_ in range(options.repeat + 1):
        for key, run in work.items():
            taken = milliseconds(run, device)
            if round_:
                times[key].append(taken)
    rows = [_row(*key, times[key], times.get((key[0], "naive")), run, device) for key, run in work.items()]
    about = machine() | {"grid": options.grid, "channels": options.channels, "dtype": options.dtype}
    if options.json:
        print(json.dumps({**about, "rows": rows}, indent=1))
    else:
        print(", ".join(f"{k} {v}" for k, v in about.items()))
        for row in rows:
            print("  ".join(f"{k} {v!s:<22}" for k, v in row.items()))
    if options.out:
        save({**about, "rows": rows}, options.out)
    return rows


def _row(
    op: str, way: str, times: list[float], naive: list[float] | None, run: Callable[[], Any], device: torch.device
) -> dict[str, Any]:
    memory = megabytes(run, device)
    launches = count_launches(run, device)
    return {
        "op": op,
        "implementation": way,
        "ms": round(statistics.median(times), 2),
        "spread_ms": f"{min(times):.1f} to {max(times):.1f}",
        "of_naive": None if naive is None else round(statistics.median(times) / statistics.median(naive), 3),
        "mb": None if memory is None or math.isnan(memory) else round(memory),
        "launches": launches.kernels,
        "waits": launches.waits,
    }


if __name__ == "__main__":
    main()
