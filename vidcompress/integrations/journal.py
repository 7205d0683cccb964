"""Answers written down one by one, so that what is interrupted goes on where it stopped."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

RUN = "run.json"


def key_of(*parts: Any) -> str:
    """The same for the same question asked in the same way, in every process and every run."""
    text = json.dumps(parts, sort_keys=True, default=str, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


class Journal:
    """A folder: `run.json` says how the answers came about, `answers-<rank>.jsonl` holds those of one process.

    Every process reads what all wrote before, so that the number of processes may change between runs. A line that an
    interruption cut off is asked again.

    Args:
        folder: made if missing.
        facts: of the run; a folder of a run with other facts is refused.
        rank: of this process.

    Raises:
        ValueError: the folder belongs to another run, or holds a line that is no answer.
        OSError: it cannot be written.
    """

    def __init__(self, folder: str | os.PathLike, facts: dict[str, Any], rank: int = 0) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._claim(json.loads(json.dumps(facts)), rank)
        self.answers: dict[str, dict[str, Any]] = {}
        for path in sorted(self.folder.glob("answers-*.jsonl")):
            self.answers |= {entry["key"]: entry for entry in _entries(path)}
        self._own = self.folder / f"answers-{rank}.jsonl"
        _cut_off_half_a_line(self._own)
        self._file = self._own.open("a", encoding="utf-8")

    def _claim(self, facts: dict[str, Any], rank: int) -> None:
        path = self.folder / RUN
        if not path.exists():
            fresh = path.with_suffix(f".{rank}")  # several processes begin at once, and write the same
            fresh.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
            os.replace(fresh, path)
        there = json.loads(path.read_text(encoding="utf-8"))
        other = sorted(k for k in facts.keys() | there.keys() if facts.get(k) != there.get(k))
        if other:
            pairs = "; ".join(f"{k}: {there.get(k)!r} there, {facts.get(k)!r} now" for k in other)
            raise ValueError(f"{self.folder} records a run with other settings ({pairs}); give another folder")

    def get(self, key: str) -> dict[str, Any] | None:
        """What was written under `key`, now or in an earlier run."""
        return self.answers.get(key)

    def add(self, entries: list[dict[str, Any]]) -> None:
        """Writes answers, each with its `key`, and waits until the disk has them."""
        for entry in entries:
            self.answers[entry["key"]] = entry
        self._file.write("".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries))
        self._file.flush()
        os.fsync(self._file.fileno())

    def drop(self, unwanted: Callable[[dict[str, Any]], bool]) -> None:
        """Forgets entries, those of every process, so that they are asked again. No other process may be writing."""
        self._file.close()
        for path in sorted(self.folder.glob("answers-*.jsonl")):
            kept = [entry for entry in _entries(path) if not unwanted(entry)]
            fresh = path.with_suffix(".fresh")
            fresh.write_text("".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in kept), encoding="utf-8")
            os.replace(fresh, path)
        self.answers = {key: entry for key, entry in self.answers.items() if not unwanted(entry)}
        self._file = self._own.open("a", encoding="utf-8")

    def close(self) -> None:
        """Closes the file of this process."""
        self._file.close()


def _entries(path: Path) -> list[dict[str, Any]]:
    lines = path.read_bytes().split(b"\n")[:-1]  # what follows the last line break was cut off
    found = []
    for number, line in enumerate(lines, 1):
        try:
            entry = json.loads(line)
            found.append(entry | {"key": entry["key"]})
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}, line {number}, is no answer: {line[:80]!r}") from error
    return found


def _cut_off_half_a_line(path: Path) -> None:
    """What is appended next begins a line."""
    if path.exists():
        content = path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole != len(content):
            with path.open("r+b") as file:
                file.truncate(whole)
