"""Writes the generated tables into README.md, between their marks. `--check` only says whether they are stale."""

from __future__ import annotations

import re
import sys
from pathlib import Path

README = Path(__file__).parent.parent / "README.md"


def render(text: str) -> str:
    """The README with fresh tables; ValueError if a mark is missing."""
    from vidcompress.compat import ensure_torchvision

    ensure_torchvision()
    from vidcompress.tables import backbone_rows, markdown, method_rows

    for name, rows in (("methods", method_rows()), ("backbones", backbone_rows())):
        mark = re.compile(f"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        if not mark.search(text):
            raise ValueError(f"README.md has no marks <!-- {name} --> ... <!-- /{name} -->")
        text = mark.sub(lambda m, rows=rows: m[1] + markdown(rows) + "\n" + m[2], text)
    return text


def main() -> None:
    text = README.read_text(encoding="utf-8")
    fresh = render(text)
    if "--check" in sys.argv:
        sys.exit("README.md's tables are stale: run `make tables`" if fresh != text else 0)
    README.write_text(fresh, encoding="utf-8")


if __name__ == "__main__":
    main()
