"""Writes scripts/reproduce/<paper>.sh from the papers' tables: the command of every row. `make tables` calls it."""

from __future__ import annotations

from pathlib import Path

from vidcompress.costs import MODELS
from vidcompress.papers.published import PAPERS, Job, jobs, paper

FOLDER = Path(__file__).parent / "reproduce"

HEAD = """#!/usr/bin/env bash
# {title}
# Every row that can be run, with the command that runs it; written by scripts/make_reproduce.py. --help says more.
set -euo pipefail
. "$(dirname "${{BASH_SOURCE[0]}}")/run.sh"
"""


def render(name: str) -> str:
    """The script of one paper."""
    of = paper(name)
    blocks = [HEAD.format(title=of.title)]
    absent = [f"# Table {t.number}: {r.method} {r.kept}: {r.absent}" for t in of.tables for r in t.rows if r.absent]
    blocks += ["# Not run:", *dict.fromkeys(absent)] if absent else []
    blocks += [_block(job) for job in jobs(of)]
    return "\n".join(blocks)


def _block(job: Job) -> str:
    rows = [f"# Table {table.number}: {row.method} {row.kept}" for table, row in job.rows]
    settings = ",".join(f"{key}={value}" for key, value in job.run.items())
    hub = MODELS[job.model].hub
    command = f"run {job.name} {hub} {job.frames} \\\n    {','.join(job.tasks)}"
    return "\n".join(["", *dict.fromkeys(rows), f"{command} \\\n    {settings}" if settings else command])


def main() -> None:
    """Writes all."""
    for name in PAPERS:
        (FOLDER / f"{name}.sh").write_text(render(name) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
