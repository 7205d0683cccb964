"""The README tells the truth: its tables are fresh, its code runs."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

import vidcompress

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def tables():
    spec = importlib.util.spec_from_file_location("make_tables", ROOT / "scripts" / "make_tables.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_tables_are_fresh():
    module = tables()
    assert module.render(README, module.readme()) == README, "run `make tables`"
    evaluation = module.EVALUATION.read_text(encoding="utf-8")
    assert module.render(evaluation, module.evaluation()) == evaluation, "run `make tables`"
    benchmarks = module.BENCHMARKS.read_text(encoding="utf-8")
    assert module.render(benchmarks, module.benchmarks()) == benchmarks, "run `make tables`"


def test_what_takes_twice_as_long_as_fastvid_says_why():
    header, rows = tables().benchmarks()["methods"]
    of, why = header.index("of FastVID"), header.index("why it takes so long")
    assert len(rows) > 25
    assert [row[0] for row in rows if float(row[of]) > 2 and not row[why]] == []


def test_a_stale_table_would_be_noticed():
    stale = README.replace("| 627 at 0.1 |", "| 9 at 0.1 |")
    module = tables()
    assert stale != README and module.render(stale, module.readme()) == README
    with pytest.raises(ValueError, match="marks"):
        module.render(README.replace("<!-- methods -->", ""), module.readme())


def test_links_lead_somewhere():
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


def test_every_block_of_code_runs_in_order(tmp_path, monkeypatch, capsys):
    import torch
    import transformers
    from checkpoint import make_checkpoint, make_clip

    make_clip(tmp_path / "clip.mp4")
    checkpoint = make_checkpoint(tmp_path / "model")
    text = README.replace("llava-hf/llava-onevision-qwen2-7b-ov-hf", str(checkpoint)).replace("bfloat16", "float32")
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == 4
    names = ("AutoModelForImageTextToText", "LlavaOnevisionForConditionalGeneration", "pipeline")
    scope = {name: getattr(transformers, name) for name in names}
    scope |= {"transformers": transformers, "torch": torch, "follow_up": "And then?"}
    monkeypatch.chdir(tmp_path)
    for code in blocks:
        exec(compile(code, "README.md", "exec"), scope)
    *answer, kept = capsys.readouterr().out.strip().splitlines()
    assert answer and kept == "512 64"  # 32 frames of 4 x 4 tokens, and 2 of every 16 at 15 %
    assert scope["second"].shape[1] > scope["ids"].shape[1]


def test_numbers_of_the_first_screen():
    def tflops(n, d=3584, kv=512, m=18944):
        """Multiply-accumulates of 28 layers (InfoMerge, eq. 13-14), in 1e12."""
        return 28 * (n * (2 * d * d + 2 * d * kv) + 2 * n * n * d + 3 * n * d * m) / 1e12

    def megabytes(n):
        """Keys and values of 28 layers, 4 heads of 128, 2 bytes each."""
        return n * 28 * 2 * 4 * 128 * 2 / 1e6

    kept = vidcompress.load("fastvid", retention_ratio=0.15).budget((32, 14, 14))
    assert f"# {32 * 196} {kept}" in README
    assert f"{32 * 196:,} visual tokens: {tflops(6272):.1f} TFLOPs" in README
    assert f"{megabytes(6272):.0f} MB of KV cache" in README
    assert f"627 tokens, {tflops(627):.1f} TFLOPs and {megabytes(627):.0f} MB" in README
