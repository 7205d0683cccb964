"""The loop of an evaluation: every method at every retention ratio, resumed at the clip where it stopped."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

import vidcompress
from vidcompress.config import load
from vidcompress.eval.asking import Sheet, ask, prepare
from vidcompress.eval.progress import Progress
from vidcompress.eval.results import COUNTED, SCHEMA, Results, Run, empty_results
from vidcompress.eval.suites import load_suite
from vidcompress.method import Pipeline, list_methods
from vidcompress.profiling import machine

RATIOS = (0.3, 0.2, 0.1, 0.05, 0.02)
NONE = "none"


def choose(names: str) -> list[str]:
    """The methods of a comma-separated list; "all" are all but those that take minutes, and those that only act between
    decoding steps, which an answer of one word does not have.

    Raises ValueError for a name that is neither a method nor a preset, or for an empty list.
    """
    if names == "all":
        return [name for name, cls in list_methods().items() if not cls.slow and _acts_on_prompts(name)]
    chosen = [name.strip() for name in names.split(",") if name.strip()]
    if not chosen:
        raise ValueError(f"--methods {names!r} names no method; expected all, or names such as infomerge,fastvid")
    for name in chosen:
        if name != NONE:
            load(name)
    return chosen


def evaluate(
    model: Any,
    processor: Any,
    *,
    name: str,
    suite: str = "tinyqa",
    methods: Sequence[str] = (),
    retention_ratios: Sequence[float] = RATIOS,
    limit: int | None = None,
    out: Path | None = None,
) -> Iterator[tuple[Results, Run]]:
    """Asks a suite's questions without compression and under every method at every ratio.

    Args:
        model: a video-LLM that is not compressed, and its `processor`.
        name: what to call it in the results.
        methods: names of methods or presets.
        retention_ratios: 1.0 asks without compression, once for all methods; a ratio that a method refuses is left out
            of its runs and of the tables, where it shows as a dash.
        limit: the first so many clips only.
        out: results file, written after every run; runs that it holds are not repeated. Beside it, in `<out>.part`, are
            the answers of the run that is being asked: an interrupted one goes on with the next clip. A part of another
            suite, model, method, ratio, setting, schema, version or machine is not taken, and overwritten.

    Yields:
        All results so far and the newest run, after every run.

    Raises:
        ValueError: what `load_suite`, `prepare` or the engine refuse, a ratio outside (0, 1], a model that is
            compressed already, one that can answer no type of question, or a file with results of another suite, model
            or schema.
    """
    if vidcompress.handle_of(model) is not None:
        raise ValueError("the model is compressed already; hand over the plain one, or call handle.remove() first")
    if wrong := [r for r in retention_ratios if not 0 < r <= 1]:
        raise ValueError(f"retention ratio {wrong[0]} is not in (0, 1]")
    clips = load_suite(suite, limit)
    setup = machine() | {"transformers": transformers.__version__, "vidcompress": vidcompress.__version__}
    results = empty_results(suite, clips, model, name, setup)
    if out is not None and out.exists():
        before = Results.load(out)
        before.continues(results, out)
        results = before
    part = None if out is None else out.with_name(out.name + ".part")
    facts = {"schema": SCHEMA, "suite": results.suite, "model": results.model, "setup": setup}
    sheets = prepare(model, processor, clips)
    pairs = [(NONE, 1.0), *((m, r) for m in methods for r in retention_ratios if r < 1 and m != NONE)]
    for method, ratio in pairs:
        if results.find(method, ratio) is None and (compression := _loaded(method, ratio)) is not False:
            settings = [{"method": m.name, **m.settings()} for m in compression or ()]
            run = facts | {"method": method, "retention_ratio": ratio, "settings": settings}
            progress = Progress.load(part, run)
            _ask_rest(model, sheets, compression, progress)
            results.runs.append(_run(progress))
            if out is not None:
                results.save(out)
            progress.forget()
            yield results, results.runs[-1]
        if method == NONE:
            _refuse_guessing(results)


def _refuse_guessing(results: Results) -> None:
    if results.counted():
        return
    plain = results.find(NONE, 1.0)
    assert plain is not None
    share, best = max((results.accuracy(plain, [kind])[0], kind) for kind in set(results.types))
    raise ValueError(
        f"uncompressed, {results.model['name']} is right in {share:.0%} of {best!r}, its best type of question; "
        f"where it does not reach {COUNTED:.0%} compression cannot be judged"
    )


def _acts_on_prompts(name: str) -> bool:
    return not all(site.is_decoding for method in Pipeline.of(load(name)) for site in method.sites())


def _loaded(method: str, ratio: float) -> Any:
    """The method's pipeline; None for no compression; False for a ratio that the method does not go to."""
    if method == NONE:
        return None
    try:
        return Pipeline.of(load(method, retention_ratio=ratio))
    except ValueError as error:
        if "retention_ratio" not in str(error):
            raise
        return False


def _ask_rest(model: Any, sheets: Sequence[Sheet], compression: Pipeline | None, progress: Progress) -> None:
    """Asks about the clips that `progress` lacks."""
    start = time.perf_counter() - progress.seconds
    handle = None if compression is None else vidcompress.apply(model, list(compression))
    try:
        for i in range(len(progress.replies), len(sheets)):
            torch.manual_seed(i)  # what a method draws does not hang on the clips before, which may be of a run before
            reply = ask(model, sheets[i])
            progress.add(reply, time.perf_counter() - start)
    finally:
        if handle is not None:
            handle.remove()


def _run(progress: Progress) -> Run:
    replies = progress.replies
    return Run(
        method=progress.run["method"],
        retention_ratio=progress.run["retention_ratio"],
        settings=progress.run["settings"],
        choices="".join(str(choice) for reply in replies for choice in reply.choices),
        before=statistics.fmean(reply.before for reply in replies),
        kept=statistics.fmean(reply.kept for reply in replies),
        mean_kept=statistics.fmean(reply.mean_kept for reply in replies),
        compression_ms=statistics.median(reply.compression_ms for reply in replies),
        seconds=progress.seconds,
    )
