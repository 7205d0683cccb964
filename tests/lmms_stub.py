"""The four names of lmms-eval that vidcompress touches, as small as they can be, for environments without it.

What they promise is read from lmms-eval 0.7.3; `make test-lmms-eval` shows with lmms-eval itself that it is so.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import pytest


@dataclass
class TokenCounts:
    input_tokens: int | None = None
    output_tokens: int | None = None
    reasoning_tokens: int | None = None

    def to_dict(self) -> dict[str, Any]:
        return {"input_tokens": self.input_tokens, "output_tokens": self.output_tokens}


@dataclass
class GenerationResult:
    text: str
    token_counts: TokenCounts | None = None


class LMMS:
    def __init__(self) -> None:
        self._rank, self._world_size = 0, 1
        self.task_dict: dict[str, Any] = {}

    @property
    def rank(self) -> int:
        return self._rank

    @property
    def world_size(self) -> int:
        return self._world_size


@dataclass
class ModelManifest:
    model_id: str
    simple_class_path: str | None = None
    chat_class_path: str | None = None


@dataclass
class Request:
    """lmms-eval's Instance: what a model is asked."""

    args: tuple[Any, ...]
    metadata: dict[str, Any] = field(default_factory=dict)


def install(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Puts them where lmms-eval has them; returns the list that `log_metrics` fills."""
    logged: list[dict[str, Any]] = []
    contents = {
        "lmms_eval": {},
        "lmms_eval.api": {},
        "lmms_eval.api.instance": {"TokenCounts": TokenCounts, "GenerationResult": GenerationResult},
        "lmms_eval.api.model": {"lmms": LMMS},
        "lmms_eval.models": {},
        "lmms_eval.models.registry_v2": {"ModelManifest": ModelManifest},
        "lmms_eval.models.model_utils": {},
        "lmms_eval.models.model_utils.gen_metrics": {"log_metrics": lambda **given: logged.append(given)},
    }
    for name, members in contents.items():
        module = ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "vidcompress.integrations.lmms_eval_model", raising=False)
    return logged
