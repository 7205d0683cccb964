"""The page: one HTML file with everything inside, which asks nobody for anything."""

from __future__ import annotations

import base64
import importlib.resources
import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import vidcompress
from vidcompress.compat import require
from vidcompress.report.collect import Report, Side
from vidcompress.report.drawing import overlay, runs
from vidcompress.report.frames import frames_of, thumbnails
from vidcompress.report.tokens import FATES, TokenMap
from vidcompress.tables import RESULT
from vidcompress.trace import Prompt, Step

STRIP = 4
"""Frames beside every answer."""


def write_page(report: Report, path: str | os.PathLike) -> int:
    """Writes the page, and returns its size in bytes. OSError if it cannot be written."""
    content = render(report).encode()
    Path(path).write_bytes(content)
    return len(content)


def render(report: Report) -> str:
    """The page as HTML. ImportError if jinja2 or pillow is missing."""
    require("viz", "jinja2", "PIL")
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    folder = importlib.resources.files("vidcompress.report") / "templates"
    page, style, script = ((folder / f"page.{kind}").read_text("utf-8") for kind in ("html.jinja", "css", "js"))
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"count": lambda n: f"{n:,}".replace(",", "\u202f"), "amount": _amount}
    return environment.from_string(page).render(style=Markup(style), script=Markup(script), **_facts(report))


