"""Tokens as SVG paths, in units of a token; lengths over layers, equal ones together."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from vidcompress.report.tokens import TokenMap


def overlay(tokens: TokenMap, row: int) -> list[tuple[int, int, str]]:
    """(place, content, path) of one row of the grid: the tokens that share the numbers of `TokenMap`.

    What never had its place after a stage is drawn in runs along its line, everything else token by token, so that it
    can be outlined.
    """
    t, h, w = tokens.grid
    place, content = (x.view(t, h, w)[row].tolist() for x in (tokens.place, tokens.content))
    paths: dict[tuple[int, int], list[str]] = {}
    for y in range(h):
        keys = list(zip(place[y], content[y], strict=True))
        for key, run in groupby(range(w), key=lambda x: keys[x]):
            xs = list(run)
            spans = [(xs[0], len(xs))] if key[0] == 0 else [(x, 1) for x in xs]
            paths.setdefault(key, []).extend(f"M{x} {y}h{n}v1h-{n}z" for x, n in spans)
    return [(*key, "".join(parts)) for key, parts in sorted(paths.items())]


def runs(lengths: Sequence[int]) -> list[tuple[int, int, int]]:
    """(first layer, last layer, tokens) of equal neighbours."""
    found = []
    for n, run in groupby(range(len(lengths)), key=lambda i: lengths[i]):
        layers = list(run)
        found.append((layers[0], layers[-1], n))
    return found
