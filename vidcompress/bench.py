"""Every method on the same synthetic tokens, rounds interleaved: time, memory, launches, FLOPs, and how they scale.

A method with several sites is timed over all of them; the layers in between do nothing here. Signals inside the LLM are
random and are not timed (scripts/bench_inside.py does). Tokens are shots of eight frames around a common picture, with
noise; saliency is random. Times depend on the data where a method does (segments, accepted tokens), and on nothing else
running: compare the rows of one run with each other. Launches are counted by the profiler on a GPU; on a CPU they are
the operators that would launch something there (see vidcompress/profiling.py).
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from vidcompress.config import load
from vidcompress.costs import MODELS, estimate
from vidcompress.method import Method, list_methods
from vidcompress.profiling import count_launches, device_at_hand, machine, megabytes, milliseconds
from vidcompress.tokens import CachedTokens, Grid, Reduction, VideoTokens


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
        "first_look": torch.rand(t * h * w, generator=draw).to(device),
        "tower_keys": tokens[..., :72].flatten(0, 1).to(device),  # as long as those of SigLIP, and as alike as tokens
    }
    return VideoTokens(tokens.flatten(0, 1).to(device), grid, None, signals)


def decide(method: Method, tokens: VideoTokens) -> list[Reduction]:
    """The method's reductions at all its sites, one after the other."""
    draw, reductions = torch.Generator().manual_seed(1), []
    notes: dict[str, Any] = {}
    entered, sites, features = len(tokens), [*method.sites()], tokens.features
    index: torch.Tensor | None = None  # all of them
    for site in sites:
        if index is None and (site.is_inner or site.is_decoding):
            index = torch.arange(len(features), device=features.device)
        signals = dict(tokens.signals)
        if site.is_inner and index is not None:
            names = method.needs & {"text_attention", "last_query_attention", "last_query_attention.previous"}
            signals = {name: torch.rand(len(index), generator=draw).to(index.device) for name in names}
            signals["text_hidden"], signals["last_text_hidden"] = features[:48], features[-1]
            if "text_attention.heads" in method.needs:
                signals["text_attention.heads"] = torch.rand(28, 48, len(index), generator=draw).to(index.device)
        if site.is_decoding and index is not None:
            cached = CachedTokens(tokens.grid, index, signals, notes, entered)
            reduction = Reduction(method.retain(cached, site), len(index))
        else:
            seen = VideoTokens(features, tokens.grid, index if site.is_inner else None, signals, notes, entered)
            reduction = method.decide(seen, site)
        reductions.append(reduction)
        if len(reductions) < len(sites):  # the next one sees what this one keeps
            notes, features = {**notes, **reduction.notes}, features[reduction.keep]
            index = reduction.keep if index is None else index[reduction.keep]
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
    except ValueError as error:
        if "retention_ratio must be" not in str(error):
            raise
        method = load(name)
    assert isinstance(method, Method)
    return method


def bench(
    grid: Grid,
    names: list[str] | None = None,
    *,
    retention_ratio: float = 0.1,
    channels: int = 3584,
    dtype: torch.dtype = torch.bfloat16,
    repeat: int = 5,
) -> list[dict[str, Any]]:
    """One row a method, the median of `repeat` rounds after one that warms up, on the GPU if there is one.

    Args:
        grid: (t, h, w) of the video's tokens.
        names: of methods; all but those that take minutes unless given.
        retention_ratio: for all; a method that cannot go so low runs at its default, and its row says what it kept.

    Raises ValueError for an unknown method.
    """
    device = device_at_hand()
    names = [name for name, cls in list_methods().items() if not cls.slow] if names is None else names
    methods = {name: _load(name, retention_ratio) for name in names}
    tokens = synthetic(grid, channels, dtype, device)
    seen: dict[str, list[tuple[float, float]]] = {name: [] for name in methods}
    for round_ in range(repeat + 1):
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
        choosing, moving = ([round(x, 2) for x in column] for column in zip(*times, strict=True))
        memory = megabytes(partial(_all, methods[name], tokens), device)
        rows.append(
            {
                "grid": "x".join(map(str, grid)),
                "method": name,
                "kept": [len(reduction) for reduction in reductions],
                "decide_ms": statistics.median(choosing),
                "spread_ms": f"{min(choosing):.1f} to {max(choosing):.1f}",
                "merge_ms": statistics.median(moving),
                "ms_a_frame": round((statistics.median(choosing) + statistics.median(moving)) / grid[0], 3),
                "of_fastvid": None,
                "mb": None if memory is None else round(memory),
                "launches": launches.kernels,
                "waits": launches.waits,
                "prefill_tflops": _tflops(methods[name], grid),
            }
        )
    for row in rows:
        row["of_fastvid"] = _relative(row, rows)
    return rows


def _relative(row: dict[str, Any], rows: Iterable[dict[str, Any]]) -> float | None:
    """Its time over FastVID's, which every other method is measured by; None if that did not run."""
    mark = next((other["ms_a_frame"] for other in rows if other["method"] == "fastvid"), None)
    return mark and round(row["ms_a_frame"] / mark, 2)


def _tflops(method: Method, grid: Grid) -> float:
    """Of a 7B decoder's prefill of the video alone, by Unified's formula."""
    cost = estimate(MODELS["llava-onevision-7b"], grid, method, formulas=("unified",), decode_tokens=0)
    return round(sum(cost.flops["unified"]) / 1e12, 2)


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


def report(grids: list[Grid], names: list[str] | None = None, **settings: Any) -> dict[str, Any]:
    """`bench` of every grid, and what it ran on: ready for JSON."""
    about = machine() | {name: str(value) for name, value in settings.items()}
    return {**about, "rows": [row for grid in grids for row in bench(grid, names, **settings)]}
