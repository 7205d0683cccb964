"""Writes the generated tables into README.md, between their marks. `--check` only says whether they are stale."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

from safetensors import safe_open

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"

OFFICIAL = {
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


def render(text: str) -> str:
    """The README with fresh tables; ValueError if a mark is missing."""
    from vidcompress.compat import ensure_torchvision

    ensure_torchvision()
    from vidcompress.tables import backbone_rows, markdown, method_rows

    header, methods = method_rows()
    methods = [(*row, recorded(row[0])) for row in methods]
    for name, rows in (("methods", ((*header, "recorded cases equal"), methods)), ("backbones", backbone_rows())):
        mark = re.compile(f"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        if not mark.search(text):
            raise ValueError(f"README.md has no marks <!-- {name} --> ... <!-- /{name} -->")
        text = mark.sub(lambda m, rows=rows: m[1] + markdown(rows) + "\n" + m[2], text)
    return text


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
    text = README.read_text(encoding="utf-8")
    fresh = render(text)
    if "--check" in sys.argv:
        sys.exit("README.md's tables are stale: run `make tables`" if fresh != text else 0)
    README.write_text(fresh, encoding="utf-8")


if __name__ == "__main__":
    main()
