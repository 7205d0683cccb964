"""From what a user writes (a name, a YAML file, a dict, a Method, a list of these) to a `Method` or a `Pipeline`.

Settings are laid over each other in this order, later ones win: the class's defaults, the shipped YAML of the method,
the YAML's preset row nearest to the retention ratio, the user's own file or dict, keyword overrides.
"""

from __future__ import annotations

import importlib.resources
import os
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from vidcompress.method import Method, Pipeline, did_you_mean, list_methods

Compression = str | os.PathLike | Mapping[str, Any] | Method | Pipeline | Sequence[Any]

DOCUMENTATION = frozenset({"paper", "differs", "presets"})
"""Keys of a YAML that describe the method and are not settings of it."""


def load(compression: Compression, **overrides: Any) -> Method | Pipeline:
    """A ready `Method`, or a `Pipeline` for a list.

    Args:
        compression: a method's name ("infomerge") or a named preset's ("hieravid-30"), a YAML path, a mapping with the
            key `method`, a `Method`, or a list
            of these for a pipeline. A `Method` is used as it stands: constructing a class applies no preset.
        overrides: settings that win over all others, e.g. `retention_ratio=0.1`.

    Raises:
        ValueError: unknown method or setting (the nearest name is suggested), a value out of range, YAML that is not
            a mapping or a list.
        TypeError: a setting of the wrong type, or something that is no compression at all.
        FileNotFoundError: a YAML path that does not exist.
    """
    if isinstance(compression, Pipeline) or (isinstance(compression, Sequence) and not isinstance(compression, str)):
        if overrides:
            raise ValueError(f"settings {sorted(overrides)} are ambiguous for a pipeline; give them in its entries")
        if isinstance(compression, Pipeline):
            return compression
        methods: list[Method] = []
        for entry in compression:
            part = load(entry)
            methods.extend(part if isinstance(part, Pipeline) else [part])
        return Pipeline(methods)
    if isinstance(compression, Method):
        _refuse_unknown(type(compression), overrides)
        if not overrides:
            return compression
        return _agreed(replace(compression, **_follow_presets(compression, overrides)), overrides)
    if isinstance(compression, Mapping):
        return _build(dict(compression), overrides, "this mapping")
    if isinstance(compression, str) and not _is_path(compression):
        return _build({"method": compression}, overrides, "")
    if isinstance(compression, (str, os.PathLike)):
        path = Path(compression)
        content = read_yaml(path)
        if isinstance(content, list):
            return load(content, **overrides)
        return _build(content, overrides, f"{path}")
    raise TypeError(
        "compression must be a method's name, a YAML path, a mapping, a Method or a list of these, "
        f"got {type(compression).__name__}"
    )


def shipped(name: str) -> dict[str, Any]:
    """The shipped YAML of a method or of a named preset, as a mapping."""
    return read_yaml(importlib.resources.files("vidcompress.configs") / f"{name}.yaml")


def list_presets() -> dict[str, str]:
    """Every named preset ("hieravid-30") and its method: a shipped YAML that is called after its method and more."""
    stems = [f.name.removesuffix(".yaml") for f in importlib.resources.files("vidcompress.configs").iterdir()]
    return {stem: stem.partition("-")[0] for stem in sorted(stems) if "-" in stem}


def read_yaml(path: Any) -> Any:
    """The content of a YAML file; ValueError unless it is a mapping or a list."""
    import yaml

    class Strict(yaml.SafeLoader):
        """Refuses a key that is given twice, of which YAML would silently use the last."""

        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            seen = set()
            for key, _ in node.value:
                if isinstance(key, yaml.ScalarNode) and key.value in seen:
                    raise ValueError(f"{path}, line {key.start_mark.line + 1}: {key.value!r} is given twice")
                seen.add(key.value if isinstance(key, yaml.ScalarNode) else id(key))
            return super().construct_mapping(node, deep)

    if not path.is_file():
        raise FileNotFoundError(f"no such YAML file: {path}")
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Strict)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    if not isinstance(content, (dict, list)):
        raise ValueError(f"{path} must hold a mapping with the key `method` (or a list of such), got {content!r:.60}")
    return content


