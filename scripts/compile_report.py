"""Counts the graphs that torch.compile makes of a compressed model's forward, prompt after prompt of other lengths.

    python scripts/compile_report.py --methods none,infomerge,unified

The model is the tiny LLaVA-OneVision that ships; graphs are traced and not built. Where a method acts inside the LLM
every decoder layer is a graph of the same function, so `torch._dynamo.config.recompile_limit` is raised (--limit).
"""

from __future__ import annotations

import argparse
import contextlib
import tempfile
from pathlib import Path

import torch
from torch._dynamo.testing import CompileCounter

import vidcompress
from vidcompress.compat import ensure_torchvision
from vidcompress.demo import make_clip
from vidcompress.eval import checkpoints
from vidcompress.video import load_video, prepare_inputs


def graphs(method: str, prompts: int) -> list[int]:
    """How many there are after each prompt, of which each is a word longer."""
    ensure_torchvision()  # looked for when transformers is imported
    from transformers import AutoModelForImageTextToText, AutoProcessor

    torch._dynamo.reset()
    checkpoint, counter, seen = checkpoints.path(), CompileCounter(), []
    model = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype="float32").eval()
    processor = AutoProcessor.from_pretrained(checkpoint)
    with tempfile.TemporaryDirectory() as folder:
        video = load_video(make_clip(Path(folder) / "clip.mp4"))
    with contextlib.nullcontext() if method == "none" else vidcompress.apply(model, method):
        model.forward = torch.compile(model.forward, backend=counter)
        for words in range(1, prompts + 1):
            inputs = prepare_inputs(processor, video, " ".join(["what"] * words + ["?"]))
            model.generate(**inputs, do_sample=False, min_new_tokens=8, max_new_tokens=8)
            seen.append(counter.frame_count)
    return seen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", default="none,fastvid,infomerge,unified,hieravid,dycoke", help="between commas")
    parser.add_argument("--prompts", type=int, default=5)
    parser.add_argument("--limit", type=int, default=64, help="recompile_limit; PyTorch's own is 8")
    options = parser.parse_args()
    with torch._dynamo.config.patch(recompile_limit=options.limit):
        for method in options.methods.split(","):
            print(f"{method:16} {graphs(method, options.prompts)}", flush=True)


if __name__ == "__main__":
    main()
