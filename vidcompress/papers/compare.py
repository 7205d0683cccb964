"""A paper's tables with what was measured beside what was printed: as rows for a terminal, Markdown and JSON."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from vidcompress.costs import MODELS
from vidcompress.papers.columns import COLUMNS
from vidcompress.papers.measured import Measured, means
from vidcompress.papers.published import Paper, Row, Table, methods_of_run

FREE = frozenset({"siglip_head"})
"""Settings that do not tell runs apart: where a file lies."""


@dataclass(frozen=True)
class Cell:
    """What a paper printed and what was measured; None where there is nothing."""

    published: float | None
    measured: float | None


@dataclass(frozen=True)
class Line:
    """A row with its measurements.

    Attributes:
        cells: by column.
        facts: means over the answers behind the row: frames, pixels a frame, video tokens before and after; empty
            where nothing was measured.
        questions: (asked, available) of all its tasks together.
        sources: the runs behind it, by task.
        heads: where SigLIP's pooling head came from.
    """

    row: Row
    cells: dict[str, Cell]
    facts: dict[str, float | None]
    questions: tuple[int, int]
    sources: dict[str, list[Measured]]
    heads: list[str]


def compare(of: Paper, measured: Sequence[Measured]) -> list[tuple[Table, list[Line]]]:
    """Every table, with the newest run of each task that has the row's model, frames and settings."""
    return [(table, _lines(table, measured)) for table in of.tables]


def _lines(table: Table, measured: Sequence[Measured]) -> list[Line]:
    sources = [_sources(table, row, measured) for row in table.rows]
    averages = [_average(table, found) for found in sources]
    bases = {row.frames: mean for row, mean in zip(table.rows, averages, strict=True) if row.run == {}}
    lines = []
    for row, found, average in zip(table.rows, sources, averages, strict=True):
        base = bases.get(row.frames)
        samples = [sample for runs in found.values() for run in runs for sample in run.samples]
        facts = means(samples) if samples else {}
        values: dict[str, float | None] = {name: _score(name, found) for name in table.columns}
        values |= {name: facts.get(name) for name in table.columns if COLUMNS[name].kind == "cost"}
        values |= {"average": average, "percent": 100 * average / base if average and base else None}
        runs = [run for group in found.values() for run in group]
        lines.append(
            Line(
                row=row,
                cells={name: Cell(row.published[name], values[name]) for name in table.columns},
                facts=facts,
                questions=(sum(run.asked for run in runs), sum(run.available for run in runs)),
                sources=found,
                heads=sorted({str(sample["cost"]["head"]) for sample in samples if sample["cost"]["head"]}),
            )
        )
    return lines


def _sources(table: Table, row: Row, measured: Sequence[Measured]) -> dict[str, list[Measured]]:
    """By task the newest run that is the row's; of a task in parts all of them, or none."""
    own = [run for run in measured if row.run is not None and _is(run, table.model, row.frames, row.run)]
    parts = {column.task: column.parts for column in COLUMNS.values() if column.task}
    found: dict[str, list[Measured]] = {}
    for task in table.tasks:
        if parts[task]:
            newest = {run.task: run for run in own if run.task.startswith(f"{task}_")}  # measured is oldest first
            if len(newest) == parts[task]:
                found[task] = list(newest.values())
        elif same := [run for run in own if run.task == task]:
            found[task] = [same[-1]]
    return found


def _is(run: Measured, model: str, frames: int | None, wanted: dict[str, Any]) -> bool:
    hub = MODELS[model].hub
    assert hub is not None
    return (
        PurePath(str(run.facts["pretrained"])).name.lower() == hub.rpartition("/")[2].lower()
        and run.facts["fps"] is None
        and (frames is None or run.facts["max_num_frames"] == frames)
        and _comparable(run.facts["compression"]) == _comparable(methods_of_run(wanted))
    )


def _comparable(methods: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in method.items() if k not in FREE} for method in methods]


def _score(name: str, found: dict[str, list[Measured]]) -> float | None:
    column = COLUMNS[name]
    if column.task not in found:
        return None
    scores = [run.score(column) for run in found[column.task]]
    known = [score for score in scores if score is not None]
    return statistics.fmean(known) if len(known) == len(scores) else None


def _average(table: Table, found: dict[str, list[Measured]]) -> float | None:
    scores = [_score(name, found) for name in table.mean]
    known = [score for score in scores if score is not None]
    return statistics.fmean(known) if scores and len(known) == len(scores) else None