def _facts(report: Report) -> dict[str, Any]:
    """What the template is filled with."""
    grid, pictures = report.sides[0].tokens.grid, thumbnails(report.video)
    rows = [_row(report, frames_of(r, grid, len(report.video.frames))) for r in range(grid[0])]
    field, (_, h, w) = report.field, grid
    w0, h0 = pictures.width, pictures.height
    box = [field.left * w0, field.top * h0, field.width * w0, field.height * h0]
    sides = [_side(side) for side in report.sides]
    lengths = [max(side.record.length_before for side in report.sides), *(max(s["lengths"]) for s in sides)]
    return {
        "report": report,
        "version": vidcompress.__version__,
        "torch": torch.__version__,
        "grid": grid,
        "pictures": pictures,
        "box": box,
        "scale": (box[2] / w, box[3] / h),
        "hatch": max(w0, h0) / 360,
        "rows": rows,
        "strip": sorted({i * len(rows) // STRIP + len(rows) // (2 * STRIP) for i in range(STRIP)}),
        "ticks": _ticks([row["when"] or row["title"] for row in rows]),
        "sides": sides,
        "most_kept": max(int(stage["kept"].max()) for s in sides for stage in s["timeline"]),
        "most_tokens": max(lengths),
        "layers": len(report.sides[0].record.layer_lengths),
        "numbers": _numbers([report.plain, *(side.result for side in report.sides)]),
        "data": _data(report, rows),
    }


def _row(report: Report, frames: range) -> dict[str, Any]:
    """One row of the grid: its frames, what they are called and when they are shown."""
    video = report.video
    numbers = [f + 1 for f in frames]
    title = f"Frame {numbers[0]}" if len(numbers) == 1 else f"Frames {numbers[0]}\u2013{numbers[-1]}"
    when = "" if not video.fps else f"{video.indices[frames[0]] / video.fps:.1f} s"
    return {"title": title, "when": when, "frames": list(frames)}


def _side(side: Side) -> dict[str, Any]:
    tokens, last = side.tokens, len(side.tokens.stages)
    stages = [place_of(step) for step in tokens.stages]
    timeline = [
        {"title": f"kept {stage}", "kept": tokens.counts(i)[:, 0], "spans": _spans(side.record, i, tokens)}
        for i, stage in enumerate(stages, 1)
    ]
    if not timeline:
        timeline = [{"title": "kept: everything", "kept": tokens.counts(0)[:, 0], "spans": None}]
    lengths = side.record.layer_lengths
    return {
        "letter": side.letter,
        "label": side.label,
        "result": side.result,
        "record": side.record,
        "last": last,
        "stages": stages,
        "overlays": [overlay(tokens, row) for row in range(tokens.grid[0])],
        "counts": tokens.counts(last).tolist(),
        "total": dict(zip(FATES, tokens.counts(last).sum(0).tolist(), strict=True)),
        "timeline": timeline,
        "lengths": lengths,
        "runs": runs(lengths),
        "table": _stage_table(side.record, tokens),
    }


def place_of(step: Step) -> str:
    """Where a step acted, in words."""
    return f"at layer {step.site.layer}" if step.site.is_inner else "before the LLM"


def _spans(record: Prompt, stage: int, tokens: TokenMap) -> list[tuple[int, int]] | None:
    """The segments that were in force at a stage: those that its method noted last."""
    step, found = tokens.stages[stage - 1], None
    for seen in record.steps:
        if seen.method == step.method:
            found = seen.spans or found
        if seen is step:
            break
    return found


def _stage_table(record: Prompt, tokens: TokenMap) -> list[dict[str, Any]]:
    """Every recorded step, those that changed nothing included, and how many tokens were merged and dropped in all."""
    rows, done = [], 0
    for step in record.steps:
        done += any(step is stage for stage in tokens.stages)
        _, merged, dropped = tokens.counts(done).sum(0).tolist()
        facts = {"place": place_of(step), "method": step.method, "before": step.before, "after": step.after}
        rows.append({**facts, "merged": merged, "dropped": dropped, "ms": 1e3 * step.seconds})
    return rows


def _numbers(results: Sequence[Any]) -> list[dict[str, Any]]:
    """Every quantity that is shown of a result: its title, its cells, and each cell's share of the largest."""
    rows = []
    for title, name, form in RESULT:
        if name in ("frames", "answer", "decode_ms"):
            continue
        values = [getattr(r, name) for r in results]
        most = max((v for v in values if v is not None), default=0)
        shares = [0.0 if v is None or not most else max(0.0, v / most) for v in values]
        texts = ["\u2013" if v is None else format(v, form.replace("d", ",d")).replace(",", "\u202f") for v in values]
        rows.append({"title": title, "cells": list(zip(texts, shares, strict=True))})
    return rows


def _ticks(names: list[str]) -> list[tuple[int, str]]:
    """A few of the rows to be named under the time line."""
    step = -(-len(names) // 8)
    return [(i, names[i]) for i in range(0, len(names), step)]


def _amount(value: float | None) -> str:
    """A number with three significant digits."""
    return "\u2013" if value is None else f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _data(report: Report, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What the script needs: the fate of every token and the merge maps, packed."""
    grid = report.sides[0].tokens.grid
    wide = grid[0] * grid[1] * grid[2] > 1 << 16
    return {
        "grid": list(grid),
        "field": [getattr(report.field, name) for name in ("left", "top", "width", "height")],
        "rows": [[row["title"], row["when"]] for row in rows],
        "wide": wide,
        "sides": [
            {
                "letter": side.letter,
                "stages": [place_of(step) for step in side.tokens.stages],
                "place": _packed(side.tokens.place.to(torch.uint8)),
                "content": _packed(side.tokens.content.to(torch.uint8)),
                "merges": [[_index(survivor, wide), _index(source, wide), _weights(weight)]
                           for survivor, source, weight in side.tokens.merges],
            }
            for side in report.sides
        ],
    }  # fmt: skip


def _packed(values: Tensor) -> str:
    """Little-endian bytes, deflated, in base64."""
    array = values.numpy()
    return base64.b64encode(zlib.compress(array.astype(array.dtype.newbyteorder("<")).tobytes(), 9)).decode()


def _index(values: Tensor, wide: bool) -> str:
    return _packed(values.to(torch.int32 if wide else torch.uint16))


def _weights(values: Tensor) -> str:
    """bfloat16: the upper halves of float32."""
    return _packed(values.bfloat16().view(torch.int16))
