"""lmms-eval itself, offline, on mp4 files: `make test-lmms-eval` runs these tests in an environment that has it.
Without the variable that it sets, nothing here is collected.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

if "VIDCOMPRESS_LMMS_EVAL" not in os.environ:
    collect_ignore_glob = ["*"]
else:
    os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported

    sys.path.append(str(Path(__file__).parents[1]))  # checkpoint.py

    from vidcompress.compat import ensure_torchvision

    ensure_torchvision()  # looked for when transformers is imported
