"""Commands that need no model: what there is, what it keeps, what it costs."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, fields
from typing import Annotated, Any

import typer

from vidcompress.commands.shared import app, load_compression, out, sides_of
from vidcompress.compat import ensure_torchvision
from vidcompress.costs import DECODED, FORMULAS, Estimate, dimensions, estimate
from vidcompress.method import DEPTH, Pipeline
from vidcompress.tables import ABSENT, Rows, backbone_rows, method_rows, rich_table


@app.command("list")
def list_(
    backbones: Annotated[bool, typer.Option("--backbones", help="Models instead of methods.")] = False,
    every: Annotated[bool, typer.Option("--all", help="Also what is not here, and why.")] = False,
) -> None:
    """The methods, or the models they run on."""
    if backbones:
        ensure_torchvision()
    out.print(rich_table(backbone_rows() if backbones else method_rows()))
    if every:
        from vidcompress.patches import REFUSED

        missing = REFUSED if backbones else ABSENT
        out.print(rich_table((("not here", "because"), list(missing.items()))))


@app.command()
def show(
    name: Annotated[str, typer.Argument(help="A method's or preset's name, or a YAML file.")],
    retention_ratio: Annotated[float | None, typer.Option(help="Picks the preset nearest to it.")] = None,
    grid: Annotated[str, typer.Option(help="Frames x rows x columns of video tokens.")] = "32x14x14",
    layers: Annotated[int, typer.Option(min=1, help="Layers of the text decoder.")] = DEPTH,
) -> None:
    """A method's settings, what they mean, and how many tokens it keeps at every site."""
    from vidcompress.config import shipped

    pipeline = Pipeline.of(load_compression(name, retention_ratio))
    sides = sides_of(grid)
    counts, total = pipeline.counts(sides, layers), math.prod(sides)
    for method in pipeline:
        paper = shipped(method.name)
        rows: list[tuple[str, ...]] = [
            (f.name, str(getattr(method, f.name)), f.metadata["doc"]) for f in fields(method)
        ]
        title = f"{method.name}: {paper['paper']['title']}"
        out.print(rich_table((("setting", "value", "meaning"), rows), title))
        needs = ", ".join(sorted(method.needs)) or "nothing"
        out.print(f"acts at {', '.join(map(str, method.sites(layers)))}; needs {needs}")
        if looks := method.looks(layers):
            out.print(f"looks at layers {', '.join(map(str, looks))}, over the whole prompt, before it is reduced")
        if assistant := getattr(method, "assistant", None):
            out.print(f"{assistant} looks at the whole prompt before it is reduced", markup=False)
        for line in paper.get("differs", []):
            out.print(f"differs: {line}")
    bound = "" if all(method.exact for method in pipeline) else "at most "
    for site, count in counts.items():
        out.print(f"{site}: keeps {bound}{count} of {total} tokens of a {grid} video")
    mean = statistics.mean(pipeline.lengths(sides, layers))
    out.print(f"mean over {layers} layers: {bound}{mean:.1f} tokens, {mean / total:.1%}")


