"""The picture for papers and READMEs: a few frames of every compression, and how many tokens each frame keeps."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vidcompress.compat import require
from vidcompress.report.collect import Report, Side
from vidcompress.report.frames import frames_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMATS = (".png", ".webp", ".pdf", ".svg")
"""Endings of the names that a picture can be given."""

FRAMES = 6
"""Most frames that are shown of a video, evenly spaced."""

PIXELS = 420
"""Longest side of a frame."""

KEPT, MERGED, INK, SOFT, SPANS = "#e69f00", "#0072b2", "#17191c", "#5b626b", ("#dfe7ee", "#c8d6e2")


def write_picture(report: Report, path: str | os.PathLike, dpi: int = 160) -> int:
    """Writes the picture, in the format that the name's ending says, and returns its size in bytes.

    Raises ValueError for another ending, ImportError if matplotlib is missing, OSError if it cannot be written.
    """
    path = Path(path)
    if path.suffix.lower() not in FORMATS:
        raise ValueError(f"{path}: a picture ends in {', '.join(FORMATS)}, got {path.suffix or 'no ending'!r}")
    require("viz", "matplotlib", "PIL")
    from matplotlib import rc_context

    with rc_context({"font.family": "DejaVu Sans", "text.parse_math": False, "hatch.linewidth": 0.8}):
        draw(report).savefig(path, dpi=dpi, facecolor="white", format=path.suffix[1:].lower())
    return path.stat().st_size


def draw(report: Report) -> Figure:
    """The matplotlib figure."""
    from matplotlib.figure import Figure

    grid, count = report.sides[0].tokens.grid, len(report.video.frames)
    shown = sorted({(2 * i + 1) * grid[0] // (2 * min(FRAMES, grid[0])) for i in range(min(FRAMES, grid[0]))})
    columns = [(row, frames_of(row, grid, count)[0]) for row in shown]
    height, width = report.video.frames.shape[1:3]
    wide = 9.6 / len(columns)
    tall = min(wide * height / width, 3.2)
    heights = [0.62, *(h for _ in report.sides for h in (0.68, tall, 0.55)), 0.45]
    figure = Figure(figsize=(10, sum(heights) + 0.2))
    outer = figure.add_gridspec(len(heights), 1, height_ratios=heights, left=0.02, right=0.98, top=0.985, bottom=0.02)
    _heading(figure.add_subplot(outer[0]), report)
    most = max(int(s.tokens.counts(len(s.tokens.stages))[:, 0].max()) for s in report.sides)
    for i, side in enumerate(report.sides):
        _title(figure.add_subplot(outer[1 + 3 * i]), report, side)
        strip = outer[2 + 3 * i].subgridspec(1, len(columns), wspace=0.03)
        for place, (row, frame) in enumerate(columns):
            _frame(figure.add_subplot(strip[place]), report, side, row, frame)
        _budgets(figure.add_subplot(outer[3 + 3 * i]), side, most, shown)
    _legend(figure.add_subplot(outer[-1]), report)
    return figure


def _blank(axes: Any) -> Any:
    axes.set_axis_off()
    axes.set(xlim=(0, 1), ylim=(0, 1))
    return axes


def _shortened(text: str, most: int) -> str:
    text = "".join(c if c.isprintable() else "\ufffd" for c in " ".join(text.split()))
    return text if len(text) <= most else f"{text[: most - 1]}\u2026"


def _heading(axes: Any, report: Report) -> None:
    video, grid = report.video, report.sides[0].tokens.grid
    _blank(axes)
    axes.text(0, 0.98, _shortened(report.prompt, 80), fontsize=14, weight="bold", color=INK, va="top")
    sides = " \u00d7 ".join(map(str, grid))
    facts = f"{report.model}, {len(video.frames)} frames, {sides} tokens."
    plain = _shortened(report.plain.answer, 50)
    axes.text(0, 0.2, f"{facts} Without compression: \u201c{plain}\u201d", fontsize=8.5, color=SOFT, va="center")


def _title(axes: Any, report: Report, side: Side) -> None:
    _blank(axes)
    kept, of = int(side.tokens.counts(len(side.tokens.stages))[:, 0].sum()), side.result.tokens_before
    cache = (side.result.kv_cache_mb, report.plain.kv_cache_mb)
    memory = "" if None in cache else f", KV cache {cache[0]:.3g} of {cache[1]:.3g} MB"
    axes.text(0, 0.55, f"{side.letter}  {side.label}", fontsize=11, weight="bold", color=INK, va="center")
    axes.text(1, 0.55, f"{kept:,} of {of:,} tokens{memory}", fontsize=9.5, color=INK, va="center", ha="right")
    answer = _shortened(side.result.answer, 110) or "(an empty answer)"
    axes.text(0, 0.13, f"\u201c{answer}\u201d", fontsize=9, style="italic", color=INK, va="center")


def _frame(axes: Any, report: Report, side: Side, row: int, frame: int) -> None:
    """One frame: dropped tokens faded, merged ones hatched, kept ones as they are, with an outline."""
    from matplotlib.collections import PatchCollection
    from matplotlib.patches import Rectangle
    from PIL import Image

    picture = Image.fromarray(report.video.frames[frame])
    picture.thumbnail((PIXELS, PIXELS), reducing_gap=3)
    pixels = np.asarray(picture, dtype=np.float32) / 255
    high, wide = pixels.shape[:2]
    _, h, w = side.tokens.grid
    field = report.field
    left, top, dx, dy = field.left * wide, field.top * high, field.width * wide / w, field.height * high / h
    y, x = np.mgrid[:high, :wide] + 0.5
    line, column = np.floor((y - top) / dy).astype(int), np.floor((x - left) / dx).astype(int)
    seen = (line >= 0) & (line < h) & (column >= 0) & (column < w)
    fates = side.tokens.fate(len(side.tokens.stages)).view(-1, h, w)[row].numpy()
    fate = np.where(seen, fates[line.clip(0, h - 1), column.clip(0, w - 1)], 3)
    fade = np.array([0, 0.5, 0.84, 0.96], dtype=np.float32)[fate][..., None]
    pixels = pixels * (1 - fade) + fade
    hatched = (fate == 1) & ((x + y) % 11 < 2.2)
    pixels[hatched] = np.array([0, 0x72, 0xB2]) / 255
    axes.imshow(pixels, aspect="auto", interpolation="antialiased")
    boxes = [Rectangle((left + c * dx, top + r * dy), dx, dy) for r, c in np.argwhere(fates == 0)]
    axes.add_collection(PatchCollection(boxes, facecolor="none", edgecolor=KEPT, linewidth=1.0))
    axes.set(xlim=(0, wide), ylim=(high, 0), xticks=[], yticks=[])
    axes.spines[:].set(color="#bab5aa", linewidth=0.5)


def _budgets(axes: Any, side: Side, most: int, shown: list[int]) -> None:
    """Tokens that every frame keeps, over its segments; the frames above are marked."""
    kept = side.tokens.counts(len(side.tokens.stages))[:, 0].tolist()
    spans = next((s.spans for s in reversed(side.tokens.stages) if s.spans is not None), None) or []
    for i, (start, end) in enumerate(spans):
        axes.axvspan(start - 0.5, end - 0.5, color=SPANS[i % 2], linewidth=0)
    axes.bar(range(len(kept)), kept, width=0.8, color=KEPT)
    axes.plot(shown, [-0.12 * most] * len(shown), "^", color=INK, markersize=3.5, clip_on=False)
    axes.set(xlim=(-0.5, len(kept) - 0.5), ylim=(0, 1.08 * max(1, most)), xticks=[])
    axes.set_yticks([most])
    axes.tick_params(axis="y", labelsize=7, length=0, pad=-2, colors=SOFT)
    for label in axes.get_yticklabels():
        label.set(ha="left", va="bottom", bbox={"facecolor": "white", "alpha": 0.6, "linewidth": 0, "pad": 0.5})
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set(color="#bab5aa")


def _legend(axes: Any, report: Report) -> None:
    from matplotlib.patches import Patch

    _blank(axes)
    handles = [
        Patch(facecolor="#b9c2ba", edgecolor=KEPT, linewidth=1.5, label="kept"),
        Patch(facecolor="white", edgecolor=MERGED, hatch="//////", linewidth=0.5, label="merged into kept tokens"),
        Patch(facecolor="#f0eee8", edgecolor="#bab5aa", linewidth=0.5, label="dropped"),
    ]
    axes.legend(handles=handles, loc="lower left", ncols=3, frameon=False, fontsize=8.5, borderaxespad=0)
    bars = "bars: tokens kept of every frame, over the method\u2019s segments; \u25b2 shown above"
    note = f"{report.note}\n{bars}" if report.note else bars
    axes.text(1, 0.02, note, fontsize=7.5, color=SOFT, ha="right", va="bottom")
