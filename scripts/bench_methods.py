"""Times every method on synthetic tokens, rounds interleaved: deciding, merging, memory, launches, and how it scales.

    python scripts/bench_methods.py                                            # 32x14x14x3584, all methods
    python scripts/bench_methods.py --grids 32x14x14,64x13x13,128x14x14,256x14x14 --out bench.json --plot bench.png

A method with several sites is timed over all of them; the layers in between do nothing here. Signals inside the LLM are
random and are not timed: scripts/bench_inside.py does. Tokens are shots of eight frames around a common picture, with
noise; saliency is random. Times depend on the data where a method does (segments, accepted tokens), and on nothing else
running; compare the rows of one run with each other. Launches are counted by the profiler on a GPU; on a CPU they are
the operators that would launch something there (see vidcompress/profiling.py).
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
from functools import partial
from pathlib import Path
from typing import Any

import torch

from vidcompress import Method, Reduction, VideoTokens, load
from vidcompress.method import list_methods
from vidcompress.profiling import count_launches, megabytes, milliseconds

Grid = tuple[int, int, int]


def synthetic(grid: Grid, channels: int, dtype: torch.dtype, device: torch.device) -> VideoTokens:
    """Tokens of a video in shots of eight frames, and its signals."""
    t, h, w = grid
    draw = torch.Generator().manual_seed(0)
    shot = torch.arange(t) // 8
    picture = torch.randn(-(-t // 8), h * w, channels, generator=draw)
    tokens = torch.empty(t, h * w, channels, dtype=dtype)
    for f in range(t):  # a frame at a time: a long video has no room for fp32 copies of all
        tokens[f] = picture[shot[f]] + 0.3 * torch.randn(h * w, channels, generator=draw)
    mood = torch.randn(-(-t // 8), 1152, generator=draw)
    signals = {
        "frame_features": (mood[shot] + 0.2 * torch.randn(t, 1152, generator=draw)).to(device),
        "saliency.head": torch.rand(t * h * w, generator=draw).to(device),
        "saliency.received": torch.rand(t * h * w, generator=draw).to(device),
        "tower_keys": tokens[..., :72].flatten(0, 1).to(device),  # as long as those of SigLIP, and as alike as tokens
    }
    return VideoTokens(tokens.flatten(0, 1).to(device), grid, None, signals)


def decide(method: Method, tokens: VideoTokens) -> list[Reduction]:
    """The method's reductions at all its sites, one after the other."""
    draw, reductions = torch.Generator().manual_seed(1), []
    notes, features, index = {}, tokens.features, torch.arange(len(tokens), device=tokens.features.device)
    entered = len(tokens)
    for site in method.sites():
        signals = dict(tokens.signals)
        if site.is_inner:
            names = method.needs & {"text_attention", "last_query_attention", "last_query_attention.previous"}
            signals = {name: torch.rand(len(index), generator=draw).to(index.device) for name in names}
            signals["text_hidden"], signals["last_text_hidden"] = features[:48], features[-1]
            if "text_attention.heads" in method.needs:
                signals["text_attention.heads"] = torch.rand(28, 48, len(index), generator=draw).to(index.device)
        seen = VideoTokens(features, tokens.grid, index if site.is_inner else None, signals, notes, entered)
        reduction = method.decide(seen, site)
        reductions.append(reduction)
        notes, features, index = {**notes, **reduction.notes}, features[reduction.keep], index[reduction.keep]
        entered = entered if site.is_inner else len(reduction)
    return reductions


def merge(reductions: list[Reduction], features: torch.Tensor) -> torch.Tensor:
    """What is left of the features, merged."""
    for reduction in reductions:
        features = reduction.apply(features)
    return features


def _load(name: str, retention_ratio: float) -> Method:
    """The method at that ratio, or at its default where it cannot go so low (PyramidDrop)."""
    try:
        method = load(name, retention_ratio=retention_ratio)
    except ValueError:
        method = load(name)
    assert isinstance(method, Method)
    return method


def bench(grid: Grid, methods: dict[str, Method], options: Any, device: torch.device) -> list[dict[str, Any]]:
    """One row a method: `--repeat` rounds after one that warms up."""
    tokens = synthetic(grid, options.channels, getattr(torch, options.dtype), device)
    seen: dict[str, list[tuple[float, float]]] = {name: [] for name in methods}
    for round_ in range(options.repeat + 1):
        for name, method in methods.items():
            reductions: list[Reduction] = []
            deciding = milliseconds(partial(_into, reductions, method, tokens), device)
            merging = milliseconds(partial(merge, reductions, tokens.features), device)
            if round_:
                seen[name].append((deciding, merging))
    rows = []
    for name, times in seen.items():
        reductions = decide(methods[name], tokens)
        launches = count_launches(partial(_all, methods[name], tokens), device)
        deciding, merging = ([round(x, 2) for x in column] for column in zip(*times, strict=True))
        memory = megabytes(partial(_all, methods[name], tokens), device)
        rows.append(
            {
                "grid": "x".join(map(str, grid)),
                "method": name,
                "kept": [len(reduction) for reduction in reductions],
                "decide_ms": statistics.median(deciding),
                "spread_ms": f"{min(deciding):.1f} to {max(deciding):.1f}",
                "merge_ms": statistics.median(merging),
                "ms_a_frame": round((statistics.median(deciding) + statistics.median(merging)) / grid[0], 3),
                "mb": None if memory is None else round(memory),
                "launches": launches.kernels,
                "waits": launches.waits,
            }
        )
    return rows


def _into(reductions: list[Reduction], method: Method, tokens: VideoTokens) -> None:
    reductions[:] = decide(method, tokens)


def _all(method: Method, tokens: VideoTokens) -> torch.Tensor:
    return merge(decide(method, tokens), tokens.features)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Milliseconds a frame over frames, a line a method."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    for name in dict.fromkeys(row["method"] for row in rows):
        own = [(int(row["grid"].split("x")[0]), row["ms_a_frame"]) for row in rows if row["method"] == name]
        axes.plot(*zip(*own, strict=True), marker="o", label=name)
    axes.set(xlabel="frames", ylabel="ms a frame, deciding and merging", xscale="log", yscale="log")
    axes.legend(ncols=2, fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    pyplot.close(figure)


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    """Prints a table (or JSON), writes what it is told to, and returns the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grids", default="32x14x14", help="frames x rows x columns, by comma")
    parser.add_argument("--methods", default=",".join(list_methods()))
    parser.add_argument("--channels", type=int, default=3584)
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--retention-ratio", type=float, default=0.1)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--out", type=Path, help="a JSON file")
    parser.add_argument("--plot", type=Path, help="a picture (needs matplotlib)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    methods = {name: _load(name, options.retention_ratio) for name in options.methods.split(",")}
    machine = torch.cuda.get_device_name() if device.type == "cuda" else f"{platform.machine()} CPU"
    about = {"channels": options.channels, "dtype": options.dtype, "device": machine}
    about |= {"torch": torch.__version__, "threads": options.threads}
    rows: list[dict[str, Any]] = []
    for text in options.grids.split(","):
        t, h, w = (int(side) for side in text.split("x"))
        rows += bench((t, h, w), methods, options, device)
    report = json.dumps({**about, "rows": rows}, indent=1)
    if options.json:
        print(report)
    else:
        print(", ".join(f"{k} {v}" for k, v in about.items()))
        for row in rows:
            print("  ".join(f"{k} {v!s:<16}" for k, v in row.items()))
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(report + "\n")
    if options.plot:
        plot(rows, options.plot)
    return rows


if __name__ == "__main__":
    main()
