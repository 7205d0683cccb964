"""What hangs on how the tiny model was trained: the same methods asked of models of several seeds, trained alike."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from itertools import combinations, product

from vidcompress.eval.results import Results
from vidcompress.eval.tables import ratios
from vidcompress.tables import Rows

Trainings = Mapping[str, Sequence[Results]]
"""The results of several seeds, by how they were trained."""


def common_types(trainings: Trainings) -> list[str]:
    """The types that count for every model."""
    every = [results for seeds in trainings.values() for results in seeds]
    return [kind for kind in dict.fromkeys(every[0].types) if all(kind in results.counted() for results in every)]


def plain_rows(trainings: Trainings) -> Rows:
    """(header, rows): a row a training, a column a type: the mean over the seeds without compression, and their
    standard deviation, in per cent."""
    types = list(dict.fromkeys(next(iter(trainings.values()))[0].types))
    rows: list[tuple[str, ...]] = []
    for name, seeds in trainings.items():
        rows.append((name, *(_spread(_shares(seeds, "none", 1.0, [kind])) for kind in types)))
    return ("training", *types), rows


def method_rows(trainings: Trainings, ratio: float, types: Mapping[str, Sequence[str]]) -> Rows:
    """(header, rows): a row a method, the best of the first training first; for each set of types, by name, a column a
    training: the mean over the seeds and their standard deviation, in per cent."""
    first, mine = next(iter(trainings.values())), next(iter(types.values()))
    rows: list[tuple[str, ...]] = []
    for method in sorted(_methods(trainings), key=lambda m: -statistics.fmean(_shares(first, m, ratio, mine))):
        cells = [_spread(_shares(seeds, method, ratio, own)) for own in types.values() for seeds in trainings.values()]
        rows.append((method, *cells))
    return ("method", *(f"{what}, {name}" for what in types for name in trainings)), rows


def agreement_rows(trainings: Trainings) -> Rows:
    """(header, rows): how alike two models order the methods: the mean of Spearman's rank correlation over the pairs of
    seeds of a training, and over those of two trainings; a column a ratio."""
    types, methods = common_types(trainings), _methods(trainings)
    columns = ratios(next(iter(trainings.values()))[0])
    pairs = {name: list(combinations(seeds, 2)) for name, seeds in trainings.items()}
    for (one, mine), (other, theirs) in combinations(trainings.items(), 2):
        pairs[f"{one} against {other}"] = list(product(mine, theirs))
    rows: list[tuple[str, ...]] = []
    for name, some in pairs.items():
        cells = []
        for ratio in columns:
            scores = [[[_shares([r], m, ratio, types)[0] for m in methods] for r in pair] for pair in some]
            found = [_correlation(*pair) for pair in scores]
            cells.append(f"{statistics.fmean(found):.2f} ({min(found):.2f} to {max(found):.2f})")
        rows.append((name, *cells))
    return ("pairs of models", *(f"{ratio:.0%}" for ratio in columns)), rows


def alike(one: Results, other: Results, ratio: float) -> float:
    """Spearman's rank correlation of the methods that both were asked under at a ratio, each by its counted types."""
    pairs = []
    for run in one.runs:
        twin = other.find(run.method, ratio)
        if run.retention_ratio == ratio and twin is not None:
            pairs.append((one.accuracy(run, one.counted())[0], other.accuracy(twin, other.counted())[0]))
    return _correlation(*zip(*pairs, strict=True))


def _methods(trainings: Trainings) -> list[str]:
    runs = next(iter(trainings.values()))[0].runs
    return list(dict.fromkeys(run.method for run in runs if run.method != "none"))


def _shares(seeds: Sequence[Results], method: str, ratio: float, types: Sequence[str]) -> list[float]:
    """Accuracy of every seed; ValueError if one was not asked."""
    shares = []
    for results in seeds:
        run = results.find(method, ratio)
        if run is None:
            raise ValueError(f"{results.model.get('name')} was not asked under {method} at {ratio:.0%}")
        shares.append(results.accuracy(run, types)[0])
    return shares


def _spread(shares: Sequence[float]) -> str:
    return f"{100 * statistics.fmean(shares):.1f} ±{100 * statistics.stdev(shares):.1f}"


def _correlation(one: Sequence[float], other: Sequence[float]) -> float:
    """Spearman's: that of the ranks, equal values sharing theirs."""

    def ranks(values: Sequence[float]) -> list[float]:
        return [statistics.fmean(i for i, v in enumerate(sorted(values)) if v == value) for value in values]

    return statistics.correlation(ranks(one), ranks(other))
