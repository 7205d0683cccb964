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


def test_bench_methods(capsys):
    main = runpy.run_path(str(SCRIPTS / "bench_methods.py"))["main"]
    rows = main(["--grid", "9x4x4", "--channels", "24", "--repeat", "1", "--retention-ratio", "0.25", "--json"])
    assert [row["method"] for row in rows] == list(list_methods())
    assert {row["method"]: row["kept"] for row in rows}["infomerge"] == [36]
    assert json.loads(capsys.readouterr().out)["rows"] == rows


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
