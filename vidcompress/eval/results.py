"""What an evaluation found: one JSON file, from which every table is made again, and the statistics in them."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from vidcompress.eval.suites import Clip

SCHEMA = 1
COUNTED = 0.92
"""A type of questions counts where the uncompressed model is right at least this often: of one that it cannot answer,
compression cannot be judged."""


@dataclass
class Run:
    """All questions of a suite, asked under one compression.

    Attributes:
        method: name of the method or preset; "none" without compression.
        retention_ratio: as asked for; 1.0 without compression.
        settings: of every method in it.
        choices: the option chosen for every question, one digit each.
        before, kept, mean_kept: video tokens of a clip, those of the last decoder layer, and the mean over its layers;
            means over the clips.
        compression_ms: of one prompt, the median over the clips.
        seconds: that the whole run took.
    """

    method: str
    retention_ratio: float
    settings: list[dict[str, Any]]
    choices: str
    before: float
    kept: float
    mean_kept: float
    compression_ms: float
    seconds: float


@dataclass
class Results:
    """The runs of one model on one suite.

    Attributes:
        suite: name and fingerprint.
        model: name, `model_type`, dtype and fingerprint.
        setup: versions and machine.
        clips, types, answers: of every question its clip (index), its type and the right option.
    """

    suite: dict[str, Any]
    model: dict[str, Any]
    setup: dict[str, Any]
    clips: list[int]
    types: list[str]
    answers: str
    runs: list[Run] = field(default_factory=list)

    def find(self, method: str, retention_ratio: float) -> Run | None:
        """The run of that method at that ratio, if there is one."""
        return next((r for r in self.runs if (r.method, r.retention_ratio) == (method, retention_ratio)), None)

    def counted(self) -> list[str]:
        """The types that count, in their order: those of which the uncompressed model is right in 92 of a hundred."""
        plain = self.find("none", 1.0)
        names = list(dict.fromkeys(self.types))
        return names if plain is None else [n for n in names if self.accuracy(plain, [n])[0] >= COUNTED]

    def right(self, run: Run) -> list[bool]:
        """Of every question whether it was answered rightly."""
        return [given == answer for given, answer in zip(run.choices, self.answers)]

    def accuracy(self, run: Run, types: Sequence[str]) -> tuple[float, float]:
        """Share of right answers to these types, and its binomial standard error."""
        asked = [ok for ok, kind in zip(self.right(run), self.types) if kind in types]
        if not asked:
            return math.nan, math.nan
        share = sum(asked) / len(asked)
        return share, math.sqrt(share * (1 - share) / len(asked))

    def difference(self, run: Run, other: Run, types: Sequence[str]) -> tuple[float, float]:
        """How much more often `run` is right than `other`, and the standard error of that.

        Questions are paired, and those of one clip are no independent draws: the error is that of a ratio of sums over
        clips (the linearised cluster estimator).
        """
        sums: dict[int, list[float]] = {}
        for mine, theirs, kind, clip in zip(self.right(run), self.right(other), self.types, self.clips):
            if kind in types:
                total = sums.setdefault(clip, [0.0, 0.0])
                total[0] += mine - theirs
                total[1] += 1
        count, clusters = sum(n for _, n in sums.values()), len(sums)
        if clusters < 2:
            return math.nan, math.nan
        mean = sum(d for d, _ in sums.values()) / count
        spread = sum((d - n * mean) ** 2 for d, n in sums.values())
        return mean, math.sqrt(clusters / (clusters - 1) * spread) / count

    def save(self, path: Path) -> None:
        """Writes the file whole or not at all."""
        write_whole(path, self.to_json() + "\n")

    def to_json(self) -> str:
        """The file's text: a line a field and a line a run."""
        head = {k: v for k, v in vars(self).items() if k != "runs"}
        lines = [f'"{name}": {json.dumps(value)}' for name, value in ({"schema": SCHEMA} | head).items()]
        runs = ",\n".join(json.dumps(asdict(run)) for run in self.runs)
        return "{" + ",\n".join([*lines, f'"runs": [\n{runs}\n]']) + "}"

    @classmethod
    def load(cls, path: Path) -> Results:
        """Reads a file that `save` wrote.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it is no results file, or one of another schema.
        """
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            schema = found.pop("schema")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is no results file of vidcompress eval ({error!r})") from error
        if schema != SCHEMA:
            raise ValueError(f"{path} has schema {schema}; this version of vidcompress reads schema {SCHEMA}")
        return cls(**found | {"runs": [Run(**run) for run in found["runs"]]})

    def continues(self, other: Results, path: Path) -> None:
        """ValueError unless runs of `other` may join these: the same suite and the same model."""
        for what, mine, theirs in (("suite", self.suite, other.suite), ("model", self.model, other.model)):
            if mine != theirs:
                raise ValueError(
                    f"{path} holds results of another {what} ({mine}, and now {theirs}); name another file"
                )


def empty_results(suite: str, clips: Sequence[Clip], model: nn.Module, name: str, setup: dict[str, Any]) -> Results:
    """No runs yet."""
    asked = [(i, question) for i, clip in enumerate(clips) for question in clip.questions]
    return Results(
        suite={"name": suite, "clips": len(clips), "questions": len(asked), "fingerprint": _of_suite(clips)},
        model={
            "name": name,
            "model_type": model.config.model_type,  # type: ignore[union-attr]
            "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
            "fingerprint": _of_model(model),
        },
        setup=setup,
        clips=[i for i, _ in asked],
        types=[question.type for _, question in asked],
        answers="".join(str(question.options.index(question.answer)) for _, question in asked),
    )


def write_whole(path: Path, text: str) -> None:
    """Writes a file whole or not at all, and makes its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def _of_suite(clips: Sequence[Clip]) -> str:
    digest = hashlib.sha256()
    for clip in clips:
        digest.update(clip.frames.tobytes())
        digest.update(repr(clip.questions).encode())
    return digest.hexdigest()[:16]


def _of_model(model: nn.Module) -> str:
    """Of names, shapes and up to 256 values of every parameter, so that large models take no time."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        flat = parameter.detach().flatten()
        sample = flat[:: max(1, len(flat) // 256)].float().cpu()
        digest.update(f"{name}{tuple(parameter.shape)}".encode() + sample.numpy().tobytes())
    return digest.hexdigest()[:16]
