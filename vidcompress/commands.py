"""The commands behind `vidcompress.cli`: argument parsing and tables, nothing else."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from vidcompress.compat import ensure_torchvision, require
from vidcompress.costs import DECODED, FORMULAS, Estimate, dimensions, estimate
from vidcompress.method import DEPTH, Pipeline
from vidcompress.tables import ABSENT, Rows, backbone_rows, markdown, method_rows, result_rows, rich_table

app = typer.Typer(
    help="Training-free compression of video tokens in Hugging Face video-LLMs.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
RATIOS = "1.0,.3,.2,.1,.05,.02"
out, err = Console(), Console(stderr=True)


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
    options = _loading_options(device, dtype, attn)
    clip, seconds = _decode(video, num_frames, fps)
    network, processor = _load_model(model, options)
    from vidcompress.api import apply  # these import transformers, for which _load_model prepared torchvision
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
    model: Annotated[str | None, typer.Option(help="Checkpoint: folder or hub id. Default: the demo's.")] = None,
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
    from vidcompress.report import choose, collect, write_page, write_picture
    from vidcompress.report.output import check_outputs

    choices = choose(compression, retention_ratio, siglip_head)
    check_outputs(output, picture)
    options = _loading_options(device, dtype, attn)
    clip, seconds = _decode(video, num_frames, fps)
    about: dict[str, Any] = {"decode_seconds": seconds, "max_new_tokens": max_new_tokens}
    with _demo_checkpoint() if model is None else contextlib.nullcontext(Path(model)) as folder:
        if model is None:
            about |= {"note": "The weights are random: the answers mean nothing; token counts and times are real."}
            choices = choose(compression, retention_ratio, siglip_head or str(folder / "siglip"))
        network, processor = _load_model(model or str(folder), options)
        name = Path(model or folder).name
        found = collect(network, processor, clip, prompt, choices, name=name, status=err.status, **about)
    with err.status("drawing"):
        sizes = {output: write_page(found, output)} | ({picture: write_picture(found, picture)} if picture else {})
    for side in found.sides:
        kept = f"{side.result.tokens_after} of {side.result.tokens_before} video tokens"
        out.print(f"{side.letter} {side.label}: {kept}; {side.result.answer!r}", markup=False)
    for path, size in sizes.items():
        out.print(f"{path}: {size / 1e6:.2f} MB", markup=False)


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

    pipeline = Pipeline.of(_load_compression(name, retention_ratio))
    sides = _sides(grid)
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
    chosen = None if compression is None else _load_compression(compression, retention_ratio)
    of = dimensions(model)
    sides = of.grid(frames) if grid is None else _sides(grid)
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


@app.command()
def bench(
    methods: Annotated[str, typer.Option(help="By comma, or all (but those that take minutes).")] = "all",
    grids: Annotated[str, typer.Option(help="Frames x rows x columns of video tokens; several by comma.")] = "32x14x14",
    retention_ratio: Annotated[float, typer.Option(help="Fraction of video tokens kept, in (0, 1].")] = 0.1,
    channels: Annotated[int, typer.Option(min=1)] = 3584,
    repeat: Annotated[int, typer.Option(min=1, help="Rounds; the median counts.")] = 5,
    threads: Annotated[int, typer.Option(min=1, help="Of the CPU.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    output: Annotated[Path | None, typer.Option("--out", help="A JSON file.")] = None,
    picture: Annotated[Path | None, typer.Option("--plot", help="A picture of ms a frame over frames.")] = None,
) -> None:
    """Times what methods decide and merge, on synthetic tokens: one run, equal counts, memory, launches and FLOPs."""
    import torch

    from vidcompress import bench as benchmark
    from vidcompress.profiling import save

    sides = [_sides(grid) for grid in grids.split(",")]
    names = None if methods == "all" else methods.split(",")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = benchmark.report(sides, names, retention_ratio=retention_ratio, channels=channels, repeat=repeat)
    finally:
        torch.set_num_threads(before)
    if output:
        save(found, output)
    if picture:
        benchmark.plot(found["rows"], picture)
    if as_json:
        print(json.dumps(found, indent=1))
        return
    rows = found.pop("rows")
    header = tuple(rows[0])
    out.print(rich_table((header, [tuple(str(row[name]) for name in header) for row in rows])))
    out.print(", ".join(f"{name} {value}" for name, value in found.items()))


@app.command("eval")
def evaluate(
    suite: Annotated[str, typer.Option(help="What to ask: tinyqa.")] = "tinyqa",
    methods: Annotated[str, typer.Option(help="By comma, or all (but those that take minutes).")] = "all",
    retention: Annotated[str, typer.Option(help="Retention ratios by comma; 1.0 asks without compression.")] = RATIOS,
    model: Annotated[str | None, typer.Option(help="Checkpoint. Default: the tiny LLaVA-OneVision within.")] = None,
    clips: Annotated[int | None, typer.Option(min=1, help="Only the first so many.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, auto. Default: a GPU if any.")] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "float32",
    attn: Annotated[str | None, typer.Option(help="sdpa, eager, flash_attention_2.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Of the CPU.")] = None,
    output: Annotated[Path | None, typer.Option("--out", help="Results, JSON; an interrupted run goes on.")] = None,
    picture: Annotated[Path | None, typer.Option("--plot", help="A picture of accuracy over retention.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the results file.")] = False,
) -> None:
    """Ask a suite's questions under every method and retention ratio: accuracy, its errors, tokens kept, times."""
    require("video", "torchvision")
    if picture:
        require("viz", "matplotlib")
    import torch

    from vidcompress.eval import checkpoints, run, tables

    ratios = _ratios(retention)
    names = run.choose(methods)
    options = _loading_options(device, dtype, attn)
    if threads:
        torch.set_num_threads(threads)
    name = model or str(checkpoints.path("llava_onevision"))
    network, processor = _load_model(name, options)
    asked = run.evaluate(
        network,
        processor,
        name=model or checkpoints.NAMES["llava_onevision"],
        suite=suite,
        methods=names,
        retention_ratios=ratios,
        limit=clips,
        out=output,
    )
    results = None
    with err.status("asking without compression") as status:
        for results, newest in asked:
            status.update(f"{len(results.runs)} runs, the last {newest.method} at {newest.retention_ratio:g}")
    if results is None and output is not None:
        from vidcompress.eval.results import Results

        results = Results.load(output)  # nothing new was asked
    assert results is not None
    if picture:
        tables.plot(results, picture)
    if as_json:
        print(results.to_json())
        return
    out.print(tables.headline(results), markup=False)
    out.print(rich_table(tables.accuracy_rows(results), "right answers, % (and how they differ from random)"))
    for ratio in tables.ratios(results):
        out.print(rich_table(tables.type_rows(results, ratio), f"by type of question, % at {ratio:.0%}"))
        out.print(rich_table(tables.cost_rows(results, ratio), f"cost at {ratio:.0%}"))


