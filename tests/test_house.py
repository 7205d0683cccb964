"""The rules of the house, as far as a machine can hold them. CONTRIBUTING.md says what they are good for."""

from __future__ import annotations

import ast
import functools
import importlib.resources
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

import vidcompress
from vidcompress.config import DOCUMENTATION, list_presets
from vidcompress.method import Method, list_methods

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "vidcompress"
SKIPPED = re.compile(r"\.git|\.venv.*|.*_cache|__pycache__|build|dist|.*\.egg-info|\.hypothesis|node_modules")

METHOD_LINES, BACKBONE_LINES, BASE_LINES, FUNCTION_LINES, PUBLIC_NAMES = 150, 130, 300, 60, 19


def python_files() -> Iterator[Path]:
    """Every file of the library: vidcompress/, patches/, configs/."""
    for folder in ("vidcompress", "patches", "configs"):
        yield from sorted(p for p in (ROOT / folder).rglob("*.py"))


def text_files() -> Iterator[Path]:
    """Every file of the repository that is text."""
    pending = [ROOT]
    while pending:
        for path in sorted(pending.pop().iterdir()):
            if SKIPPED.fullmatch(path.name):
                continue
            if path.is_dir():
                pending.append(path)
                continue
            with path.open("rb") as file:
                if b"\0" not in file.read(4096):
                    yield path


