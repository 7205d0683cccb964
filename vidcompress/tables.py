"""The facts about methods and backbones as rows: printed by `vidcompress list`, written into the README."""

from __future__ import annotations

import sys

from vidcompress.config import load, shipped
from vidcompress.method import Method, list_methods

Rows = tuple[tuple[str, ...], list[tuple[str, ...]]]


def method_rows() -> Rows:
    """(header, rows): one row a shipped method."""
    header = ("method", "paper", "acts at", "needs", "kept of 32x14x14")
    rows: list[tuple[str, ...]] = []
    for name in list_methods():
        method, paper = load(name), shipped(name)["paper"]
        assert isinstance(method, Method)
        source = f"arXiv:{paper['arxiv']}" if "arxiv" in paper else paper["title"]
        needs = ", ".join(f"`{need}`" for need in sorted(method.needs)) or "nothing"
        kept = f"{method.budget((32, 14, 14))} at {method.retention_ratio:g}"
        rows.append((f"`{name}`", source, ", ".join(map(str, method.sites())), needs, kept))
    return header, rows


def backbone_rows() -> Rows:
    """(header, rows): one row a supported `model_type`."""
    from vidcompress.patches import backbones

    header = ("model_type", "what it is", "signals")
    rows: list[tuple[str, ...]] = []
    for kind, cls in backbones().items():
        about = (sys.modules[cls.__module__].__doc__ or "").splitlines()[0]
        rows.append((f"`{kind}`", about, ", ".join(f"`{s}`" for s in sorted(cls.provides))))
    return header, rows


def markdown(rows: Rows) -> str:
    """The rows as a Markdown table."""
    header, body = rows
    lines = [header, tuple("---" for _ in header), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