@app.command()
def table(
    paper: Annotated[str, typer.Option(help="infomerge, unified or hieravid.")],
    results: Annotated[Path | None, typer.Option(help="Folder of lmms-eval's --output_path, searched through.")] = None,
    only: Annotated[str | None, typer.Option(help="Numbers of tables, by comma, such as 1,S2.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown instead.")] = False,
) -> None:
    """A paper's tables, printed numbers beside those measured with lmms-eval --model vidcompress."""
    from vidcompress.papers import published, show
    from vidcompress.papers.compare import compare
    from vidcompress.papers.measured import read_results

    if as_json and as_markdown:
        raise ValueError("give --json or --markdown, not both")
    chosen = published.only(published.paper(paper), None if only is None else only.split(","))
    measured, left_out = ([], []) if results is None else read_results(results)
    compared = compare(chosen, measured)
    left_out += show.unused(measured, compared)
    if as_json:
        print(json.dumps(show.to_dict(chosen, compared, left_out), indent=1))
        return
    for one, lines in compared:
        rows, title = show.table_rows(one, lines), show.title_of(chosen, one)
        if as_markdown:
            print(f"**{title}**\n\n{markdown(rows)}\n")
        else:
            out.print(rich_table(rows, title))
        for note in show.notes_of(one, lines):
            print(f"- {note}")
    for reason in left_out:
        err.print(f"left out: {reason}", markup=False, soft_wrap=True)


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