def module_of(path: Path) -> str:
    """Dotted name under which a file is imported."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts if parts[0] == "vidcompress" else ("vidcompress", *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


FILES = list(python_files())
METHOD_FILES = [p for p in FILES if p.parent == PACKAGE / "methods" and p.stem != "__init__"]
BACKBONE_FILES = [p for p in FILES if p.parent == ROOT / "patches" and p.stem not in ("__init__", "base")]
OPS = sorted(p.parent for p in (PACKAGE / "ops").glob("*/__init__.py"))


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


every_file = pytest.mark.parametrize("path", FILES, ids=name_of)
every_method_file = pytest.mark.parametrize("path", METHOD_FILES, ids=name_of)
every_op = pytest.mark.parametrize("folder", OPS, ids=lambda folder: folder.name)


# -- the checks themselves, on source text -----------------------------------------------------------------------------
def imports(module: ast.Module, name: str, is_package: bool = False) -> set[str]:
    """Every module that this one imports, at any depth; relative ones made absolute."""
    found = set()
    for node in ast.walk(module):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = name.split(".")
            base = base[: len(base) - node.level + is_package] if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            found |= {origin, *(f"{origin}.{alias.name}" for alias in node.names)}
    return found


def functions(module: ast.Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (n for n in ast.walk(module) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef)))


def is_public(name: str) -> bool:
    return not name.startswith("_")


def public_members(body: list[ast.stmt], prefix: str = "") -> Iterator[tuple[str, ast.stmt]]:
    """(qualified name, definition) of public functions, classes and their public methods."""
    for node in body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) and is_public(node.name):
            yield prefix + node.name, node
            if isinstance(node, ast.ClassDef):
                yield from public_members(node.body, f"{prefix}{node.name}.")


def untyped(module: ast.Module) -> list[str]:
    """Public functions and methods with an argument or a result that has no annotation."""
    wrong = []
    for name, node in public_members(module.body):
        if not isinstance(node, ast.ClassDef):
            a = node.args
            given = [*a.posonlyargs, *a.args, *a.kwonlyargs, *filter(None, [a.vararg, a.kwarg])]
            missing = [x.arg for x in given if x.annotation is None and x.arg not in ("self", "cls")]
            wrong += [f"{name}({x})" for x in missing] + ([f"{name} ->"] if node.returns is None else [])
    return wrong


def undocumented(module: ast.Module, inherited: dict[str, set[str]], one_class: bool = False) -> list[str]:
    """Public functions, classes and methods without a docstring. One that calls its namesake of super() may omit it.

    Args:
        inherited: method names that a base class documents, by class.
        one_class: the file is one class, and its docstring that of the file.
    """
    wrong = []
    for name, node in public_members(module.body):
        owner, _, short = name.rpartition(".")
        if ast.get_docstring(node) or short in inherited.get(owner, ()) or f"super().{short}(" in ast.unparse(node):
            continue
        if one_class and isinstance(node, ast.ClassDef) and ast.get_docstring(module):
            continue
        wrong.append(name)
    return wrong


def environment_reads(module: ast.Module) -> list[str]:
    """Names of environment variables that are read or written; the expression where the name is computed."""
    found = []
    for node in ast.walk(module):
        if isinstance(node, ast.Subscript) and ast.unparse(node.value).endswith("environ"):
            key: ast.expr | None = node.slice
        elif isinstance(node, ast.Call) and re.search(r"environ\.\w+$|\bgetenv$|\bputenv$", ast.unparse(node.func)):
            key = node.args[0] if node.args else None
        else:
            continue
        found.append(key.value if isinstance(key, ast.Constant) else ast.unparse(key or node))
    return found


def prints(module: ast.Module) -> list[int]:
    """Lines that call print or write to the standard streams."""
    calls = (n for n in ast.walk(module) if isinstance(n, ast.Call))
    return [n.lineno for n in calls if re.fullmatch(r"print|sys\.(stdout|stderr)\.write", ast.unparse(n.func))]


# Put together here, so that this file does not contain what it looks for.
MACHINE_PATH = re.compile(
    r"(?<![\w.~$}/-])/(?:" + "|".join(["work", "tmp", "root", "home", "mnt", "scratch"]) + r")/\w"
)
REGISTRY = re.compile(
    "|".join(
        ["pypi" + r"\.org", "pythonhosted" + r"\.org", "download" + r"\.pytorch\.org", "--(extra-)?index" + "-url"]
    )
)
LEFTOVER = re.compile(r"\b(TO" + r"DO|FIX" + r"ME|X" + r"XX|HA" + r"CK)\b")


def test_the_checks_see_what_they_look_for() -> None:
    source = ast.parse(
        "from . import a\nfrom ..b import c\nimport d.e\n"
        "def f(x, *, y: int): ...\n"
        "class K:\n    def m(self, z) -> None: ...\n    def _n(self, z): ...\n"
        "def g():\n    from h import i\n    print(1)\n    sys.stderr.write('')\n"
        "    return os.environ['A'], os.environ.get('B'), os.getenv('C'), environ.pop(x)\n"
    )
    assert imports(source, "p.q.r") >= {"p.q.a", "p.b.c", "d.e", "h.i"}
    assert imports(source, "p.q", is_package=True) >= {"p.q.a", "p.b.c"}
    assert untyped(source) == ["f(x)", "f ->", "K.m(z)", "g ->"]
    assert undocumented(source, {}) == ["f", "K", "K.m", "g"]
    assert undocumented(source, {"K": {"m"}}) == ["f", "K", "g"]
    assert environment_reads(source) == ["A", "B", "C", "x"]
    assert prints(source) == [10, 11]
    assert LEFTOVER.search("# TO" + "DO: later") and not LEFTOVER.search("mastodon, method")
    assert MACHINE_PATH.search("see /" + "work/main") and MACHINE_PATH.search("'/" + "tmp/x'")
    assert not MACHINE_PATH.search("a/work/b or https://host/home/x or docs/tmp/x")
    assert REGISTRY.search("https://" + "pypi" + ".org/simple") and not REGISTRY.search("https://example.org")


def test_the_files_are_found() -> None:
    assert {"infomerge", "fastvid", "random", "unified", "hieravid"} <= {p.stem for p in METHOD_FILES}
    assert {"llava_onevision"} <= {p.stem for p in BACKBONE_FILES}
    assert {"density_peaks", "merge"} <= {folder.name for folder in OPS}
    found = {name_of(p) for p in text_files()}
    assert {
        "pyproject.toml",
        "vidcompress/tokens.py",
        "configs/fastvid.yaml",
        "tests/test_house.py",
        ".ci/run",
    } <= found


# -- one method, one file, one YAML ------------------------------------------------------------------------------------
def test_a_method_is_a_file_and_a_yaml_of_its_name() -> None:
    names = set(list_methods())
    assert {p.stem for p in METHOD_FILES} == names
    assert {p.stem for p in (ROOT / "configs").glob("*.yaml")} == names | set(list_presets())
    assert set(list_presets().values()) <= names
    for name, cls in list_methods().items():
        assert cls.__module__ == f"vidcompress.methods.{name}" and cls.name == name
        assert cls.__name__.lower() == name.replace("_", "")


@every_method_file
def test_a_method_file_is_short(path: Path) -> None:
    assert lines(path) < METHOD_LINES


@every_method_file
def test_a_method_decides_and_moves_nothing(path: Path) -> None:
    words = r"attention_mask|position_ids|past_key_values|register_\w*hook|isinstance|nn\.Module|transformers"
    assert not re.findall(words, path.read_text(encoding="utf-8"))


@every_method_file
def test_a_method_file_says_what_it_is(path: Path) -> None:
    doc = ast.get_docstring(tree(path))
    assert doc and len(doc.split()) >= 10
    classes = [n for n in tree(path).body if isinstance(n, ast.ClassDef) and is_public(n.name)]
    assert len(classes) == 1


@pytest.mark.parametrize("path", BACKBONE_FILES, ids=name_of)
def test_a_backbone_is_a_page(path: Path) -> None:
    assert lines(path) < BACKBONE_LINES


def test_the_base_of_backbones_is_short() -> None:
    assert lines(ROOT / "patches" / "base.py") < BASE_LINES


@every_file
def test_functions_are_short(path: Path) -> None:
    long = {f.name: n for f in functions(tree(path)) if (n := f.end_lineno - f.lineno + 1) > FUNCTION_LINES}
    assert not long


# -- settings and YAML -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", sorted(list_methods()))
def test_every_setting_is_explained(name: str) -> None:
    docs = {f.name: f.metadata.get("doc") for f in fields(list_methods()[name])}
    assert all(isinstance(doc, str) and len(doc) > 10 for doc in docs.values()), docs
    assert docs.keys() >= {f.name for f in fields(Method)}


@pytest.mark.parametrize("name", sorted(list_methods()))
def test_a_yaml_holds_settings_with_a_source(name: str) -> None:
    text = (ROOT / "configs" / f"{name}.yaml").read_text(encoding="utf-8")
    content = yaml.safe_load(text)
    settings = {f.name for f in fields(list_methods()[name])}
    assert content["method"] == name and content["paper"]["title"]
    assert set(content) - DOCUMENTATION - {"method"} <= settings
    for ratio, row in (content.get("presets") or {}).items():
        assert 0 < ratio <= 1 and set(row) <= settings - {"retention_ratio"}
    for key in ("differs", "paper"):
        assert content.get(key, True)
    # A value of a paper stands beside the paper's words for it, or beside what it is for.
    if "arxiv" in content["paper"] or "code" in content["paper"]:
        values = text[text.index("\nretention_ratio:") :].splitlines()
        bare = [line for line in values if re.match(r"\w+:", line) and "#" not in line]
        assert not bare


@pytest.mark.parametrize("name", sorted(list_presets()))
def test_a_named_preset_is_a_short_yaml(name: str) -> None:
    # It says its method, and with a source what else it changes; all else is said where the method is.
    text = (ROOT / "configs" / f"{name}.yaml").read_text(encoding="utf-8")
    content = yaml.safe_load(text)
    method = list_presets()[name]
    assert content["method"] == method and name.startswith(f"{method}-")
    assert len(content) > 1
    assert set(content) - {"method"} <= {f.name for f in fields(list_methods()[method])}
    first, *values = text.splitlines()
    assert first == f"method: {method}"
    assert all(re.match(r"\w+: +[^#\s][^#]*# +\w", line) for line in values), values


# -- imports -----------------------------------------------------------------------------------------------------------
ARROWS = {
    "ops": {"ops"},
    "precision": set(),
    "tokens": {"ops", "precision"},
    "method": {"tokens", "precision"},
    "first_look": {"method", "tokens"},
    "methods": {"first_look", "method", "methods", "tokens", "ops"},
    "config": {"method"},
    "costs": {"method", "tokens", "patches", "models"},
    "models": {"models"},
    "trace": {"tokens"},
    "engine": {"engine", "patches", "config", "method", "first_look", "tokens", "trace", "ops", "compat", "precision"},
    "patches": {"patches", "engine", "method", "tokens"},
    "serving": {"serving", "patches", "engine", "config", "method", "tokens", "precision"},
    "compat": set(),
    "video": {"compat"},
    "configs": set(),
}
"""What a part of the library may import of it; a part that is not listed may import all but the tops."""

TOPS = {"cli", "__main__", "commands", "demo", "eval", "integrations", "papers", "report", "serving"}
"""What only its like may import."""


SPEAKERS = {"cli", "__main__", "commands", "demo"}
"""What may print."""


def parts(path: Path) -> set[str]:
    """The parts of the library that a file imports."""
    name = module_of(path)
    inside = [m for m in imports(tree(path), name, path.name == "__init__.py") if m.startswith("vidcompress.")]
    return {m.split(".")[1] for m in inside}


LIBRARY = {p.stem if p.parent == PACKAGE else p.parent.name for p in FILES if p.stem != "__init__"} | {
    p.name for p in PACKAGE.iterdir() if (p / "__init__.py").exists()
}


@every_file
def test_imports_point_one_way(path: Path) -> None:
    own = (module_of(path).split(".") + [""])[1]
    if not own:
        return  # the package itself names everything, to look it up on first use
    used = {part for part in parts(path) if part in LIBRARY | {"patches", "configs"}}
    if own == "method":
        used -= {"methods"}  # discovery by folder; held by the next test
    allowed = ARROWS.get(own)
    assert used <= allowed if allowed is not None else own in TOPS or not used & TOPS, f"{own} imports {sorted(used)}"


def method_files_in(path: Path) -> set[str]:
    """The methods whose files a file imports."""
    used = imports(tree(path), module_of(path), path.name == "__init__.py")
    return {m.split(".")[2] for m in used if m.startswith("vidcompress.methods.")} & set(list_methods())


def test_nothing_names_a_method_file() -> None:
    # But a method that is made of others.
    named = {name_of(path): found for path in FILES if path not in METHOD_FILES and (found := method_files_in(path))}
    assert not named


@every_method_file
def test_a_method_names_only_what_it_is_made_of(path: Path) -> None:
    made_of = {base.name for base in list_methods()[path.stem].__mro__[1:] if base in list_methods().values()}
    assert method_files_in(path) == made_of


@every_file
def test_ops_need_torch_and_nothing_else(path: Path) -> None:
    if module_of(path).startswith("vidcompress.ops"):
        outside = {m.split(".")[0] for m in imports(tree(path), module_of(path), path.name == "__init__.py")}
        kernels = {"triton"} if path.stem.startswith(("kernel", "launch")) else set()
        assert outside <= {"torch", "vidcompress", *kernels, *sys.stdlib_module_names}


def test_there_is_no_import_cycle() -> None:
    """Over what runs at import time; types and what a function imports on first use do not count."""
    graph: dict[str, set[str]] = {}
    known = {module_of(p) for p in FILES}
    for path in FILES:
        module = tree(path)
        at_import = [n for n in module.body if not (isinstance(n, ast.If) and "TYPE_CHECKING" in ast.unparse(n.test))]
        top = ast.Module([n for n in at_import if isinstance(n, (ast.Import, ast.ImportFrom))], [])
        used = imports(top, module_of(path), path.name == "__init__.py") & known
        graph[module_of(path)] = used - {module_of(path), "vidcompress"}
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join([*trail[trail.index(name) :], name])
        if name not in done:
            for other in sorted(graph[name]):
                visit(other, (*trail, name))
            done.add(name)

    for name in sorted(graph):
        visit(name, ())


def test_importing_costs_nothing() -> None:
    code = """
