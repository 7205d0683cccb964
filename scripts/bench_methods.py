"""Times every method on synthetic tokens, interleaved in one run: median and spread of deciding and of merging.

A method with several sites is timed over all of them; the layers in between do nothing here. Signals inside the LLM are
random and are not timed: scripts/bench_inside.py does.

    python scripts/bench_methods.py --grid 32x14x14 --channels 3584 --repeat 5

Tokens are shots of eight frames around a common picture, with noise; saliency is random. Times depend on the data where
a method does (segments, accepted tokens), and on nothing else running; compare the rows of one run with each other.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable

import torch

from vidcompress import Method, Reduction, VideoTokens, load
from vidcompress.engine.saliency import synchronise
from vidcompress.method import list_methods


def synthetic(grid: tuple[int, int, int], channels: int, dtype: torch.dtype, device: torch.device) -> VideoTokens:
    """Tokens of a video in shots of eight frames, and its signals."""
    t, h, w = grid
    draw = torch.Generator().manual_seed(0)
    shot = torch.arange(t) // 8
    picture = torch.randn(-(-t // 8), h * w, channels, generator=draw)
    tokens = picture[shot] + 0.3 * torch.randn(t, h * w, channels, generator=draw)
    mood = torch.randn(-(-t // 8), 1152, generator=draw)
    signals = {
        "frame_features": (mood[shot] + 0.2 * torch.randn(t, 1152, generator=draw)).to(device),
        "saliency.head": torch.rand(t * h * w, generator=draw).to(device),
        "saliency.received": torch.rand(t * h * w, generator=draw).to(device),
    }
    return VideoTokens(tokens.flatten(0, 1).to(device, dtype), grid, None, signals)


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


def timed(work: Callable[[], object], device: torch.device) -> tuple[object, float]:
    """The result and the milliseconds of one call."""
    synchronise(device)
    start = time.perf_counter()
    result = work()
    synchronise(device)
    return result, 1e3 * (time.perf_counter() - start)


def _load(name: str, retention_ratio: float) -> Method:
    """The method at that ratio, or at its default where it cannot go so low (PyramidDrop)."""
    try:
        method = load(name, retention_ratio=retention_ratio)
    except ValueError:
        method = load(name)
    assert isinstance(method, Method)
    return method


def main(arguments: list[str] | None = None) -> list[dict[str, object]]:
    """Prints a table (or JSON) and returns its rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grid", default="32x14x14")
    parser.add_argument("--channels", type=int, default=3584)
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--retention-ratio", type=float, default=0.1)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    t, h, w = (int(side) for side in options.grid.split("x"))
    tokens = synthetic((t, h, w), options.channels, getattr(torch, options.dtype), device)
    methods = {name: _load(name, options.retention_ratio) for name in list_methods()}
    seen: dict[str, list[tuple[float, float]]] = {name: [] for name in methods}
    kept = {}
    for _ in range(options.repeat + 1):  # the first round warms up
        for name, method in methods.items():
            reductions, deciding = timed(lambda method=method: decide(method, tokens), device)
            _, merging = timed(lambda reductions=reductions: merge(reductions, tokens.features), device)
            seen[name].append((deciding, merging))
            kept[name] = [len(reduction) for reduction in reductions]
    rows: list[dict[str, object]] = []
    for name, times in seen.items():
        deciding, merging = ([round(x, 2) for x in column] for column in zip(*times[1:], strict=True))
        spread = f"{min(deciding):.1f} to {max(deciding):.1f}"
        rows.append(
            {"method": name, "kept": kept[name], "decide_ms": statistics.median(deciding), "spread_ms": spread}
            | {"merge_ms": statistics.median(merging)}
        )
    machine = torch.cuda.get_device_name() if device.type == "cuda" else f"{platform.machine()} CPU"
    about = {"grid": options.grid, "channels": options.channels, "dtype": options.dtype, "device": machine}
    about |= {"torch": torch.__version__, "threads": options.threads}
    if options.json:
        print(json.dumps({**about, "rows": rows}, indent=1))
    else:
        print(", ".join(f"{k} {v}" for k, v in about.items()))
        for row in rows:
            print("  ".join(f"{k} {v!s:<16}" for k, v in row.items()))
    return rows


if __name__ == "__main__":
    main()
