"""The benchmark runs, at sizes that take little time."""

from __future__ import annotations

import json
import os
import runpy
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parent.parent.parent / "scripts"


def test_bench_serving(checkpoint, monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    main = runpy.run_path(str(SCRIPTS / "bench_serving.py"))["main"]
    out = tmp_path / "rows.json"
    model = ["--model", str(checkpoint("llava_onevision"))]
    sizes = ["--concurrency", "1,3", "--rounds", "1", "--frames", "16", "--new-tokens", "4", "--out", str(out)]
    rows = main([*model, *sizes, "--", "--enforce-eager", "--max-model-len", "1024"])
    found = [(row["compression"] != "none", row["concurrency"]) for row in rows]
    assert found == [(False, 1), (False, 3), (True, 1), (True, 3)]
    plain, short = rows[0], rows[2]
    assert plain["prompt_tokens"] - short["prompt_tokens"] == 16 * 9 - 14  # 10 % of 144
    assert all(row["failed"] == 0 and row["requests"] == row["concurrency"] for row in rows)
    assert all(0 < row["ttft_p50_ms"] <= row["ttft_p99_ms"] and row["requests_per_s"] > 0 for row in rows)
    assert all(0 <= row["kv_use"] <= 1 for row in rows)
    assert json.loads(out.read_text())["rows"] == rows
    with pytest.raises(SystemExit):
        main([*model, "--concurrency", "0"])
    assert "at least 1" in capsys.readouterr().err
