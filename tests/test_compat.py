"""The healing is tried in processes of their own, for it must happen before anything else imports torchvision."""

from __future__ import annotations

import importlib
import logging
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from vidcompress import compat
from vidcompress.compat import ensure_torchvision, require

SYMPTOM = "operator torchvision::nms does not exist"


def python(code: str) -> list[str]:
    """The lines that a fresh interpreter prints."""
    root = Path(__file__).parent.parent
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    assert run.returncode == 0, run.stderr
    return run.stdout.splitlines()


def test_heals_torchvision_before_transformers() -> None:
    lines = python("""
import logging, sys
logging.basicConfig(level=logging.INFO, format="%(name)s %(levelname)s", stream=sys.stdout)
try:
    import torchvision
except RuntimeError as error:
    print(error)
    half_imported = sys.modules["torchvision.extension"]
from vidcompress.compat import ensure_torchvision
print(ensure_torchvision(), ensure_torchvision())
print(sys.modules["torchvision.extension"] is not globals().get("half_imported"))
import torch
from torchvision.transforms import v2
print(v2.functional.resize(torch.zeros(3, 8, 8), [4, 6]).shape)
from transformers import LlavaOnevisionForConditionalGeneration, LlavaOnevisionVideoProcessor
print(LlavaOnevisionVideoProcessor(size={"height": 56, "width": 56}).size["height"])
print(ensure_torchvision(), "torchvision.ops" in sys.modules)
""")
    # Beside a torch for which torchvision was built there is nothing to heal, hence nothing to log.
    broken = [SYMPTOM] if SYMPTOM in lines else []
    assert lines == [
        *broken,
        *["vidcompress INFO" for _ in broken],
        "True True",
        "True",
        "torch.Size([3, 4, 6])",
        "56",
        "True True",
    ]


def test_heals_torchvision_after_transformers_has_failed() -> None:
    lines = python("""
import transformers
try:
    transformers.LlavaOnevisionVideoProcessor(size={"height": 56, "width": 56})
except (ImportError, RuntimeError):
    pass
from vidcompress.compat import ensure_torchvision
print(ensure_torchvision())
print(transformers.LlavaOnevisionVideoProcessor(size={"height": 56, "width": 56}).size["height"])
""")
    assert lines == ["True", "56"]


@pytest.fixture
def cpu_only(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A torch without a GPU; what is declared is noted instead, for this process may have been healed already."""
    calls: list[str] = []
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(compat, "_define_operators", lambda: calls.append("define"))
    return calls


def importer(monkeypatch: pytest.MonkeyPatch, calls: list[str], errors: list[Exception]) -> None:
    """Let `import torchvision` raise these errors in turn, then succeed."""

    def import_module(name: str) -> None:
        calls.append(name)
        if errors:
            raise errors.pop(0)

    monkeypatch.setattr(importlib, "import_module", import_module)


@pytest.mark.parametrize("operator", ["nms", "qnms"])
def test_heals_and_imports_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, cpu_only: list[str], operator: str
) -> None:
    importer(monkeypatch, cpu_only, [RuntimeError(f"operator torchvision::{operator} does not exist")])
    with caplog.at_level(logging.INFO, logger="vidcompress"):
        assert ensure_torchvision() is True
        assert ensure_torchvision() is True
    assert cpu_only == ["torchvision", "define", "torchvision", "torchvision"]
    assert [(record.name, record.levelname) for record in caplog.records] == [("vidcompress", "INFO")]


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("operator torchvision::roi_align does not exist"),
        RuntimeError("something else"),
        ImportError(SYMPTOM),
        OSError("libjpeg.so.8: cannot open shared object file"),
    ],
    ids=repr,
)
def test_other_errors_are_raised(monkeypatch: pytest.MonkeyPatch, cpu_only: list[str], error: Exception) -> None:
    importer(monkeypatch, cpu_only, [error])
    with pytest.raises(type(error)) as raised:
        ensure_torchvision()
    assert raised.value is error
    assert cpu_only == ["torchvision"]


def test_error_after_the_healing_is_raised(monkeypatch: pytest.MonkeyPatch, cpu_only: list[str]) -> None:
    importer(monkeypatch, cpu_only, [RuntimeError(SYMPTOM), RuntimeError(SYMPTOM)])
    with pytest.raises(RuntimeError, match=SYMPTOM):
        ensure_torchvision()
    assert cpu_only == ["torchvision", "define", "torchvision"]


@pytest.mark.parametrize(("name", "version"), [("cuda", "12.8"), ("hip", "6.4")])
def test_versions_that_do_not_fit_are_not_healed(
    monkeypatch: pytest.MonkeyPatch, cpu_only: list[str], name: str, version: str
) -> None:
    monkeypatch.setattr(torch.version, name, version)
    importer(monkeypatch, cpu_only, [RuntimeError(SYMPTOM)])
    with pytest.raises(RuntimeError, match=SYMPTOM):
        ensure_torchvision()
    assert cpu_only == ["torchvision"]


def test_torchvision_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchvision", None)
    assert ensure_torchvision() is False


def test_warns_when_transformers_takes_torchvision_for_missing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert ensure_torchvision()
    utils = SimpleNamespace(is_vision_available=lambda: False, is_torchvision_available=lambda: False)
    monkeypatch.setitem(sys.modules, "transformers.utils.import_utils", utils)
    assert ensure_torchvision()
    assert not caplog.records, "without Pillow transformers has another reason"
    utils.is_vision_available = lambda: True
    assert ensure_torchvision()
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "start a new process" in caplog.text


def test_require_names_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "typer", None)
    with pytest.raises(ImportError) as raised:
        require("cli", "typer", "json", "surely_not_installed")
    message = str(raised.value)
    assert message.startswith("typer, surely_not_installed not installed, needed for the extra 'cli'")
    assert message.endswith('pip install "vidcompress-transformers[cli]"')
    assert "json" not in message
    assert raised.value.name == "typer"


def test_require_imports_nothing() -> None:
    lines = python("""
import sys
from vidcompress.compat import require
require("video", "av", "numpy")
require("video")
print("av" in sys.modules, "torch" in sys.modules)
""")
    assert lines == ["False False"]
