"""A compared paper as tables for a terminal or Markdown, and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vidcompress.papers.columns import COLUMNS
from vidcompress.papers.compare import Cell, Line
from vidcompress.papers.measured import Measured
from vidcompress.papers.published import Paper, Table
from vidcompress.tables import Rows

FACTS = ("frames", "pixels a frame", "video tokens", "questions")


def table_rows(table: Table, lines: Sequence[Line]) -> Rows:
    """(header, rows): a cell is what was printed, a slash, and what was measured; both sides may be empty."""
    varied = len({line.row.frames for line in lines}) > 1
    header = ("method", "kept", *(["asked frames"] if varied else []))
    header += (*(COLUMNS[name].title for name in table.columns), *FACTS)
    rows: list[tuple[str, ...]] = []
    for line in lines:
        row = line.row
        cells = (_cell(name, line.cells[name]) for name in table.columns)
        rows.append((row.method, row.kept, *([str(row.frames)] if varied else []), *cells, *_facts(line)))
    return header, rows


def _cell(name: str, cell: Cell) -> str:
    digits = 2 if name == "activitynetqa_score" else 1
    printed = "" if cell.published is None else str(float(cell.published))
    if COLUMNS[name].kind == "printed" or cell.published is cell.measured is None:
        return printed
    return f"{printed} / {'' if cell.measured is None else format(cell.measured, f'.{digits}f')}".strip()


def _facts(line: Line) -> tuple[str, ...]:
    facts = line.facts
    if not facts:
        return "", "", "", ""
    asked, available = line.questions
    pixels = facts["pixels"]
    return (
        f"{facts['frames']:.1f}",
        "" if pixels is None else f"{pixels:.0f}",
        f"{facts['tokens_before']:.0f} to {facts['tokens_after']:.0f}",
        str(asked) if asked == available else f"{asked} of {available}",
    )


def title_of(paper: Paper, table: Table) -> str:
    """Above a table."""
    return f"{paper.name}, Table {table.number}: {table.about} (printed / measured)"


def notes_of(table: Table, lines: Sequence[Line]) -> list[str]:
    """Below a table: the note, what is not here, and what to know of the measured rows."""
    notes = [] if table.note is None else [table.note]
    absent = {line.row.method: line.row.absent for line in lines if line.row.absent}
    notes += [f"{method}: {reason}" for method, reason in absent.items()]
    some = [line for line in lines if line.questions[0] < line.questions[1]]
    notes += [f"{line.row.method} {line.row.kept}: measured on a part of the questions (--limit)" for line in some]
    batched = {line.row.method for line in lines for name, cell in line.cells.items() if _untimed(line, name, cell)}
    notes += [f"{method}: no times, for prompts were answered in batches" for method in sorted(batched)]
    heads = {head for line in lines for head in line.heads}
    notes += [f"SigLIP's pooling head from {head}" for head in sorted(heads)]
    return notes


def _untimed(line: Line, name: str, cell: Cell) -> bool:
    return COLUMNS[name].kind == "cost" and bool(line.facts) and cell.measured is None


def unused(measured: Sequence[Measured], compared: Sequence[tuple[Table, Sequence[Line]]]) -> list[str]:
    """Runs that fill no row of the tables shown: of another model, other settings, frames or tasks, or older."""
    used = {id(run) for _, lines in compared for line in lines for runs in line.sources.values() for run in runs}
    return [f"{run.path}: its {run.task} fills no row shown" for run in measured if id(run) not in used]


def to_dict(paper: Paper, compared: Sequence[tuple[Table, Sequence[Line]]], left_out: Sequence[str]) -> dict[str, Any]:
    """JSON-serialisable: every cell with its two numbers, every row with its settings, runs and costs."""
    return {
        "paper": paper.name,
        "title": paper.title,
        "left_out": list(left_out),
        "tables": [
            {
                "number": table.number,
                "about": table.about,
                "model": table.model,
                "notes": notes_of(table, lines),
                "rows": [_line(line) for line in lines],
            }
            for table, lines in compared
        ],
    }


def _line(line: Line) -> dict[str, Any]:
    runs = [run for group in line.sources.values() for run in group]
    return {
        "method": line.row.method,
        "kept": line.row.kept,
        "frames": line.row.frames,
        "run": line.row.run,
        "absent": line.row.absent,
        "cells": {n: {"published": c.published, "measured": c.measured} for n, c in line.cells.items()},
        "facts": line.facts,
        "questions": {"asked": line.questions[0], "available": line.questions[1]},
        "runs": [{"task": run.task, "file": str(run.path), "asked": run.asked, **run.facts} for run in runs],
        "heads": line.heads,
    }
