"""Recorded runs of official codes (golden/README.md)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

GOLDEN = Path(__file__).parent / "golden"


def recorded(stem: str, folder: str = "baselines") -> dict[str, tuple[dict[str, Any], dict[str, Tensor]]]:
    """{case: (facts, tensors)} of a file; indices as long."""
    with safe_open(GOLDEN / folder / f"{stem}.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        cases = json.loads(file.metadata()["cases"])
    tensors = {k: v.long() if v.dtype == torch.int32 else v for k, v in tensors.items()}
    return {
        name: (facts, {k.removeprefix(f"{name}."): v for k, v in tensors.items() if k.startswith(f"{name}.")})
        for name, facts in cases.items()
    }
