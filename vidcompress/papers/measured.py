"""What lmms-eval wrote of runs with `--model vidcompress --log_samples`: scores, and what every answer took."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vidcompress.integrations.settings import SCHEMA
from vidcompress.papers.columns import Column

Sample = dict[str, Any]


@dataclass(frozen=True)
class Measured:
    """One task of one run.

    Attributes:
        path: the results file.
        date: as its name begins, which sorts by time.
        task: of lmms-eval.
        facts: how it was run: checkpoint, methods with all settings, frames, versions.
        metrics: lmms-eval's, by name.
        samples: its answers: the document, scores and `cost`.
        asked, available: questions asked, and those the task has.
    """

    path: Path
    date: str
    task: str
    facts: dict[str, Any]
    metrics: dict[str, float]
    samples: list[Sample]
    asked: int
    available: int

    def score(self, column: Column) -> float | None:
        """In the units of the column; None if this task does not tell."""
        if column.duration is None:
            value = self.metrics.get(column.metric)
            return None if value is None else value * column.scale
        own = [sample.get(column.metric) for sample in self.samples]
        rights = [entry["score"] for entry in own if isinstance(entry, dict) and entry["duration"] == column.duration]
        return 100 * statistics.fmean(rights) if rights else None


def read_results(folder: Path) -> tuple[list[Measured], list[str]]:
    """Every run below a folder, oldest first, and what was left out and why.

    Raises:
        ValueError: no such folder, nothing in it that vidcompress's model wrote, no samples beside results, or a
            schema other than this version's.
    """
    if not folder.is_dir():
        raise ValueError(f"--results {folder}: there is no such folder")
    files = sorted(folder.rglob("*_results.json"), key=lambda path: (path.name, str(path)))
    found: list[Measured] = []
    left_out: list[str] = []
    for path in files:
        content = _json(path)
        model = content.get("config", {}).get("model")
        if model != "vidcompress":
            left_out.append(f"{path}: of the model {model!r}")
            continue
        found += _run(path, content)
    if not found:
        seen = f" (left out: {'; '.join(left_out)})" if left_out else ""
        raise ValueError(
            f"--results {folder}: no results of lmms-eval with --model vidcompress below it{seen}; an evaluation that "
            "crashed leaves none, though lmms-eval ends with exit code 0"
        )
    return found, left_out


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON, perhaps cut off: {error}") from error
    if not isinstance(content, dict) or "results" not in content:
        raise ValueError(f"{path} is no results file of lmms-eval: it has no 'results'")
    return content


def _run(path: Path, content: dict[str, Any]) -> Iterable[Measured]:
    date = path.name.removesuffix("_results.json")
    for task, counts in content["n-samples"].items():
        beside = path.with_name(f"{date}_samples_{task}.jsonl")
        if not beside.exists():
            raise ValueError(f"{path} has no {beside.name} beside it; run lmms-eval with --log_samples")
        samples = [_sample(beside, number, line) for number, line in enumerate(beside.open(encoding="utf-8"), 1)]
        if not samples:
            raise ValueError(f"{beside} holds no answers")
        values = content["results"].get(task, {}).items()
        metrics = {k.partition(",")[0]: v for k, v in values if isinstance(v, (int, float)) and "stderr" not in k}
        facts = {k: v for k, v in samples[0]["facts"].items() if k != "cost"}
        yield Measured(path, date, task, facts, metrics, samples, int(counts["effective"]), int(counts["original"]))


def _sample(path: Path, number: int, line: str) -> Sample:
    """A line of a samples file, with `facts` of its run and its `cost`."""
    try:
        sample = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{path}, line {number}, is no JSON, perhaps cut off: {error}") from error
    facts = ((sample.get("token_counts") or [None])[0] or {}).get("vidcompress")
    if facts is None:
        raise ValueError(f"{path}, line {number}: nothing of vidcompress; was --use_cache given? it drops the counts")
    if facts.get("schema") != SCHEMA:
        raise ValueError(
            f"{path}, line {number}: schema {facts.get('schema')!r}, this version reads {SCHEMA}; it was written by "
            f"vidcompress {facts.get('versions', {}).get('vidcompress', 'unknown')}"
        )
    return sample | {"facts": facts, "cost": facts["cost"]}


def means(samples: list[Sample]) -> dict[str, float | None]:
    """What answers took, on average: frames, pixels a frame, video tokens; and the cost columns of the tables.

    Times are None unless every answer was given alone, because a batch's are those of all its rows.
    """
    costs = [sample["cost"] for sample in samples]
    frames = sum(cost["frames"] for cost in costs)
    found: dict[str, float | None] = {
        "frames": frames / len(costs),
        "pixels": sum(cost["pixels"] for cost in costs) / frames if frames else None,
        "tokens_before": statistics.fmean(cost["tokens_before"] for cost in costs),
        "tokens_after": statistics.fmean(cost["tokens_after"] for cost in costs),
    }
    sums = {
        "process_ms": ("compression_ms",),
        "prefill_ms": ("prefill_ms",),
        "llm_prefill_ms": ("compression_ms", "prefill_ms"),
        "llm_generate_ms": ("compression_ms", "prefill_ms", "generation_ms"),
        "first_token_ms": ("vision_ms", "compression_ms", "prefill_ms"),
    }
    alone = all(cost["batch"] == 1 for cost in costs)
    for name, parts in sums.items():
        found[name] = statistics.fmean(sum(cost[part] for part in parts) for cost in costs) if alone else None
    later = sum(cost["new_tokens"] - 1 for cost in costs)
    seconds = sum(cost["generation_ms"] for cost in costs if cost["new_tokens"] > 1) / 1e3
    found["tokens_per_second"] = later / seconds if alone and later and seconds else None
    return found
