"""Writes a frozen evaluation set of vidcompress.eval.tinyqa. Its answers change with it: re-evaluate.

python scripts/make_tinyqa.py tinyqa-wide
"""

from __future__ import annotations

import argparse
import json

import numpy as np

from vidcompress.eval.tinyqa.frozen import EDITIONS, data, make


def main() -> None:
    """Draws clips and questions anew."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suite", choices=sorted(EDITIONS), help="the set whose files are overwritten")
    suite = parser.parse_args().suite
    arrays, questions = make(suite)
    pixels, words = data(suite)
    pixels.parent.mkdir(exist_ok=True)
    np.savez_compressed(pixels, **arrays)
    lines = ",\n".join(json.dumps(of_clip) for of_clip in questions)
    words.write_text(f"[{lines}]\n", encoding="utf-8")
    print(f"{len(questions)} clips, {sum(map(len, questions))} questions, {pixels.stat().st_size} bytes")


if __name__ == "__main__":
    main()
