"""Makes the torchvision of this environment importable beside a CPU-only torch, in every process from now on.

What `vidcompress.compat.ensure_torchvision` does for one process, written into the installation: vLLM starts processes
of its own. For test environments only.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

MARK = "# healed for a CPU-only torch\n"
CURE = f"""{MARK}import torch as _torch

_healed = _torch.library.Library("torchvision", "FRAGMENT")
for _name in ("nms", "qnms"):
    if not hasattr(_torch.ops.torchvision, _name):
        _healed.define(_name + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""


def main() -> None:
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        raise SystemExit("torchvision is not installed here")
    path = Path(spec.origin)
    text = path.read_text(encoding="utf-8")
    if MARK not in text:
        path.write_text(CURE + text, encoding="utf-8")
    importlib.import_module("torchvision")


if __name__ == "__main__":
    main()
