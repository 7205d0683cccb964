"""The model class behind `lmms-eval --model vidcompress`: any backbone, batches, own decoding, any number of processes.

What an answer took travels with it into lmms-eval's samples file (`--log_samples`), for `vidcompress table`.
"""

from __future__ import annotations

import functools
import sys
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from lmms_eval.api.instance import GenerationResult, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models.model_utils.gen_metrics import log_metrics
from tqdm import tqdm

from vidcompress.answering import Question, answer
from vidcompress.compat import ensure_torchvision, require
from vidcompress.integrations.asking import Draft, cut, draft_of, generation_of
from vidcompress.integrations.journal import Journal, key_of
from vidcompress.integrations.processes import Process
from vidcompress.integrations.settings import Settings
from vidcompress.video import Video, load_video

MEANS = ("frames", "pixels", "tokens_before", "tokens_after", "prompt_tokens", "prefill_ms", "compression_ms")


@dataclass
class Counts(TokenCounts):
    """lmms-eval's counts of one answer, and beside them everything else that it took."""

    vidcompress: dict[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """As it is saved with the sample."""
        return super().to_dict() | {"vidcompress": self.vidcompress}


@dataclass(frozen=True)
class Asked:
    """A request of lmms-eval, read."""

    key: str
    where: str
    question: Question
    options: dict[str, Any]
    until: list[str]


class VidCompress(lmms):
    """A compressed video-LLM for lmms-eval. `--model_args` are `Settings`, and settings of the method."""

    is_simple = False

    def __init__(self, **arguments: Any) -> None:
        super().__init__()
        require("video", "av", "torchvision")
        settings = Settings.parse(arguments)
        process = Process.current()
        if settings.device_map is not None and process.world_size > 1:
            raise ValueError(f"device_map={settings.device_map!r}: {process.world_size} processes would share the GPUs")
        self.settings, self.facts = settings, settings.facts()
        self._rank, self._world_size = process.rank, process.world_size
        self._device = torch.device(process.device(settings.device))
        self._answers: dict[str, dict[str, Any]] = {}
        self._load = functools.lru_cache(maxsize=2)(self._decode)  # neighbouring questions share their video
        with _heard(process.world_size):
            self._journal = None if settings.record is None else Journal(settings.record, self.facts, process.rank)
            self._start(settings)

    def _start(self, settings: Settings) -> None:
        ensure_torchvision()
        from accelerate import Accelerator
        from transformers import AutoConfig, AutoProcessor

        import vidcompress
        from vidcompress import patches
        from vidcompress.models import register

        self.accelerator = Accelerator()
        register()
        config = AutoConfig.from_pretrained(settings.pretrained, **settings.hub())
        patches.find(config)  # what cannot be served is refused before its weights are read
        try:
            self.processor = AutoProcessor.from_pretrained(settings.pretrained, **settings.hub())
        except (OSError, ValueError) as error:
            raise ValueError(f"{settings.pretrained} has no processor that can be loaded: {error}") from error
        options = settings.loading(str(self._device))
        self._model = vidcompress.from_pretrained(settings.pretrained, config=config, **options).eval()

    # -- what lmms-eval asks of a model ------------------------------------------------------------------------------
    @property
    def device(self) -> torch.device:
        """Of this process."""
        return self._device

    @property
    def batch_size(self) -> int:
        """Prompts answered together."""
        return self.settings.batch_size

    def loglikelihood(self, requests: Any) -> Any:
        """Refused: no task of videos asks for it."""
        raise NotImplementedError("vidcompress generates answers; take a task with output_type generate_until")

    def generate_until_multi_round(self, requests: Any) -> Any:
        """Refused: rounds that depend on earlier answers."""
        raise NotImplementedError("vidcompress answers one round; take a task with output_type generate_until")

    def generate_until(self, requests: Sequence[Any]) -> list[GenerationResult]:
        """Answers every request, in order.

        An error ends the run: alone by a RuntimeError that names the task and the document, among several processes by
        ending this one.
        """
        with _heard(self.world_size):
            return self._answer_all(requests)

    # -- answering ---------------------------------------------------------------------------------------------------
    def _answer_all(self, requests: Sequence[Any]) -> list[GenerationResult]:
        keys: list[str] = []
        start, fresh = time.perf_counter(), 0
        bar = tqdm(total=len(requests), desc="vidcompress", disable=self.rank != 0)
        for batch in self._batches(requests, keys):
            fresh += len(batch)
            self._keep(batch, self._answer(batch))
            bar.update(len(keys) - bar.n)
        bar.update(len(keys) - bar.n)
        bar.close()
        entries = [self._answers[key] for key in keys]
        self._log(entries, fresh, time.perf_counter() - start)
        return [self._result(entry) for entry in entries]

    def _batches(self, requests: Sequence[Any], keys: list[str]) -> Iterator[list[Asked]]:
        """What is not answered yet, in batches that one call can take; `keys` gets those of all, in order."""
        seen: Counter[str] = Counter()
        for first in range(0, len(requests), self.batch_size):
            groups: dict[Any, list[Asked]] = {}
            for request in requests[first : first + self.batch_size]:
                with _named(request):
                    draft, options, until, key = self._read(request, seen)
                    keys.append(key)
                    if self._known(key):
                        continue
                    question = draft.question(self._video)
                kind = (key_of(options), question.shape)
                group = groups.setdefault(kind, [])
                if key not in [asked.key for asked in group]:
                    group.append(Asked(key, _where(request), question, options, until))
            yield from groups.values()

    def _read(self, request: Any, seen: Counter[str]) -> tuple[Draft, dict[str, Any], list[str], str]:
        _, doc_to_messages, generation, document, task, split = request.args
        draft = draft_of(doc_to_messages(self.task_dict[task][split][document]), self.settings.images_as_video)
        options, until = generation_of(generation or {})
        key = key_of(task, split, document, draft.conversation, options, until)
        # Repeats of a question are questions of their own; what lmms-eval adds to even out the processes is not.
        if not (request.metadata or {}).get("__padding_only__"):
            seen[key] += 1
        return draft, options, until, key_of(key, max(seen[key], 1))

    def _video(self, source: Any) -> Video:
        return self._load(source) if isinstance(source, str) else self._decode(source)

    def _decode(self, source: Any) -> Video:
        return load_video(source, **self.settings.sampling())

    def _known(self, key: str) -> bool:
        entry = None if self._journal is None else self._journal.get(key)
        if entry is not None:
            self._answers[key] = entry
        return key in self._answers

    def _answer(self, batch: list[Asked]) -> list[tuple[str, Any]]:
        with _named(*batch):
            return answer(self._model, self.processor, [asked.question for asked in batch], **batch[0].options)

    def _keep(self, batch: list[Asked], answers: list[tuple[str, Any]]) -> None:
        entries = [
            {"key": asked.key, "where": asked.where, "answer": cut(text, asked.until), "cost": cost.to_dict()}
            for asked, (text, cost) in zip(batch, answers, strict=True)
        ]
        self._answers |= {entry["key"]: entry for entry in entries}
        if self._journal is not None:
            self._journal.add(entries)

    # -- reporting ---------------------------------------------------------------------------------------------------
    def _result(self, entry: dict[str, Any]) -> GenerationResult:
        cost = entry["cost"]
        counts = Counts(
            input_tokens=cost["prompt_tokens"],
            output_tokens=cost["new_tokens"],
            vidcompress=self.facts | {"cost": cost},
        )
        return GenerationResult(text=entry["answer"], token_counts=counts)

    def _log(self, entries: list[dict[str, Any]], fresh: int, seconds: float) -> None:
        """lmms-eval's throughput table, which shows what its first process says."""
        costs = [entry["cost"] for entry in entries]
        if not costs:
            return
        means = {name: sum(cost[name] for cost in costs) / len(costs) for name in MEANS}
        peaks = [cost["peak_memory_mb"] for cost in costs if cost["peak_memory_mb"] is not None]
        written = sum(cost["new_tokens"] for cost in costs)
        log_metrics(
            total_elapsed_time=seconds,
            total_gen_tokens=written,
            avg_speed=written / seconds,
            additional_metrics=means
            | {"peak_memory_mb": max(peaks, default=0.0), "answered_now": fresh, "recorded": len(costs) - fresh},
        )


def _where(request: Any) -> str:
    """A request, or one that was read, for a message."""
    return request.where if isinstance(request, Asked) else f"task {request.args[4]}, document {request.args[3]}"


@contextmanager
def _heard(processes: int) -> Iterator[None]:
    """Among several processes an error ends its own: lmms-eval would catch it, and the others wait for ever."""
    try:
        yield
    except Exception:
        if processes == 1:
            raise
        traceback.print_exc()
        sys.exit(1)


@contextmanager
def _named(*requests: Any) -> Iterator[None]:
    """Errors inside name the documents they are about."""
    try:
        yield
    except Exception as error:
        where = "; ".join(map(_where, requests))
        raise RuntimeError(f"{where}: {type(error).__name__}: {error}") from error
