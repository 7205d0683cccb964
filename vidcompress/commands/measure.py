"""Commands that measure: times on synthetic tokens, accuracy on a suite, papers' tables beside results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from vidcompress.commands.shared import app, err, load_model, loading_options, out, sides_of
from vidcompress.compat import require
from vidcompress.tables import markdown, rich_table

RATIOS = "1.0,.3,.2,.1,.05,.02"


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

    _check_outputs(output, picture)
    sides = [sides_of(grid) for grid in grids.split(",")]
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
    suite: Annotated[str, typer.Option(help="What to ask: tinyqa or tinyqa-wide.")] = "tinyqa",
    methods: Annotated[str, typer.Option(help="By comma, or all (but those that take minutes).")] = "all",
    retention: Annotated[str, typer.Option(help="Retention ratios by comma; 1.0 asks without compression.")] = RATIOS,
    model: Annotated[
        str | None, typer.Option(help="Checkpoint, or one within: tiny-llava-onevision (default), tiny-qwen2-vl.")
    ] = None,
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

    ratios, names = _ratios(retention), run.choose(methods)
    _check_outputs(output, picture)
    options = loading_options(device, dtype, attn)
    if threads:
        torch.set_num_threads(threads)
    name = model or checkpoints.NAMES["llava_onevision"]
    network, processor = load_model(checkpoints.located(name), options)
    asked = run.evaluate(
        network,
        processor,
        name=name,
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


def _check_outputs(output: Path | None, picture: Path | None) -> None:
    """Refuses what cannot be written before any work; folders are made."""
    from vidcompress.report.output import try_output

    for option, path in (("--out", output), ("--plot", picture)):
        if path is not None:
            try_output(option, path, make_folder=True)


def _ratios(text: str) -> list[float]:
    """The numbers of "1.0,.3,.1"."""
    try:
        return [float(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise ValueError(f"--retention must be numbers in (0, 1] by comma, such as 1.0,.3,.1, got {text!r}") from None
