"""The scripts run, at sizes that take no time."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from vidcompress import Site, load
from vidcompress.bench import synthetic
from vidcompress.method import list_methods

SCRIPTS = Path(__file__).parent.parent / "scripts"
OPS = SCRIPTS.parent / "vidcompress" / "ops"


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
    faster = {path.parent.name for kind in ("torch", "kernel") for path in OPS.glob(f"*/{kind}.py")}
    assert list(dict.fromkeys(row["op"].split(",")[0] for row in rows)) == sorted(faster)
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


def test_bench_inside(capsys, monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    main = runpy.run_path(str(SCRIPTS / "bench_inside.py"))["main"]
    sizes = ["--grid", "8x4x4", "--channels", "64", "--heads", "4", "--kv-heads", "2", "--text", "5"]
    rows = main([*sizes, "--repeat", "1", "--json"])
    assert json.loads(capsys.readouterr().out)["rows"] == rows
    names = [row["step"].strip() for row in rows]
    assert {"density peaks, N = 128", "density peaks, N = 256", "DPP, 12 of 128"} <= set(names)
    assert all(row["ms"] > 0 for row in rows)
    alone = [row["step"].strip() for row in rows if row["naive_ms"] is None]
    assert alone == ["unified, all of it", "hieravid, all of it", names[-1]]
    assert {row["held"] for row in rows if row["bar"] is None and row["mb_bar"] is None} == {None}


@pytest.mark.parametrize("settings", [{}, {"dyseg_c": 1, "dyseg_tau": -1.0}], ids=["shots", "one shot"])
def test_what_fastvid_is_measured_against_does_the_same(settings, monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    plain = importlib.import_module("straightforward")
    tokens = synthetic((12, 5, 5), 24, torch.float32, torch.device("cpu"))
    method = load("fastvid", retention_ratio=0.3, remainder="official", **settings)
    ours = method.decide(tokens, Site.projector()).apply(tokens.features)
    torch.testing.assert_close(plain.fastvid(method, tokens), ours, atol=1e-5, rtol=0)


@pytest.mark.parametrize("backbone", ["llava_onevision", "qwen2_vl"])
def test_train_tiny(backbone, tmp_path, monkeypatch):
    """A step or two of each part: what is saved is a checkpoint that the evaluation takes, and that may go on."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from vidcompress.eval import asking
    from vidcompress.eval.suites import load_suite

    monkeypatch.syspath_prepend(str(SCRIPTS))

    def train(*options: str) -> dict:
        command = ["train_tiny.py", "--backbone", backbone, "--threads", "1", "--out", str(tmp_path), *options]
        monkeypatch.setattr(sys, "argv", command)
        runpy.run_path(str(SCRIPTS / "train_tiny.py"), run_name="__main__")
        return json.loads((tmp_path / "training.json").read_text())

    first = train("--vision-steps", "2", "--language-steps", "2", "1", "--drops")
    second = train("--after", str(tmp_path), "--language-steps", "2", "1", "1")
    assert first["backbone"] == second["backbone"] == backbone and second["cpu_seconds"] > first["cpu_seconds"]
    assert first["device"] == "cpu" and second["seconds"] > first["seconds"] > 0
    with pytest.raises(SystemExit):
        train("--language-steps", "1", "1", "1", "1")
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit):
            train("--device", "cuda")
    model = AutoModelForImageTextToText.from_pretrained(tmp_path, dtype="float32").eval()
    (sheet,) = asking.prepare(model, AutoProcessor.from_pretrained(tmp_path), load_suite("tinyqa", 1))
    assert asking.ask(model, sheet).before == (864 if backbone == "llava_onevision" else 432)


