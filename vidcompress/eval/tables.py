"""Results as tables and as a plot."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from vidcompress.eval.results import Results, Run
from vidcompress.tables import Rows

FLOOR = "random"
"""The method that others are compared with, question by question."""


def ratios(results: Results) -> list[float]:
    """The retention ratios below 1 that were asked for, largest first."""
    return sorted({run.retention_ratio for run in results.runs if run.retention_ratio < 1}, reverse=True)


def names(results: Results) -> list[str]:
    """The methods, the best first at 10 %, or at the ratio nearest to it that was asked for; the others last."""
    asked = dict.fromkeys(run.method for run in results.runs if run.method != "none")
    ratio = min(ratios(results), key=lambda ratio: abs(ratio - 0.1), default=0.1)
    runs = {name: results.find(name, ratio) for name in asked}
    shares = {name: -1.0 if run is None else results.accuracy(run, results.counted())[0] for name, run in runs.items()}
    return sorted(asked, key=lambda name: -shares[name])


def accuracy_rows(results: Results) -> Rows:
    """(header, rows): a row a method, a column a ratio: accuracy, its error, and how it differs from `random`."""
    counted, columns = results.counted(), ratios(results)
    rows: list[tuple[str, ...]] = []
    for name in names(results):
        cells = (_cell(results, results.find(name, ratio), ratio, counted) for ratio in columns)
        rows.append((name, *cells))
    return ("method", *(f"{ratio:.0%}" for ratio in columns)), rows


def _cell(results: Results, run: Run | None, ratio: float, types: Sequence[str]) -> str:
    if run is None:
        return "-"
    text = _percent(*results.accuracy(run, types))
    floor = results.find(FLOOR, ratio)
    if floor is None or run is floor:
        return text
    more, paired = results.difference(run, floor, types)
    return f"{text} ({100 * more:+.1f} ±{100 * paired:.1f})"


def _percent(share: float, error: float) -> str:
    return f"{100 * share:.1f} ±{100 * error:.1f}"


def share(results: Results, name: str, ratio: float) -> str:
    """Accuracy of one run over the types that count, and its error, in per cent; a dash if it was not asked."""
    run = results.find(name, ratio)
    return "-" if run is None else _percent(*results.accuracy(run, results.counted()))


def type_rows(results: Results, ratio: float) -> Rows:
    """(header, rows): a row a method, a column a type of question, in per cent; the uncompressed model comes first."""
    types = list(dict.fromkeys(results.types))
    runs = [results.find("none", 1.0), *(results.find(name, ratio) for name in names(results))]
    rows = [(run.method, *(f"{100 * results.accuracy(run, [kind])[0]:.0f}" for kind in types)) for run in runs if run]
    return ("method", *types), rows


def kept_rows(results: Results) -> Rows:
    """(header, rows): a row a method, a column a ratio: tokens that a layer runs over, the mean over layers, and in
    brackets those of the last layer where they are others."""
    columns = ratios(results)
    rows: list[tuple[str, ...]] = []
    for name in names(results):
        runs = [results.find(name, ratio) for ratio in columns]
        rows.append((name, *("-" if run is None else _kept(run) for run in runs)))
    return ("method", *(f"{ratio:.0%}" for ratio in columns)), rows


def _kept(run: Run) -> str:
    mean, last = f"{run.mean_kept:.0f}", f"{run.kept:.0f}"
    return mean if mean == last else f"{mean} ({last})"


def cost_rows(results: Results, ratio: float) -> Rows:
    """(header, rows): a row a method: tokens kept, and what compressing one prompt took."""
    header = ("method", "tokens", "kept by the last layer", "mean over layers", "compression, ms", "run, s")
    rows: list[tuple[str, ...]] = []
    for run in filter(None, (results.find(name, ratio) for name in names(results))):
        counts = (f"{run.before:.0f}", f"{run.kept:.1f}", f"{run.mean_kept:.1f}")
        rows.append((run.method, *counts, f"{run.compression_ms:.1f}", f"{run.seconds:.0f}"))
    return header, rows


def headline(results: Results) -> str:
    """One sentence: what the uncompressed model answers, and what counts."""
    counted = results.counted()
    plain = results.find("none", 1.0)
    if plain is None:
        return "the uncompressed model was not asked"
    share, error = results.accuracy(plain, counted)
    left = [kind for kind in dict.fromkeys(results.types) if kind not in counted]
    text = f"uncompressed {100 * share:.1f} ±{100 * error:.1f} % over {len(counted)} types"
    shares = (f"{kind} {100 * results.accuracy(plain, [kind])[0]:.0f} %" for kind in left)
    return text + (f"; not counted: {', '.join(shares)}" if left else "")


def plot(results: Results, path: Path, methods: Iterable[str] | None = None) -> None:
    """Accuracy over retention, a line a method, and the uncompressed model as a dashed one."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    counted = results.counted()
    figure, axes = pyplot.subplots(figsize=(9, 6), layout="constrained")
    shown = list(methods or names(results))
    styles = ["-", "--", ":", "-."]
    for i, name in enumerate(shown):
        runs = [run for ratio in ratios(results) if (run := results.find(name, ratio)) is not None]
        points = [(100 * r.retention_ratio, 100 * results.accuracy(r, counted)[0]) for r in runs]
        axes.plot(*zip(*points), marker="o", markersize=4, label=name, linestyle=styles[i // 10 % 4])
    plain = results.find("none", 1.0)
    if plain is not None:
        axes.axhline(100 * results.accuracy(plain, counted)[0], color="0.4", linestyle="--", label="uncompressed")
    axes.set(xlabel="video tokens kept, %", ylabel=f"right answers, % ({results.suite['name']})", xscale="log")
    ticks = [100 * ratio for ratio in ratios(results)]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    figure.legend(fontsize="x-small", loc="outside right center")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
