"""The distribution works however it is installed, and patches/ and configs/ are inside the package every time."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from collections.abc import Sequence
from email.parser import HeaderParser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NAME = "vidcompress-transformers"

# What a user sees of an installation: where it is, its methods, its backbones' files and its YAMLs.
PROBE = """
import importlib.resources, json, pkgutil
import vidcompress, vidcompress.configs, vidcompress.patches
print(json.dumps({
    "places": [vidcompress.__file__, vidcompress.patches.__file__, vidcompress.configs.__file__],
    "methods": sorted(vidcompress.list_methods()),
    "patches": sorted(m.name for m in pkgutil.iter_modules(vidcompress.patches.__path__)),
    "configs": sorted(f.name for f in importlib.resources.files("vidcompress.configs").iterdir()
                      if f.name.endswith(".yaml")),
}))
"""


def run(
    command: Sequence[str | Path], cwd: Path | str, *, path: Path | None = None, fails: bool = False
) -> subprocess.CompletedProcess[str]:
    """Run a command without the network and without this session's PYTHONPATH; `path` becomes the PYTHONPATH."""
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    env |= {"PIP_NO_INDEX": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PYTHONUTF8": "1"}
    if path is not None:
        env["PYTHONPATH"] = str(path)
    done = subprocess.run([str(c) for c in command], cwd=cwd, env=env, capture_output=True, text=True, check=False)
    assert (done.returncode != 0) == fails, f"{command} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}"
    return done


def python(code: str, cwd: Path | str = "/", *, path: Path | None = None, exe: Path | str = sys.executable) -> str:
    return run([exe, "-c", code], cwd, path=path).stdout


def pip(*arguments: str | Path, cwd: Path, into: Path | None = None) -> None:
    """pip, offline and with the setuptools that is installed here; `into` is the interpreter of another environment."""
    target = [] if into is None else ["--python", into]
    run([sys.executable, "-m", "pip", *target, *arguments, "--no-deps", "--no-build-isolation", "--quiet"], cwd)


def check_installation(
    inside: Path, cwd: Path | str, *, path: Path | None = None, exe: Path | str = sys.executable
) -> None:
    """The package that is found from `cwd` lies below `inside` with all its parts, and lists what the sources hold."""
    seen = json.loads(python(PROBE, cwd, path=path, exe=exe))
    for place in seen["places"]:
        assert inside.resolve() in Path(place).resolve().parents, f"{place} is not below {inside}"
    assert seen["methods"] == [s for s in stems("vidcompress/methods") if not s.startswith("_")] != []
    assert seen["patches"] == stems("patches") != []
    assert seen["configs"] == sorted(p.name for p in (ROOT / "configs").glob("*.yaml")) != []


def stems(folder: str) -> list[str]:
    return sorted(p.stem for p in (ROOT / folder).glob("*.py") if p.stem != "__init__")


def source_files() -> set[str]:
    """Every file that belongs in a wheel, by its path inside the wheel, as the folders of the repository say."""
    found = [p for p in (ROOT / "vidcompress").rglob("*") if p.is_file() and "__pycache__" not in p.parts]
    package = {p.relative_to(ROOT).as_posix() for p in found}
    added = [*ROOT.glob("patches/*.py"), *ROOT.glob("configs/*.py"), *ROOT.glob("configs/*.yaml")]
    return package | {f"vidcompress/{p.relative_to(ROOT).as_posix()}" for p in added}


def contents(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if ".dist-info/" not in name}


def only(found: Sequence[Path]) -> Path:
    assert len(found) == 1, f"expected one file, found {found}"
    return found[0]


@pytest.fixture(scope="session")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the repository, so that builds leave nothing in the real one."""
    patterns = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__")

    def ignore(folder: str, names: list[str]) -> set[str]:
        return patterns(folder, names) | {name for name in names if Path(folder, name, "pyvenv.cfg").exists()}

    copy = tmp_path_factory.mktemp("checkout") / "repo"
    shutil.copytree(ROOT, copy, ignore=ignore)
    return copy


@pytest.fixture(scope="session")
def sdist(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sdist")
    python(f"from setuptools import build_meta; build_meta.build_sdist({str(out)!r})", checkout)
    return only(list(out.glob("*.tar.gz")))


@pytest.fixture(scope="session")
def wheel(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    pip("wheel", "--wheel-dir", out, ".", cwd=checkout)
    return only(list(out.glob("*.whl")))


@pytest.fixture(scope="session")
def installed_wheel(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    site = tmp_path_factory.mktemp("wheel_site")
    pip("install", "--target", site, wheel, cwd=site)
    return site


def environment(folder: Path) -> Path:
    """A new virtual environment that borrows the dependencies installed here.

    The .pth files beside them are not read there, so an editable installation of this package stays unseen.
    """
    venv.create(folder, with_pip=False, symlinks=os.name != "nt")
    exe = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    site = Path(python("import sysconfig; print(sysconfig.get_path('purelib'))", exe=exe).strip())
    borrowed = [place for place in sys.path if Path(place).name in ("site-packages", "dist-packages")]
    (site / "zz_borrowed.pth").write_text("\n".join(borrowed), encoding="utf-8")
    return exe


# -- importing ---------------------------------------------------------------------------------------------------------
def test_import_is_light_and_silent(checkout: Path) -> None:
    code = (
        "import sys, vidcompress\n"
        "heavy = {'torch', 'transformers'} & {name.partition('.')[0] for name in sys.modules}\n"
        "sys.exit(f'imported {sorted(heavy)}' if heavy else 0)"
    )
    done = run([sys.executable, "-c", code], "/", path=checkout)
    assert done.stdout == done.stderr == ""


@pytest.mark.parametrize("cwd", ["elsewhere", "at the root"])
def test_bare_checkout(checkout: Path, cwd: str) -> None:
    if cwd == "elsewhere":
        check_installation(checkout, "/", path=checkout)
    else:
        check_installation(checkout, checkout)


# -- what is built -----------------------------------------------------------------------------------------------------
def test_wheel_holds_every_source_file_and_nothing_else(wheel: Path) -> None:
    files = contents(wheel)
    assert files == source_files()
    assert {"vidcompress/patches/__init__.py", "vidcompress/configs/__init__.py", "vidcompress/py.typed"} < files
    assert any(f.startswith("vidcompress/ops/") and f.count("/") == 3 for f in files), "no op arrived in the wheel"


def test_metadata(wheel: Path, checkout: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name.partition("/")[2]: name for name in archive.namelist() if ".dist-info/" in name}
        metadata = HeaderParser().parsestr(archive.read(names["METADATA"]).decode())
        entry_points = archive.read(names["entry_points.txt"]).decode()
        licence = archive.read(names["licenses/LICENSE"]).decode()
    assert metadata["Name"] == NAME
    assert metadata["License-Expression"] == "Apache-2.0" and "Apache License" in licence
    assert metadata["Requires-Python"] == ">=3.10"
    assert "vidcompress = vidcompress.cli:main" in entry_points
    assert "[lmms_eval.models]\nvidcompress = vidcompress.integrations.lmms_eval:manifests" in entry_points
    assert set(metadata.get_all("Provides-Extra")) == {"video", "cli", "viz", "eval", "vllm", "triton", "dev", "all"}
    version = python("import vidcompress; print(vidcompress.__version__)", path=checkout).strip()
    cited = re.search(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text(encoding="utf-8"), re.MULTILINE)
    assert metadata["Version"] == version == (cited and cited[1])


def test_every_requirement_is_pinned(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        name = next(n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        metadata = HeaderParser().parsestr(archive.read(name).decode())
    pins, oldest = pinned("constraints.txt"), pinned("constraints-oldest.txt")
    assert set(pinned("constraints-eval.txt")) < set(pins), "a line of constraints-eval.txt replaces one"
    wanted = {normal(re.match(r"[\w.-]+", line)[0]) for line in metadata.get_all("Requires-Dist")} - {NAME}
    assert wanted - set(pins) == {"vllm"}, "which brings its own torch and transformers (scripts/test_vllm.sh)"
    assert set(oldest) < set(pins), "a line of constraints-oldest.txt replaces one of constraints.txt"
    assert any(line.startswith("transformers<6,>=5.17") for line in metadata.get_all("Requires-Dist"))
    assert oldest["transformers"] == "5.17.0"


def pinned(file: str) -> dict[str, str]:
    lines = [line.partition("#")[0].strip() for line in (ROOT / file).read_text(encoding="utf-8").splitlines()]
    return {normal(name): version for name, _, version in (line.partition("==") for line in lines if line)}


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


# -- what is installed -------------------------------------------------------------------------------------------------
def test_wheel(installed_wheel: Path) -> None:
    check_installation(installed_wheel, "/", path=installed_wheel)


def test_wheel_used_at_the_root(installed_wheel: Path, checkout: Path) -> None:
    """There ./vidcompress, without patches/ inside, comes before the installed package."""
    check_installation(checkout, checkout, path=installed_wheel)


def test_sdist(sdist: Path, wheel: Path, tmp_path: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"tests/test_packaging.py", "constraints.txt", "Makefile", "LICENSE", "CITATION.cff"} <= names
    pip("wheel", "--wheel-dir", tmp_path, sdist, cwd=tmp_path)
    rebuilt = only(list(tmp_path.glob("*.whl")))
    assert contents(rebuilt) == contents(wheel)
    site = tmp_path / "site"
    pip("install", "--target", site, rebuilt, cwd=tmp_path)
    check_installation(site, "/", path=site)


@pytest.mark.parametrize("mode", ["lenient", "strict"])
def test_editable(checkout: Path, tmp_path: Path, mode: str) -> None:
    exe = environment(tmp_path / "env")
    settings = ("--config-settings", f"editable_mode={mode}")
    pip("install", "--ignore-installed", *settings, "-e", ".", cwd=checkout, into=exe)
    check_installation(checkout, "/", exe=exe)
    check_installation(checkout, checkout, exe=exe)
    assert "vidcompress" in run([exe.with_name("vidcompress"), "--help"], "/").stdout


def test_lenient_editable_sees_a_new_backbone(checkout: Path, tmp_path: Path) -> None:
    exe = environment(tmp_path / "env")
    pip("install", "--ignore-installed", "-e", ".", cwd=checkout, into=exe)
    fresh = checkout / "patches" / "fresh_backbone.py"
    fresh.touch()
    try:
        found = python("import vidcompress.patches.fresh_backbone as fresh; print(fresh.__file__)", exe=exe)
        assert Path(found.strip()) == fresh
    finally:
        fresh.unlink()


@pytest.mark.parametrize(
    ("module", "extra", "command"),
    [("typer", "cli", "list"), ("rich", "cli", "list"), ("av", "video", "demo"), ("torchvision", "video", "demo")],
)
def test_a_missing_extra_is_named(installed_wheel: Path, module: str, extra: str, command: str) -> None:
    code = (
        f"import sys; sys.modules[{module!r}] = None; sys.argv[1:] = [{command!r}]\n"
        "from vidcompress.cli import main; main()"
    )
    done = run([sys.executable, "-c", code], "/", path=installed_wheel, fails=True)
    assert done.stdout == "" and done.stderr.count("\n") == 1, done.stderr
    assert f"{module} not installed" in done.stderr
    assert f'pip install "{NAME}[{extra}]"' in done.stderr


# -- types -------------------------------------------------------------------------------------------------------------
def test_mypy_sees_patches_in_the_installed_wheel(installed_wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    shutil.copytree(installed_wheel, site)
    mypy = [sys.executable, "-m", "mypy", "--config-file", ROOT / "pyproject.toml"]
    mypy += ["--cache-dir", tmp_path / "cache", "-p", "vidcompress"]
    planted = site / "vidcompress" / "patches" / "__init__.py"
    with planted.open("a", encoding="utf-8") as file:
        file.write("\nplanted: int = 'text'\n")
    report = run(mypy, site, fails=True).stdout
    assert re.search(r"vidcompress.patches.__init__\.py:\d+: error: Incompatible types in assignment", report), report
    assert "Found 1 error in 1 file" in report  # and none elsewhere