class Placed(TorchFunctionMode):
    """Follows, on the CPU, which tensors were put onto the model's device: its weights, what names a device when it is
    made or moved, and what is computed from such alone. Refuses a computation that also takes another tensor."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.placed = WeakTensorKeyDictionary()
        self.place([*model.parameters(), *model.buffers()])

    def place(self, result: object) -> None:
        self.placed.update((t, True) for t in tree_leaves(result) if isinstance(t, torch.Tensor))

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        given = tree_leaves((args, kwargs))
        tensors = [t for t in given if isinstance(t, torch.Tensor)]
        here = [t in self.placed for t in tensors]
        if any(isinstance(value, torch.device) for value in given) or (tensors and all(here)):
            self.place(result)
        elif any(here):
            strays = [tuple(t.shape) for t, own in zip(tensors, here) if not own and t.ndim]
            assert not strays, f"{function} takes tensors {strays} that are not on the model's device"
            self.place(result)
        return result


@pytest.mark.parametrize("backbone", ["llava_onevision", "qwen2_vl"])
def test_training_keeps_to_one_device(backbone, monkeypatch):
    """Where there is no other device to train on: that all tensors go to the model's, as far as Python sees them."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    language, models, vision = (
        importlib.import_module(f"tinytrain.{name}") for name in ("language", "models", "vision")
    )
    student = models.STUDENTS[backbone]()
    monkeypatch.setattr(language, "PARTS", (dataclasses.replace(language.PARTS[0], curriculum=((1.0, (4,)),)),))
    with Placed(student.model):
        vision.train_vision(student, 1, 0)
        language.train_language(student, 0, 2, 0, drops=True)
        with pytest.raises(AssertionError, match="not on the model's device"):
            student.decoder.embed_tokens(torch.tensor([1]))


def test_what_waits_for_a_gpu_says_that_there_is_none(tmp_path):
    environment = dict(os.environ, PYTHON=sys.executable, CUDA_VISIBLE_DEVICES="")
    command = ["bash", str(SCRIPTS / "on_gpu.sh"), str(tmp_path / "results")]
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert run.returncode == 2 and "sees no CUDA device" in run.stderr and not (tmp_path / "results").exists()


def test_launches_do_not_grow_with_the_video():
    pytest.importorskip("triton")
    seen = []
    for frames in (8, 12):
        command = [sys.executable, str(SCRIPTS / "launch_report.py"), "--grid", f"{frames}x3x3", "--channels", "80"]
        command += ["--retention", "0.4", "--long", "40"]
        run = subprocess.run(
            command, capture_output=True, text=True, env=dict(os.environ, PYTHONPATH=str(SCRIPTS.parent))
        )
        assert run.returncode == 0, run.stderr
        rows = [line.split(maxsplit=4) for line in run.stdout.splitlines()[1:]]
        seen.append({name: (int(launches), int(copies), int(waits)) for name, launches, copies, waits, _ in rows})
        assert all("merge" in kernels for *_, kernels in rows)
    for name, (launches, *_) in seen[0].items():
        assert abs(seen[1][name][0] - launches) <= 2, name
    for counts in seen:
        assert all(launches <= 60 and waits <= 3 for launches, _, waits in counts.values())


@pytest.mark.parametrize("backbone", ["llava_onevision", "qwen2_vl"])
def test_packed_questions_are_exact(backbone, tmp_path, monkeypatch):
    """What training computes for eight questions at once is what the saved model computes for each alone."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from vidcompress.eval import asking
    from vidcompress.eval.suites import load_suite

    monkeypatch.syspath_prepend(str(SCRIPTS))
    language, models = (importlib.import_module(f"tinytrain.{name}") for name in ("language", "models"))
    torch.manual_seed(0)
    student = models.STUDENTS[backbone]()
    student.save(tmp_path)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path, dtype="float32").eval()
    clips = load_suite("tinyqa", 1)
    (sheet,) = asking.prepare(model, AutoProcessor.from_pretrained(tmp_path), clips)
    with torch.inference_mode():
        alone = torch.stack(asking._ask_apart(model, sheet)[0])
        frames = torch.from_numpy(clips[0].frames[None])
        seen = student.patches(frames)["tokens"].reshape(1, -1, 128).expand(language.BATCH, -1, -1)
        embeds, positions = language.Lessons(student, 0, 0, drops=False)._prompt(seen, 24, 72, 72)
        blocks = [language.block(question) for question in clips[0].questions]
        ids = torch.tensor(blocks).view(1, -1).expand(language.BATCH, -1)
        embeds = torch.cat([embeds, student.decoder.embed_tokens(ids)], 1)
        states = student.decode(embeds, *language.pack(positions))[0]
        ends = [suffix.shape[1] + len(sheet.prefix[0]) - len(positions[0, 0]) - 1 for suffix in sheet.suffixes]
        asked = torch.tensor(ends) + torch.arange(8) * language.BLOCK + positions.shape[-1]
        packed = student.model.lm_head(states[asked])
    torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-4)
