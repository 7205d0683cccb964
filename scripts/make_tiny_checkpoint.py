"""Saves the demo's tiny LLaVA-OneVision (random weights) with tokenizer and processor: FOLDER as the only argument."""

from __future__ import annotations

import sys
from pathlib import Path


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit("usage: python scripts/make_tiny_checkpoint.py FOLDER")
    from vidcompress.compat import ensure_torchvision

    ensure_torchvision()
    from vidcompress.demo import make_checkpoint

    print(make_checkpoint(Path(sys.argv[1])))


if __name__ == "__main__":
    main()