@contextlib.contextmanager
def _demo_checkpoint() -> Iterator[Path]:
    """The demo's checkpoint, as long as it is needed."""
    ensure_torchvision()
    from vidcompress.demo import make_checkpoint, quiet

    with tempfile.TemporaryDirectory() as temporary, quiet():
        with err.status("making a tiny checkpoint"):
            folder = make_checkpoint(Path(temporary) / "tiny-llava-onevision")
        yield folder


def _load_compression(name: str, retention_ratio: float | None) -> Any:
    from vidcompress.config import load

    return load(name, **({} if retention_ratio is None else {"retention_ratio": retention_ratio}))


def _ratios(text: str) -> list[float]:
    """The numbers of "1.0,.3,.1"."""
    try:
        return [float(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise ValueError(f"--retention must be numbers in (0, 1] by comma, such as 1.0,.3,.1, got {text!r}") from None


def _sides(grid: str) -> tuple[int, int, int]:
    """(t, h, w) of "32x14x14"."""
    try:
        t, h, w = (int(side) for side in grid.split("x"))
    except ValueError:
        t = h = w = 0
    if min(t, h, w) < 1:
        raise ValueError(f"--grid must look like 32x14x14, all sides at least 1, got {grid!r}")
    return t, h, w


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
    share = len(estimates) > 1
    header = (*_columns(estimates), *(("ratio",) if share else ()))
    rows: list[tuple[str, ...]] = []
    for title, line in costs.items():
        ratio = (f"{line[-1] / line[0]:.2%}",) if share else ()
        rows.append((title, *(f"{cost / 1e12:.4f}" for cost in line), *ratio))
    return header, rows


def _columns(estimates: Sequence[Estimate]) -> tuple[str, ...]:
    return ("", *(e.compression if e.exact else f"{e.compression} (at most)" for e in estimates))


def _decode(video: str, num_frames: int | None, fps: float | None) -> tuple[Any, float]:
    from vidcompress.video import load_video

    start = time.perf_counter()
    with err.status("decoding the video"):
        clip = load_video(video, num_frames=num_frames, fps=fps)
    return clip, time.perf_counter() - start


def _loading_options(device: str | None, dtype: str, attn: str | None) -> dict[str, Any]:
    """What is handed to `from_pretrained`; refused before anything is decoded or loaded."""
    import torch

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"--device {device}: this torch ({torch.__version__}) sees no GPU; use cpu")
    known = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16")}
    if dtype != "auto" and dtype not in known:
        raise ValueError(f"--dtype must be auto, {', '.join(known)}, got {dtype!r}")
    options = {"device_map": device, "dtype": known.get(dtype, dtype)}
    return options if attn is None else {**options, "attn_implementation": attn}


def _load_model(name: str, options: dict[str, Any]) -> tuple[Any, Any]:
    ensure_torchvision()
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

    from vidcompress import patches
    from vidcompress.models import register

    register()
    with err.status(f"loading {name}"):
        config = AutoConfig.from_pretrained(name)
        patches.find(config)  # an unsupported backbone is refused before its weights are read
        network = AutoModelForImageTextToText.from_pretrained(name, config=config, **options).eval()
        return network, AutoProcessor.from_pretrained(name)