import sys, os
before, environment = set(sys.modules), dict(os.environ)
import vidcompress
dir(vidcompress), vidcompress.__version__, vidcompress.__all__
heavy = {m.split(".")[0] for m in set(sys.modules) - before} - set(sys.stdlib_module_names) - {"vidcompress"}
print(sorted(m for m in heavy if not m.startswith(("_", "distutils"))), dict(os.environ) == environment)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert run.stdout.split("\n")[0] == "[] True" and not run.stderr


def test_public_names_resolve() -> None:
    assert len(vidcompress.__all__) == len(set(vidcompress.__all__)) <= PUBLIC_NAMES
    for name in vidcompress.__all__:
        assert getattr(vidcompress, name) is not None
        assert name in dir(vidcompress)
    with pytest.raises(AttributeError, match="no attribute 'nothing_of_the_kind'"):
        _ = vidcompress.nothing_of_the_kind
    typed = [
        n for n in tree(PACKAGE / "__init__.py").body if isinstance(n, ast.If) and "TYPE_CHECKING" in ast.unparse(n)
    ]
    named = {
        alias.name for block in typed for n in ast.walk(block) if isinstance(n, ast.ImportFrom) for alias in n.names
    }
    assert named == set(vidcompress.__all__) - {"__version__"}


# -- typed and documented ----------------------------------------------------------------------------------------------
@every_file
def test_public_functions_are_typed(path: Path) -> None:
    missing = untyped(tree(path))
    assert not missing


