"""Commands that ask a model about a video."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Annotated, Any

import typer

from vidcompress.commands.shared import app, decode, err, load_model, loading_options, out
from vidcompress.compat import ensure_torchvision, require
from vidcompress.tables import result_rows, rich_table


@app.command()
def run(
    video: Annotated[str, typer.Argument(help="Path or URL of a video.")],
    prompt: Annotated[str, typer.Argument(help="The question.")],
    model: Annotated[str, typer.Option(help="Checkpoint: folder or hub id.")],
    compression: Annotated[str | None, typer.Option(help="Method; `vidcompress list` shows all.")] = None,
    retention_ratio: Annotated[float | None, typer.Option(help="Fraction of video tokens kept, in (0, 1].")] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file with the method's settings.")] = None,
    siglip_head: Annotated[str | None, typer.Option(help="SigLIP checkpoint: folder, file, hub id, none.")] = None,
    num_frames: Annotated[int | None, typer.Option(help="Frames, evenly spaced. Default: up to 32.")] = None,
    fps: Annotated[float | None, typer.Option(help="Frames a second, instead of --num-frames.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, auto. Default: a GPU if any.")] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    attn: Annotated[str | None, typer.Option(help="sdpa, eager, flash_attention_2.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 64,
    compare: Annotated[bool, typer.Option("--compare", help="Also answer without compression.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    save_trace: Annotated[Path | None, typer.Option(help="Write what was kept as JSON.")] = None,
) -> None:
    """Answer a question about a video, with compressed video tokens."""
    require("video", "av", "torchvision")
    from vidcompress.config import load

    if compression and config:
        raise ValueError("give --compression or --config, not both")
    overrides = {"retention_ratio": retention_ratio, "siglip_head": siglip_head}
    method = load(config or compression or "infomerge", **{k: v for k, v in overrides.items() if v is not None})
    if save_trace is not None and not save_trace.parent.is_dir():
        raise FileNotFoundError(f"--save-trace: there is no folder {save_trace.parent}")
    options = loading_options(device, dtype, attn)
    clip, seconds = decode(video, num_frames, fps)
    network, processor = load_model(model, options)
    from vidcompress.api import apply  # these import transformers, for which load_model prepared torchvision
    from vidcompress.measure import ask

    question = functools.partial(ask, network, processor, clip, prompt, decode_seconds=seconds)
    with apply(network, method) as handle, err.status(f"answering with {handle.compression.name}"):
        if compare:  # neither side is to pay for the first call
            question(max_new_tokens=1)
            handle.trace.clear()
        results = [question(max_new_tokens=max_new_tokens)]
    if compare:
        with err.status("answering without compression"):
            question(max_new_tokens=1)
            results.append(question(max_new_tokens=max_new_tokens))
    if as_json:
        print(json.dumps({"video": clip.to_dict(), "results": [r.to_dict() for r in results]}, indent=1))
    else:
        out.print(rich_table(result_rows(results)))
    if save_trace is not None:
        handle.trace.save(save_trace)


@app.command()
def report(
    video: Annotated[str, typer.Argument(help="Path or URL of a video.")],
    prompt: Annotated[str, typer.Argument(help="The question.")],
    model: Annotated[str | None, typer.Option(help="Checkpoint. Default: the tiny one within.")] = None,
    compression: Annotated[
        str, typer.Option(help="Methods by comma, each with its ratio: infomerge@0.1,infomerge@0.02; or YAML files.")
    ] = "infomerge",
    retention_ratio: Annotated[float | None, typer.Option(help="For methods without @ratio, in (0, 1].")] = None,
    siglip_head: Annotated[str | None, typer.Option(help="SigLIP checkpoint: folder, file, hub id, none.")] = None,
    num_frames: Annotated[int | None, typer.Option(help="Frames, evenly spaced. Default: up to 32.")] = None,
    fps: Annotated[float | None, typer.Option(help="Frames a second, instead of --num-frames.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, auto. Default: a GPU if any.")] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    attn: Annotated[str | None, typer.Option(help="sdpa, eager, flash_attention_2.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 64,
    output: Annotated[Path, typer.Option("--out", help="The page, one HTML file.")] = Path("report.html"),
    picture: Annotated[
        Path | None, typer.Option("--png", help="Also a picture for papers: .png, .webp, .pdf or .svg.")
    ] = None,
) -> None:
    """A page that shows what became of every token, and the answers with and without compression."""
    require("video", "av", "torchvision")
    require("viz", "jinja2", "matplotlib", "PIL")
    from vidcompress.eval import checkpoints
    from vidcompress.report import choose, collect, write_page, write_picture
    from vidcompress.report.output import check_outputs

    choices = choose(compression, retention_ratio, siglip_head)
    check_outputs(output, picture)
    options = loading_options(device, dtype, attn)
    clip, seconds = decode(video, num_frames, fps)
    about: dict[str, Any] = {"decode_seconds": seconds, "max_new_tokens": max_new_tokens}
    if model is None:
        model = str(checkpoints.path())
        about["note"] = "The model is the tiny one that ships: of videos unlike its own it understands nothing."
    network, processor = load_model(model, options)
    found = collect(network, processor, clip, prompt, choices, name=Path(model).name, status=err.status, **about)
    with err.status("drawing"):
        sizes = {output: write_page(found, output)} | ({picture: write_picture(found, picture)} if picture else {})
    for side in found.sides:
        kept = f"{side.result.tokens_after} of {side.result.tokens_before} video tokens"
        out.print(f"{side.letter} {side.label}: {kept}; {side.result.answer!r}", markup=False)
    for path, size in sizes.items():
        out.print(f"{path}: {size / 1e6:.2f} MB", markup=False)


@app.command()
def demo(
    folder: Annotated[Path | None, typer.Option(help="Keep checkpoint and clip in this folder.")] = None,
    retention_ratio: Annotated[float, typer.Option(help="Fraction of video tokens kept.")] = 0.1,
) -> None:
    """A clip and a tiny checkpoint made on the spot, answered with and without compression."""
    require("video", "av", "torchvision")
    ensure_torchvision()
    from vidcompress.demo import run_demo

    run_demo(out, folder, retention_ratio)
