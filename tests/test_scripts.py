"""The scripts run, at sizes that take no time."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch

from vidcompress.method import list_methods

SCRIPTS = Path(__file__).parent.parent / "scripts"


@pytest.fixture(autouse=True)
def threads():
    """Scripts set the number of threads; put it back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_bench_methods(capsys, tmp_path, monkeypatch):
    out, picture = tmp_path / "new" / "rows.json", tmp_path / "rows.png"
    sizes = ["--grids", "9x4x4,12x2x2", "--channels", "24", "--repeat", "1", "--retention-ratio", "0.25", "--json"]
    monkeypatch.setattr(sys, "argv", ["bench_methods.py", *sizes, "--out", str(out), "--plot", str(picture)])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(SCRIPTS / "bench_methods.py"), run_name="__main__")
    assert not end.value.code
    found = json.loads(capsys.readouterr().out)
    rows = found["rows"]
    fast = [name for name, cls in list_methods().items() if not cls.slow]
    assert [row["method"] for row in rows] == 2 * fast
    assert [row["grid"] for row in rows] == ["9x4x4"] * len(fast) + ["12x2x2"] * len(fast)
    assert {row["method"]: row["kept"] for row in rows[: len(fast)]}["infomerge"] == [36]
    assert all(row["launches"] > 0 and row["decide_ms"] > 0 and row["prefill_tflops"] > 0 for row in rows)
    assert json.loads(out.read_text()) == found and picture.read_bytes()[:4] == b"\x89PNG"


def test_bench_ops(capsys, tmp_path):
    main = runpy.run_path(str(SCRIPTS / "bench_ops.py"))["main"]
    rows = main(["--grid", "4x3x3", "--channels", "16", "--repeat", "1", "--out", str(tmp_path / "ops.json")])
    fast = [path.parent.name for path in sorted((SCRIPTS.parent / "vidcompress" / "ops").glob("*/torch.py"))]
    assert list(dict.fromkeys(row["op"].split(",")[0] for row in rows)) == fast
    assert {row["implementation"] for row in rows} >= {"naive", "torch"}
    assert all(row["of_naive"] == 1 for row in rows if row["implementation"] == "naive")
    assert json.loads((tmp_path / "ops.json").read_text())["rows"] == rows
    with pytest.raises(SystemExit):
        main(["--implementations", "numpy"])
    assert "naive, torch, kernel" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["tiny", "tiny-video", "tiny-qwen"])
def test_bench_prefill(name, tmp_path, capsys):
    main = runpy.run_path(str(SCRIPTS / "bench_prefill.py"))["main"]
    sizes = ["--models", name, "--dtype", "float32", "--frames", "8", "--batch", "1,2", "--repeat", "1"]
    asked = [
        "--methods",
        "fastvid,unified",
        "--retention",
        "0.3",
        "--new-tokens",
        "2",
        "--out",
        str(tmp_path / "a.json"),
    ]
    rows = main([*sizes, *asked])
    assert [(row["batch"], row["method"]) for row in rows] == [
        (batch, method) for batch in (1, 2) for method in ("none", "fastvid", "unified")
    ]
    for whole, *short in (rows[:3], rows[3:]):
        assert whole["speed_up"] == 1 and whole["flops_ratio"] is None and whole["compression_ms"] == 0
        for row in short:
            assert row["prompt"] < whole["prompt"] and row["flops_ratio"] > 1 and row["compression_ms"] > 0
            assert row["kv_cache_mb"] < whole["kv_cache_mb"]
    report = json.loads((tmp_path / "a.json").read_text())
    assert report["rows"] == rows and report["weights"] == "random"
    assert "weights random" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["--models", "gpt"])
    assert "gpt unknown; accepted: llava-onevision-7b" in capsys.readouterr().err


def test_bench_inside(capsys):
    main = runpy.run_path(str(SCRIPTS / "bench_inside.py"))["main"]
    sizes = ["--grid", "8x4x4", "--channels", "64", "--heads", "4", "--kv-heads", "2", "--text", "5"]
    rows = main([*sizes, "--repeat", "1", "--json"])
    assert json.loads(capsys.readouterr().out)["rows"] == rows
    names = [row["step"].strip() for row in rows]
    assert {"density peaks, N = 128", "density peaks, N = 256", "DPP, 12 of 128"} <= set(names)
    assert all(row["ms"] > 0 for row in rows)
    alone = [row["step"].strip() for row in rows if row["naive_ms"] is None]
    assert alone == ["unified before the LLM, all of it", "hieravid before the LLM, all of it", names[-1]]
    assert {row["held"] for row in rows if row["bar"] is None and row["mb_bar"] is None} == {None}


def test_make_tiny_checkpoint(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["make_tiny_checkpoint.py", str(tmp_path / "tiny")])
    runpy.run_path(str(SCRIPTS / "make_tiny_checkpoint.py"), run_name="__main__")
    assert (tmp_path / "tiny" / "model.safetensors").is_file()
    assert (tmp_path / "tiny" / "siglip" / "model.safetensors").is_file()
    monkeypatch.setattr(sys, "argv", ["make_tiny_checkpoint.py"])
    with pytest.raises(SystemExit, match="usage"):
        runpy.run_path(str(SCRIPTS / "make_tiny_checkpoint.py"), run_name="__main__")
