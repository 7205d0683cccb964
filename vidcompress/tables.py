"""Facts as rows: methods and backbones for `vidcompress list` and the README, results for `run` and `demo`."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from vidcompress.config import load, shipped
from vidcompress.method import Method, Pipeline, list_methods

if TYPE_CHECKING:
    from rich.table import Table

    from vidcompress.measure import Result

Rows = tuple[tuple[str, ...], list[tuple[str, ...]]]

ABSENT = {
    "mmg_vid": "MMG-Vid (arXiv:2508.21044) publishes neither code nor its equations; it is not guessed at",
}
"""Published methods that are no file of vidcompress/methods, and why."""

DEEPSTACK = 3
"""So many first decoder layers of the published Qwen3-VL models get features of the tower, for all of its tokens."""

RESULT = (
    ("frames", "frames", "d"),
    ("video tokens before", "tokens_before", "d"),
    ("video tokens after", "tokens_after", "d"),
    ("prompt tokens before", "prompt_before", "d"),
    ("prompt tokens after", "prompt_after", "d"),
    ("prompt tokens a layer, mean", "mean_length", ".1f"),
    ("decode video, ms", "decode_ms", ".0f"),
    ("vision, ms", "vision_ms", ".1f"),
    ("compression, ms", "compression_ms", ".1f"),
    ("prefill, ms", "prefill_ms", ".1f"),
    ("generation, ms", "generation_ms", ".1f"),
    ("decoding, tokens/s", "decode_tokens_per_second", ".1f"),
    ("KV cache, MB", "kv_cache_mb", ".2f"),
    ("peak memory, MB", "peak_memory_mb", ".0f"),
    ("answer", "answer", "s"),
)
"""What is shown of a result: title, attribute, format."""


def method_rows() -> Rows:
    """(header, rows): one row a shipped method."""
    header = ("method", "paper", "acts at", "needs", "kept of 32x14x14", "backbones")
    rows: list[tuple[str, ...]] = []
    for name in list_methods():
        method, paper = load(name), shipped(name)["paper"]
        assert isinstance(method, Method)
        source = f"arXiv:{paper['arxiv']}" if "arxiv" in paper else paper["title"]
        needs = ", ".join(sorted(method.needs)) or "nothing"
        counts = Pipeline.of(method).counts((32, 14, 14))
        bound = "" if method.exact else "at most "
        kept = f"{bound}{listed(counts.values())} at {method.retention_ratio:g}"
        early = any(0 <= site.layer < DEEPSTACK for site in counts)
        rows.append((name, source, listed(counts), needs, kept, "all but qwen3_vl" if early else "all"))
    return header, rows


def listed(items: Iterable[object]) -> str:
    """A few of them one by one, of many the first and the last."""
    words = [str(item) for item in items]
    return ", ".join(words) if len(words) < 6 else f"{words[0]} to {words[-1]}"


def backbone_rows() -> Rows:
    """(header, rows): one row a supported `model_type`."""
    from vidcompress.patches import backbones

    header = ("model_type", "what it is", "signals")
    rows: list[tuple[str, ...]] = []
    for kind, cls in backbones().items():
        about = (sys.modules[cls.__module__].__doc__ or "").splitlines()[0]
        rows.append((kind, about, ", ".join(sorted(cls.provides))))
    return header, rows


def result_rows(results: Sequence[Result]) -> Rows:
    """(header, rows): one column a result, one row a quantity."""
    header = ("", *(r.compression for r in results))
    cells = [(title, [getattr(r, name) for r in results], form) for title, name, form in RESULT]
    return header, [(title, *("-" if v is None else format(v, form) for v in values)) for title, values, form in cells]


def rich_table(rows: Rows, title: str | None = None) -> Table:
    """The rows for a terminal: nothing in them is taken for markup, and long words are broken, not cut."""
    from rich.table import Table
    from rich.text import Text

    header, body = rows
    table = Table(title=title)
    for name in header:
        table.add_column(name, overflow="fold")
    for line in body:
        table.add_row(*map(Text, line))
    return table


def markdown(rows: Rows) -> str:
    """The rows as a Markdown table."""
    header, body = rows
    lines = [header, tuple("---" for _ in header), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
