"""Writes the frozen evaluation set of vidcompress.eval.tinyqa. Its answers change with it: retrain and re-evaluate."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from vidcompress.eval.tinyqa.frozen import make

FOLDER = Path(__file__).parent.parent / "vidcompress" / "eval" / "tinyqa" / "data"


def main() -> None:
    """Draws clips and questions anew."""
    arrays, questions = make()
    FOLDER.mkdir(exist_ok=True)
    np.savez_compressed(FOLDER / "clips.npz", **arrays)
    lines = ",\n".join(json.dumps(of_clip) for of_clip in questions)
    (FOLDER / "questions.json").write_text(f"[{lines}]\n", encoding="utf-8")
    size = (FOLDER / "clips.npz").stat().st_size
    print(f"{len(questions)} clips, {sum(map(len, questions))} questions, {size} bytes")


if __name__ == "__main__":
    main()
