"""Every Triton kernel compiles for an H200, without one, and fits: scripts/kernel_report.py says what it takes."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parent.parent

SPILLS = {("dpp_map, 4096 tokens", "picks"): 256}
"""Bytes a thread that a kernel may keep in local memory, by case and kernel; none unless it is here (docs/kernels.md).
"""


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    if platform.machine() != "x86_64":
        pytest.skip("the tools that come with Triton are for x86_64")
    path = tmp_path_factory.mktemp("report") / "report.json"
    # Anew, whatever was compiled before; a process of its own, because here kernels are interpreted.
    environment = dict(os.environ, TRITON_CACHE_DIR=str(path.parent / "cache"), PYTHONPATH=str(ROOT))
    command = [sys.executable, str(ROOT / "scripts/kernel_report.py"), "--json", str(path)]
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    found = json.loads(path.read_text(encoding="utf-8"))
    assert all(row["case"] in run.stdout for row in found)
    return found


def test_every_kernel_is_compiled(rows: list[dict[str, Any]]) -> None:
    launched = {
        f"{path.parent.name}.{kernel}"
        for path in (ROOT / "vidcompress/ops").glob("*/kernel*.py")
        for kernel in re.findall(r"\blaunch\(\s*_(\w+)", path.read_text(encoding="utf-8"))
    }
    assert {f"{row['case'].split(',')[0]}.{row['kernel']}" for row in rows} == launched


def test_nothing_spills_that_is_not_known_to(rows: list[dict[str, Any]]) -> None:
    too_many = [row for row in rows if row["spills"] > SPILLS.get((row["case"], row["kernel"]), 0)]
    assert not too_many


def test_a_multiprocessor_holds_a_program(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        assert row["registers"] * 32 * row["warps"] <= 65536 and row["shared"] <= 227 * 1024, row


def test_large_products_are_on_hoppers_tensor_cores(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        if row["kernel"] == "nearest":
            assert row["products"] == "wgmma" and row["asynchronous"], row