@functools.cache
def documented_bases() -> dict[str, set[str]]:
    """Of every class of the library: the method names that a base class, however far up, documents."""
    own: dict[str, set[str]] = {}
    bases: dict[str, list[str]] = {}
    for path in FILES:
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.ClassDef):
                own[node.name] = {name for name, member in public_members(node.body) if ast.get_docstring(member)}
                bases[node.name] = [base.id for base in node.bases if isinstance(base, ast.Name)]

    def above(name: str) -> set[str]:
        return set().union(*(own.get(base, set()) | above(base) for base in bases.get(name, [])))

    return {name: above(name) for name in own}


def faster(folder: Path) -> list[str]:
    """What an op has beside its definition."""
    return [kind for kind in ("torch", "kernel") if (folder / f"{kind}.py").exists()]


@every_file
def test_public_functions_are_documented(path: Path) -> None:
    assert ast.get_docstring(tree(path)) or path.parent in OPS or path.stem == "__init__"
    if path.parent in OPS and path.stem != "__init__" and faster(path.parent):
        return  # the folder's __init__ documents what its implementations have in common
    missing = undocumented(tree(path), documented_bases(), path in METHOD_FILES + BACKBONE_FILES)
    assert not missing


def test_what_help_shows_is_documented() -> None:
    for name in vidcompress.__all__:
        member = getattr(vidcompress, name)
        if inspect.isclass(member) or inspect.isfunction(member):
            assert inspect.getdoc(member), name


