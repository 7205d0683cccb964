"""Trains a tiny video-LLM from scratch, on one CPU core or a GPU, to answer the questions of vidcompress.eval.tinyqa.

    python scripts/train_tiny.py --backbone llava_onevision --seed 0 --out checkpoints/tiny-llava-onevision

First tower and projector learn what every patch shows, then, with these kept, the language model learns to answer. The
checkpoint is bf16 in transformers' own format, with its processor; `training.json` beside it holds settings, versions,
learning curves, CPU time and time by the clock. `--drops` is the control: half of its batches lose 50 to 90 % of the
video's tokens at random. `--eyes` takes a finished first half, so that both runs of a seed may share it; `--after` a
finished checkpoint whose language model lacks the last part.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path

import torch

from vidcompress.compat import ensure_torchvision

ensure_torchvision()

import transformers  # noqa: E402  it reads torchvision at import
from tinytrain.language import PARTS, train_language  # noqa: E402
from tinytrain.models import STUDENTS  # noqa: E402
from tinytrain.vision import train_vision  # noqa: E402


def main() -> None:
    """Trains, saves, and says how long it took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", choices=sorted(STUDENTS), default="llava_onevision")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vision-steps", type=int, help="unless given, what the backbone needs")
    parser.add_argument("--language-steps", type=int, nargs="+", help="of every part, likewise")
    parser.add_argument("--drops", action="store_true", help="the control run: random tokens are left out")
    parser.add_argument("--eyes", type=Path, help="tower and projector of an earlier run: its eyes.pt")
    parser.add_argument("--after", type=Path, help="folder of an earlier run, which this one goes on with")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ...; weights begin alike on all")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    if len(args.language_steps or ()) > len(PARTS):
        parser.error(f"--language-steps has {len(args.language_steps)} numbers; there are {len(PARTS)} parts")
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error(f"--device {args.device}: this torch ({torch.__version__}) sees no GPU; use cpu")

    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    student = STUDENTS[args.backbone]()
    student.model.to(args.device)
    start, clock, before, seconds = time.process_time(), time.perf_counter(), 0.0, 0.0
    vision: list[dict[str, float]] = []
    language: list[dict[str, float]] = []
    parts = list(enumerate(args.language_steps or student.language_steps))
    if args.after:
        student.load(args.after)
        earlier = json.loads((args.after / "training.json").read_text())
        vision, language, before = earlier["vision"], earlier["language"], earlier["cpu_seconds"]
        seconds = earlier.get("seconds", before)  # a record without was made on one CPU core
        parts = parts[-1:]
    elif args.eyes is None:
        vision = train_vision(student, args.vision_steps or student.vision_steps, args.seed)
        states = [{name: value.cpu() for name, value in module.state_dict().items()} for module in student.eyes]
        torch.save(states, args.out / "eyes.pt")
    else:
        for module, state in zip(student.eyes, torch.load(args.eyes)):
            module.load_state_dict(state)
    for part, steps in parts:
        language += train_language(student, part, steps, args.seed, args.drops)
        student.round()  # so that going on with --after is the same
    student.model.cpu()
    student.save(args.out)
    record = {
        "backbone": args.backbone,
        "seed": args.seed,
        "drops": args.drops,
        "parameters": sum(p.numel() for p in student.model.parameters()),
        "device": args.device,
        "cpu_seconds": before + time.process_time() - start,
        "seconds": seconds + time.perf_counter() - clock,
        "threads": args.threads,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "machine": platform.machine(),
    }
    lines = [f'"{name}": {json.dumps(value)}' for name, value in record.items()]
    logs = {"vision": vision, "language": language}
    lines += [f'"{name}": [\n' + ",\n".join(map(json.dumps, log)) + "\n]" for name, log in logs.items()]
    (args.out / "training.json").write_text("{" + ",\n".join(lines) + "}\n")
    print(f"{args.out}: {record['cpu_seconds'] / 60:.0f} CPU minutes")


if __name__ == "__main__":
    main()
