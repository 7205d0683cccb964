"""Optional dependencies: a clear word when one is missing, and the cure for torchvision beside a CPU-only torch.

Importing this module costs nothing: torch, torchvision and transformers are imported inside the functions only.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import re
import sys
from typing import Any

_logger = logging.getLogger("vidcompress")

# The operators whose fake kernels torchvision registers at import, with the schemas its own C++ extension gives them.
_OPERATORS = {
    "nms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}
_SYMPTOM = re.compile(rf"operator torchvision::({'|'.join(_OPERATORS)}) does not exist")

# A torch.library.Library takes its definitions with it when it is collected, so the healed one lives here.
_library: Any = None


def ensure_torchvision() -> bool:
    """Import torchvision, healing the one way in which a sound installation of it fails on a CPU-only torch.

    The package index's torchvision wheel is built for CUDA. Beside a CPU-only torch its C++ extension does not load, so
    the operators ``torchvision::nms`` and ``torchvision::qnms`` have no schema, ``import torchvision`` dies with
    "operator torchvision::nms does not exist", and every video model and processor of transformers dies with it.
    In exactly that case the two schemas are declared and torchvision is imported again. Its transforms, which is all
    that video processors use, then work; the two operators themselves, which serve object detection, still do not.

    Call it before transformers is imported. Called later it still helps: transformers looks torchvision up lazily, and
    a class whose import failed is imported anew on the next attempt. The one thing it cannot undo is transformers
    having noted that no torchvision is installed (it was installed while the process ran); that is logged as a
    warning, for only a new process helps. Calling it again is harmless.

    Returns:
        True when torchvision is importable, False when it is not installed.

    Raises:
        Exception: whatever else ``import torchvision`` raises, unchanged; also the error above when torch is built for
            a GPU, where it means that the versions of torch and torchvision do not fit each other.
    """
    if _missing("torchvision"):
        return False
    try:
        importlib.import_module("torchvision")
    except RuntimeError as error:
        if not _SYMPTOM.search(str(error)) or not _torch_is_cpu_only():
            raise
        _define_operators()
        importlib.import_module("torchvision")
        _logger.info("torchvision cannot load its C++ extension beside a CPU-only torch: declared nms and qnms for it")
    _warn_if_transformers_missed_it()
    return True


def require(extra: str, *modules: str) -> None:
    """Check that the modules behind an optional feature are installed, without importing them.

    Args:
        extra: the extra of this distribution that brings the modules, such as ``"video"``.
        modules: import names, such as ``"av"``.

    Raises:
        ImportError: a module is missing; the message names all that are missing, the extra and the command to run.
    """
    missing = [name for name in modules if _missing(name)]
    if missing:
        raise ImportError(
            f"{', '.join(missing)} not installed, needed for the extra {extra!r} of vidcompress: "
            f'pip install "vidcompress-transformers[{extra}]"',
            name=missing[0],
        )


def _missing(name: str) -> bool:
    if name in sys.modules:
        return sys.modules[name] is None
    return importlib.util.find_spec(name) is None


def _torch_is_cpu_only() -> bool:
    import torch

    return torch.version.cuda is None and torch.version.hip is None


def _define_operators() -> None:
    """Forget the half-imported torchvision and declare its operators, leaving alone those that exist."""
    global _library
    import torch

    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]
    library = torch.library.Library("torchvision", "FRAGMENT")
    for operator, schema in _OPERATORS.items():
        if not hasattr(torch.ops.torchvision, operator):
            library.define(operator + schema)
    _library = library


def _warn_if_transformers_missed_it() -> None:
    utils = sys.modules.get("transformers.utils.import_utils")
    if utils is not None and utils.is_vision_available() and not utils.is_torchvision_available():
        _logger.warning(
            "transformers was imported before torchvision could be found and takes it for not installed: "
            "start a new process for its video processors to work"
        )
