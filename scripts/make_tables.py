"""Writes generated tables between their marks: into README.md, and from benchmarks/results into docs.

`--check` only says whether they are stale.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path

from safetensors import safe_open

from vidcompress.compat import ensure_torchvision
from vidcompress.method import list_methods
from vidcompress.tables import Rows, backbone_rows, listed, markdown, method_rows

ROOT = Path(__file__).parent.parent
README, EVALUATION, BENCHMARKS = ROOT / "README.md", ROOT / "docs/evaluation.md", ROOT / "docs/benchmarks.md"
RESULTS = ROOT / "benchmarks" / "results"

OFFICIAL = {
    "dycoke": ["dycoke", "dycoke_decoding"],
    "dycoke_outer": ["dycoke"],
    "fastv": ["fastv"],
    "fastvid": ["fastvid", "fastvid_llava_video", "fastvid_qwen25vl"],
    "holitom": ["holitom_outer", "holitom_inner"],
    "prumerge_plus": ["prumerge"],
    "prunevid_inner": ["prunevid"],
    "prunevid_outer": ["prunevid"],
    "visionzip": ["visionzip_video", "visionzip_clip"],
}
"""Recordings of official codes (tests/golden) that a method equals, where they are not called like the method."""

REFERENCE = {
    "hieravid": ["hieravid"],
    "infomerge": ["infomerge"],
    "text_aware_merge": ["unified_inner"],
    "unified": ["unified", "unified_inner"],
    "unified_pool": ["unified"],
}
"""Those of an independent reference, for methods without official code."""


def render(text: str, tables: Mapping[str, Rows]) -> str:
    """A document with fresh tables; ValueError if a mark is missing."""
    for name, rows in tables.items():
        mark = re.compile(f"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        if not mark.search(text):
            raise ValueError(f"there are no marks <!-- {name} --> ... <!-- /{name} -->")
        text = mark.sub(lambda m, rows=rows: m[1] + markdown(rows) + "\n" + m[2], text)
    return text


def readme() -> dict[str, Rows]:
    """The tables of README.md."""
    ensure_torchvision()
    header, methods = method_rows()
    methods = [(*row, recorded(row[0])) for row in methods]
    return {"methods": ((*header, "recorded cases equal"), methods), "backbones": backbone_rows()}


def evaluation() -> dict[str, Rows]:
    """Those of docs/evaluation.md."""
    from vidcompress.eval.results import Results
    from vidcompress.eval.tables import accuracy_rows, cost_rows, kept_rows, type_rows

    found: dict[str, Rows] = {}
    for path in sorted(RESULTS.glob("tinyqa-*.json")):
        results, name = Results.load(path), path.stem.removeprefix("tinyqa-")
        found |= {f"accuracy {name}": accuracy_rows(results), f"types {name}": type_rows(results, 0.1)}
        if results.suite["name"] == "tinyqa":
            found |= {f"kept {name}": kept_rows(results), f"cost {name}": cost_rows(results, 0.1)}
    return found | {"suites agreement": suites()} | seeds()


def suites() -> Rows:
    """How alike the same model's answers to two suites order the methods."""
    from vidcompress.eval.results import Results
    from vidcompress.eval.trainings import alike

    plain, wide = (Results.load(RESULTS / f"tinyqa-{name}.json") for name in ("qwen2_vl", "wide-qwen2_vl"))
    ratios = (0.3, 0.2, 0.1, 0.05, 0.02)
    cells = tuple(f"{alike(plain, wide, ratio):.2f}" for ratio in ratios)
    return ("", *(f"{ratio:.0%}" for ratio in ratios)), [("rank correlation", *cells)]


def seeds() -> dict[str, Rows]:
    """Those of docs/evaluation.md about models trained alike but for their seed, with and without drops."""
    from vidcompress.eval.results import Results
    from vidcompress.eval.trainings import agreement_rows, common_types, method_rows, plain_rows

    folder = RESULTS / "seeds"
    trained = {
        name: [Results.load(path) for path in sorted(folder.glob(f"tinyqa-{name.replace(' ', '-')}-*.json"))]
        for name in ("without drops", "with drops")
    }
    types = {"all but count": [kind for kind in common_types(trained) if kind != "count"], "count": ["count"]}
    tables = {"seeds plain": plain_rows(trained), "seeds agreement": agreement_rows(trained)}
    return tables | {f"seeds {ratio:.0%}": method_rows(trained, ratio, types) for ratio in (0.1, 0.05)}


def benchmarks() -> dict[str, Rows]:
    """That of docs/benchmarks.md: times, accuracy at the same ratio on the tiny model, and why a method takes long."""
    from vidcompress.eval.results import Results
    from vidcompress.eval.tables import share

    report = json.loads((RESULTS / "methods-32x14x14-x86_64-cpu.json").read_text(encoding="utf-8"))
    accuracy = Results.load(RESULTS / "tinyqa-llava_onevision.json")
    header = ("method", "kept", "ms", "of FastVID", "MB", "prefill, TFLOPs", "tinyqa, %", "why it takes so long")
    rows: list[tuple[str, ...]] = []
    for row in report["rows"]:
        total = row["decide_ms"] + row["merge_ms"]
        why = list_methods()[row["method"]].costly if row["of_fastvid"] > 2 else ""
        cells = (f"{total:.0f}", f"{row['of_fastvid']:.2f}", f"{row['mb']}", f"{row['prefill_tflops']:.2f}")
        rows.append((row["method"], listed(row["kept"]), *cells, share(accuracy, row["method"], 0.1), why))
    return {"methods": (header, rows)}


def recorded(method: str) -> str:
    """How many recorded runs the tests compare with, and whose."""
    stems, whose = (
        (REFERENCE[method], "a slow reference") if method in REFERENCE else (OFFICIAL.get(method, [method]), "")
    )
    files = [path for stem in stems for path in (ROOT / "tests" / "golden").rglob(f"{stem}.safetensors")]
    count = 0
    for path in files:
        with safe_open(path, "pt") as file:
            count += len(json.loads(file.metadata()["cases"]))
    return f"{count} of {whose or 'the official code'}" if count else ""


def main() -> None:
    """Writes the documents, or says which is stale."""
    for path, tables in ((README, readme()), (EVALUATION, evaluation()), (BENCHMARKS, benchmarks())):
        text = path.read_text(encoding="utf-8")
        fresh = render(text, tables)
        if "--check" in sys.argv and fresh != text:
            sys.exit(f"{path.name}'s tables are stale: run `make tables`")
        path.write_text(fresh, encoding="utf-8")


if __name__ == "__main__":
    main()
