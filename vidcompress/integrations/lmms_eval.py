"""What lmms-eval finds under the entry point group `lmms_eval.models`: `lmms-eval --model vidcompress`.

lmms-eval loads this in every run, also of other models, so nothing heavy is imported here. Run as a module it is
lmms-eval itself on a machine whose torch knows no GPU, where lmms-eval would die while it imports torchvision:
`python -m vidcompress.integrations.lmms_eval --model vidcompress ...`, also under torchrun.
"""

from __future__ import annotations

from typing import Any


def manifests() -> list[Any]:
    """lmms-eval's manifest of the model class, which is imported when a run asks for it."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return [ModelManifest("vidcompress", chat_class_path="vidcompress.integrations.lmms_eval_model.VidCompress")]


def main() -> None:
    """lmms-eval's command line, after `vidcompress.compat.ensure_torchvision`."""
    from vidcompress.compat import ensure_torchvision, require

    require("eval", "lmms_eval")
    ensure_torchvision()
    from lmms_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()