def preset_for(presets: Mapping[float, Mapping[str, Any]], retention_ratio: float) -> dict[str, Any]:
    """The preset row whose ratio is nearest to `retention_ratio`; the smaller one when two are equally near.

    Raises ValueError if `presets` is no mapping from ratios to settings.
    """
    rows = presets.items() if isinstance(presets, Mapping) else [(None, presets)]
    for ratio, row in rows:
        if isinstance(ratio, bool) or not isinstance(ratio, (int, float)) or not isinstance(row, Mapping):
            raise ValueError(f"presets must map ratios to settings, as 0.1: {{key: value}}; got {ratio}: {row!r}")
    if not presets:
        return {}
    return dict(presets[min(presets, key=lambda r: (round(abs(r - retention_ratio), 12), r))])


def _build(given: dict[str, Any], overrides: dict[str, Any], where: str) -> Method:
    known, named = list_methods(), list_presets()
    name = given.pop("method", None)
    if not isinstance(name, str):
        raise ValueError(f"{where} must name its `method` (one of: {', '.join(known)}), got {name!r}")
    if name in named:
        if "retention_ratio" in given or "retention_ratio" in overrides:
            raise ValueError(f"{name} fixes retention_ratio; use {named[name]!r} with one of your own")
        given, name = shipped(name) | given, named[name]
        del given["method"]
    if name not in known:
        words = [*known, *named]
        raise ValueError(f"unknown compression {name!r}{did_you_mean(name, words)}; available: {', '.join(words)}")
    cls = known[name]
    base = shipped(name)
    presets = given.get("presets") or base.get("presets") or {}
    user = {k: v for k, v in given.items() if k not in DOCUMENTATION} | overrides
    _refuse_unknown(cls, user)
    defaults = {k: v for k, v in base.items() if k not in DOCUMENTATION and k != "method"}
    if presets:
        ratio: Any = user.get("retention_ratio", defaults.get("retention_ratio"))
        cls(retention_ratio=ratio)  # a bad ratio is refused before it picks a row
        row = preset_for(presets, ratio)
        _refuse_unknown(cls, row)
        defaults |= row
    return _agreed(cls(**(defaults | user)), user)


def _agreed(method: Method, overrides: Mapping[str, Any]) -> Method:
    """ValueError if other settings fix the ratio that was asked for at another value."""
    wanted = overrides.get("retention_ratio", method.retention_ratio)
    if wanted != method.retention_ratio:
        raise ValueError(
            f"{method.name}: retention_ratio={wanted} contradicts other settings, which fix it at "
            f"{method.retention_ratio:.4g}; set those to null"
        )
    return method


def _follow_presets(method: Method, overrides: dict[str, Any]) -> dict[str, Any]:
    """With a new ratio, fields that stand at the old ratio's preset move to the new one's; others were chosen."""
    presets = shipped(method.name).get("presets") if method.name in list_methods() else None
    if not presets or "retention_ratio" not in overrides:
        return overrides
    type(method)(retention_ratio=overrides["retention_ratio"])  # a bad ratio is refused before it picks a row
    old, new = (preset_for(presets, ratio) for ratio in (method.retention_ratio, overrides["retention_ratio"]))
    moved = {key: value for key, value in new.items() if key in old and getattr(method, key) == old[key]}
    return moved | overrides


def _refuse_unknown(cls: type[Method], given: Mapping[str, Any]) -> None:
    names = [f.name for f in fields(cls)]
    for key in given:
        if key not in names:
            hint = did_you_mean(str(key), names)
            raise ValueError(f"{cls.name} has no setting {key!r}{hint}; it has: {', '.join(names)}")


def _is_path(text: str) -> bool:
    return text.endswith((".yaml", ".yml")) or os.sep in text
