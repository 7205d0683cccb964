"""The papers' tables, from one YAML a paper: every number with its table and row, and the settings that run it."""

from __future__ import annotations

import functools
import importlib.resources
import json
from dataclasses import dataclass
from typing import Any

from vidcompress.config import load, read_yaml
from vidcompress.integrations.settings import methods_of
from vidcompress.method import did_you_mean
from vidcompress.papers.columns import tasks_of

PAPERS = ("infomerge", "unified", "hieravid")


@dataclass(frozen=True)
class Row:
    """One row of a table.

    Attributes:
        method, kept: as printed; `kept` is A%/B% where A % enter the LLM and B % are left inside.
        frames: of a video; None where the paper does not say.
        published: by column; None for an empty cell.
        run: compression and its settings as `vidcompress.load` takes them, empty for the plain model; None where
            nothing here runs it.
        absent: why nothing does.
    """

    method: str
    kept: str
    frames: int | None
    published: dict[str, float | None]
    run: dict[str, Any] | None
    absent: str | None


@dataclass(frozen=True)
class Table:
    """One table; 2a and 2b are the halves of a table over two models.

    Attributes:
        about: what the table is about.
        model: its name in `vidcompress.costs.MODELS`.
        note: what to know when comparing.
        columns: names in `COLUMNS`, in the paper's order.
        mean: columns of which the paper prints the mean.
    """

    number: str
    about: str
    model: str
    note: str | None
    columns: list[str]
    mean: list[str]
    rows: list[Row]

    @property
    def tasks(self) -> list[str]:
        """Of lmms-eval, that fill the table."""
        return tasks_of([*self.columns, *self.mean])


@dataclass(frozen=True)
class Paper:
    """A paper's tables."""

    name: str
    title: str
    tables: list[Table]


@functools.cache
def paper(name: str) -> Paper:
    """A paper's tables, read once.

    Raises ValueError for an unknown paper, and a YAML that does not hold together.
    """
    if name not in PAPERS:
        raise ValueError(f"unknown paper {name!r}{did_you_mean(name, PAPERS)}; one of: {', '.join(PAPERS)}")
    content = read_yaml(importlib.resources.files("vidcompress.papers") / f"{name}.yaml")
    return Paper(content["name"], content["title"], [_table(given) for given in content["tables"]])


def only(of: Paper, numbers: list[str] | None) -> Paper:
    """A paper with some of its tables; None leaves all. Raises ValueError for a number it does not have."""
    known = [table.number for table in of.tables]
    for number in numbers or []:
        if number not in known:
            raise ValueError(f"{of.name} has no table {number!r} here; it has {', '.join(known)}")
    return of if numbers is None else Paper(of.name, of.title, [t for t in of.tables if t.number in numbers])


def _table(given: dict[str, Any]) -> Table:
    rows = []
    for line in given["rows"]:
        if len(line["published"]) != len(given["columns"]):
            raise ValueError(f"table {given['number']}, {line['method']} {line['kept']}: one number a column is needed")
        rows.append(
            Row(
                method=line["method"],
                kept=line["kept"],
                frames=line.get("frames", given["frames"]),
                published=dict(zip(given["columns"], line["published"], strict=True)),
                run=line.get("run"),
                absent=line.get("absent"),
            )
        )
    names = {key: given[key] for key in ("number", "about", "model", "columns")}
    return Table(note=given.get("note"), mean=given.get("mean", []), rows=rows, **names)


@dataclass(frozen=True)
class Job:
    """One run of lmms-eval, which fills one or more rows.

    Attributes:
        rows: (table, row) that it fills.
        tasks: of lmms-eval.
    """

    model: str
    frames: int
    run: dict[str, Any]
    tasks: list[str]
    rows: list[tuple[Table, Row]]

    @property
    def name(self) -> str:
        """Of its folder: what it runs, in short."""
        settings = [f"{key}-{value}" if key != "compression" else str(value) for key, value in self.run.items()]
        words = [word.removeprefix("retention_ratio-") for word in settings] or ["plain"]
        return "-".join([self.model, f"{self.frames}f", *words])


UNSAID = 32
"""Frames where a paper does not say how many."""


def jobs(of: Paper) -> list[Job]:
    """Every run that fills a row of the paper, each once, in the order of the tables.

    Rows that mean the same settings, however they are written, share a run.
    """
    found: dict[str, Job] = {}
    for table in of.tables:
        for row in table.rows:
            if row.run is None:
                continue
            job = Job(table.model, row.frames or UNSAID, row.run, [], [])
            job = found.setdefault(json.dumps([job.model, job.frames, methods_of_run(row.run)]), job)
            job.rows.append((table, row))
            job.tasks.extend(task for task in table.tasks if task not in job.tasks)
    return list(found.values())


def methods_of_run(run: dict[str, Any]) -> list[dict[str, Any]]:
    """What a row's `run` means: name and every field of every method; empty for the plain model."""
    return json.loads(_methods(json.dumps(run)))


@functools.cache
def _methods(run: str) -> str:
    given = json.loads(run)
    return json.dumps(methods_of(load(given.pop("compression"), **given) if given else None))