# -- ops ---------------------------------------------------------------------------------------------------------------
@every_op
def test_an_op_has_a_definition_and_one_signature(folder: Path) -> None:
    name = folder.name
    signatures = {}
    for kind in ("__init__", "naive", "torch", "kernel"):
        path = folder / f"{kind}.py"
        for node in tree(path).body if path.exists() else []:
            if isinstance(node, ast.FunctionDef) and node.name == name:
                signatures[kind] = (ast.unparse(node.args), node.returns and ast.unparse(node.returns))
    assert "naive" in signatures
    assert len(set(signatures.values())) == 1, signatures
    assert (folder / "torch.py").exists() == ("torch" in signatures)
    assert bool(faster(folder)) == ("__init__" in signatures)
    assert lines(folder / "naive.py") < 60


@every_op
def test_an_op_does_not_need_the_name_of_its_own_module(folder: Path) -> None:
    # Python binds <op>.torch to the folder's torch.py once that is imported, whatever __init__.py called torch.
    if (folder / "torch.py").exists():
        names = [
            a.asname or a.name
            for n in ast.walk(tree(folder / "__init__.py"))
            if isinstance(n, ast.Import)
            for a in n.names
        ]
        assert "torch" not in names


def test_every_op_is_exported() -> None:
    from vidcompress import ops

    assert ops.__all__ == [folder.name for folder in OPS]
    assert all(inspect.isfunction(getattr(ops, name)) for name in ops.__all__)


# -- tidiness ----------------------------------------------------------------------------------------------------------
@every_file
def test_nothing_prints(path: Path) -> None:
    if (module_of(path).split(".") + [""])[1] not in SPEAKERS:
        assert not prints(tree(path))


ENVIRONMENT = {"VIDCOMPRESS_OPS", "HF_HOME", "HF_HUB_OFFLINE", "HF_HUB_CACHE", "XDG_CACHE_HOME"}
LAUNCHERS = {"RANK", "WORLD_SIZE", "LOCAL_RANK"}
"""Which process of several this is; read where a run is shared out, and nowhere else."""


@every_file
def test_no_setting_hides_in_the_environment(path: Path) -> None:
    allowed = ENVIRONMENT | (LAUNCHERS if module_of(path) == "vidcompress.integrations.processes" else set())
    assert set(environment_reads(tree(path))) <= allowed


def test_nothing_is_left_to_do() -> None:
    found = [name_of(p) for p in text_files() if LEFTOVER.search(p.read_text(encoding="utf-8"))]
    assert not found


def test_no_file_names_this_machine_or_a_registry() -> None:
    found = []
    for path in text_files():
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if MACHINE_PATH.search(line) or REGISTRY.search(line):
                found.append(f"{name_of(path)}:{number}: {line.strip()}")
    assert not found


def test_documents_that_are_named_are_there() -> None:
    named = {
        (path, word)
        for path in text_files()
        if path.suffix in (".py", ".yaml", ".md")
        for word in re.findall(r"(?<![\w/*<{.-])[\w./-]*\w\.md\b(?!\w)", path.read_text(encoding="utf-8"))
    }
    missing = sorted(
        f"{name_of(path)}: {word}"
        for path, word in named
        if not any((base / word).exists() for base in (ROOT, path.parent))
    )
    assert not missing


@every_file
def test_annotations_are_not_evaluated(path: Path) -> None:
    module = tree(path)
    if any(True for _ in functions(module)):
        futures = [n for n in module.body if isinstance(n, ast.ImportFrom) and n.module == "__future__"]
        assert any(alias.name == "annotations" for n in futures for alias in n.names)


def test_configs_travel_with_the_package() -> None:
    shipped = {p.name for p in importlib.resources.files("vidcompress.configs").iterdir() if p.name.endswith(".yaml")}
    assert shipped == {f"{name}.yaml" for name in [*list_methods(), *list_presets()]}