@app.command()
def flops(
    model: Annotated[str, typer.Option(help="A name, a checkpoint's folder or a hub id.")] = "llava-onevision-7b",
    frames: Annotated[int | None, typer.Option(help="Frames of the video. Default: the papers'.")] = None,
    grid: Annotated[str | None, typer.Option(help="Frames x rows x columns of video tokens, instead.")] = None,
    compression: Annotated[str | None, typer.Option(help="Method, preset or YAML file.")] = None,
    retention_ratio: Annotated[float | None, typer.Option(help="Fraction of video tokens kept, in (0, 1].")] = None,
    formula: Annotated[str, typer.Option(help="infomerge, unified, hieravid or all.")] = "all",
    text_tokens: Annotated[int, typer.Option(help="Of the prompt; the papers leave them out.")] = 0,
    decode_tokens: Annotated[int, typer.Option(help="Written after the prompt; formula unified only.")] = DECODED,
    per_layer: Annotated[bool, typer.Option("--per-layer", help="Every decoder layer's share too.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """What a video costs a text decoder, by three papers' formulas. Weights are never read."""
    if frames is not None and grid is not None:
        raise ValueError("give --frames or --grid, not both")
    if compression is None and retention_ratio is not None:
        raise ValueError("--retention-ratio needs a --compression")
    chosen = None if compression is None else load_compression(compression, retention_ratio)
    of = dimensions(model)
    sides = of.grid(frames) if grid is None else sides_of(grid)
    names = tuple(FORMULAS) if formula == "all" else (formula,)
    given: dict[str, Any] = {"formulas": names, "text_tokens": text_tokens, "decode_tokens": decode_tokens}
    estimates = [estimate(of, sides, None, **given)]
    if chosen is not None:
        estimates.append(estimate(of, sides, chosen, **given))
    if as_json:
        about = {"model": model, "dimensions": asdict(of), "text_tokens": text_tokens, "decode_tokens": decode_tokens}
        print(json.dumps(about | {"results": [e.to_dict(per_layer) for e in estimates]}, indent=1))
        return
    text = f" and {text_tokens} text tokens" if text_tokens else ""
    out.print(f"{model}: a {'x'.join(map(str, sides))} video{text}", markup=False)
    out.print(rich_table(_token_rows(estimates, per_layer)))
    for name in names:
        decoded = f", {decode_tokens} tokens decoded" if FORMULAS[name].decodes else ""
        out.print(f"TFLOPs by formula {name}{decoded} ({FORMULAS[name].paper}): {FORMULAS[name].counts}")
        out.print(rich_table(_flops_rows(estimates, name, per_layer)))


def _token_rows(estimates: Sequence[Estimate], per_layer: bool) -> Rows:
    """(header, rows): one column an estimate; tokens at every site and in every layer, and the KV cache."""
    plain, last = estimates[0], estimates[-1]
    total = math.prod(plain.grid)
    rows: list[tuple[str, ...]] = [
        (f"kept at {s}", *(str(e.sites.get(s, total)) for e in estimates)) for s in last.sites
    ]
    means = (f"{e.mean_tokens:.1f} ({e.mean_tokens / total:.1%})" for e in estimates)
    rows.append(("video tokens, mean over layers", *means))
    rows.append(("KV cache in bfloat16, MB", *(f"{sum(e.kv_bytes) / 1e6:.2f}" for e in estimates)))
    if any(e.looked_layers for e in estimates):
        rows.append(("layers run over the whole prompt before", *(str(e.looked_layers) for e in estimates)))
    for i in range(len(plain.video_tokens)) if per_layer else ():
        cells = (f"{e.video_tokens[i]} tokens, {e.kv_bytes[i] / 1e6:.2f} MB" for e in estimates)
        rows.append((f"layer {i}", *cells))
    return _columns(estimates), rows


def _flops_rows(estimates: Sequence[Estimate], formula: str, per_layer: bool) -> Rows:
    """(header, rows): one column an estimate, in units of 10^12, and the last one's share of the first."""
    by_layer = list(zip(*(e.flops[formula] for e in estimates), strict=True))
    costs = {"all layers": tuple(map(sum, zip(*by_layer, strict=True)))}
    costs |= {f"layer {i}": layer for i, layer in enumerate(by_layer) if per_layer}
    if any(e.assistant_flops for e in estimates):
        costs["the assistant's first look"] = tuple(e.assistant_flops.get(formula, 0) for e in estimates)
    share = len(estimates) > 1
    header = (*_columns(estimates), *(("ratio",) if share else ()))
    rows: list[tuple[str, ...]] = []
    for title, line in costs.items():
        ratio = (f"{line[-1] / line[0]:.2%}" if line[0] else "-",) if share else ()
        rows.append((title, *(f"{cost / 1e12:.4f}" for cost in line), *ratio))
    return header, rows


def _columns(estimates: Sequence[Estimate]) -> tuple[str, ...]:
    return ("", *(e.compression if e.exact else f"{e.compression} (at most)" for e in estimates))
