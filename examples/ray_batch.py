"""Many questions about many videos, answered by a pool of Ray actors, each with a compressed model of its own.

    pip install "vidcompress-transformers[video]" "ray[data]"
    python examples/ray_batch.py questions.jsonl answers --model llava-hf/llava-onevision-qwen2-7b-ov-hf \\
        --compression infomerge --retention-ratio 0.1 --actors 8

Every line of questions.jsonl is {"id": ..., "video": a path or URL that the actors can read, "question": ...}; answers
is a folder. The driver alone writes: each answer goes to its disk as it comes, so that a run that was stopped at any
moment, started again with the same arguments, asks what is missing and nothing twice. A video that cannot be read gives
a row with the error. Anything else that fails stops the run.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import ray

from vidcompress.integrations.journal import Journal
from vidcompress.integrations.settings import Settings

FIELDS = ("id", "video", "question")


class Answers:
    """What an actor holds: a model, and the means to ask it."""

    def __init__(self, model_args: dict[str, Any], max_new_tokens: int) -> None:
        from vidcompress.compat import ensure_torchvision

        ensure_torchvision()  # before transformers is imported
        import torch
        from transformers import AutoProcessor

        import vidcompress
        from vidcompress.models import register

        register()
        self.settings, self.max_new_tokens = Settings.parse(model_args), max_new_tokens
        options = self.settings.loading("cuda" if torch.cuda.is_available() else "cpu")
        self.model = vidcompress.from_pretrained(self.settings.pretrained, **options).eval()
        self.processor = AutoProcessor.from_pretrained(self.settings.pretrained, **self.settings.hub())

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Columns of questions to columns of answers; rows whose videos have equally many frames go together."""
        from vidcompress.answering import Question, answer
        from vidcompress.video import load_video

        found: list[dict[str, Any]] = []
        groups: dict[Any, list[tuple[dict[str, Any], Question]]] = {}
        for values in zip(*(batch[name] for name in FIELDS)):
            row = dict(zip(FIELDS, map(str, values)))
            try:
                clip = load_video(row["video"], **self.settings.sampling())
            except (ValueError, OSError) as error:
                found.append(row | {"answer": None, "error": f"{type(error).__name__}: {error}", "cost": None})
                continue
            content = [{"type": "video"}, {"type": "text", "text": row["question"]}]
            question = Question([{"role": "user", "content": content}], [clip])
            groups.setdefault(question.shape, []).append((row, question))
        for group in groups.values():
            answers = answer(
                self.model, self.processor, [question for _, question in group], max_new_tokens=self.max_new_tokens
            )
            for (row, _), (text, cost) in zip(group, answers, strict=True):
                found.append(row | {"answer": text, "error": None, "cost": json.dumps(cost.to_dict())})
        return {name: [row[name] for row in found] for name in (*FIELDS, "answer", "error", "cost")}


def read_questions(path: Path) -> list[dict[str, str]]:
    """The questions; ValueError for a line that lacks something, and for an id that is there twice."""
    rows, seen = [], set()
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        row = json.loads(line)
        missing = [name for name in FIELDS if name not in row]
        if missing:
            raise ValueError(f"{path}, line {number} lacks {', '.join(missing)}; needed: {', '.join(FIELDS)}")
        if str(row["id"]) in seen:
            raise ValueError(
                f"{path}, line {number}: id {row['id']!r} is there twice; an answer belongs to one question"
            )
        seen.add(str(row["id"]))
        rows.append({name: str(row[name]) for name in FIELDS})
    return rows


def main() -> None:
    """Asks what is not answered yet."""
    options = parse()
    model_args = {
        "pretrained": options.model,
        "compression": options.compression,
        "retention_ratio": options.retention_ratio,
        "max_num_frames": options.num_frames,
        "dtype": options.dtype,
    }
    settings = Settings.parse(model_args)  # a mistake ends here, and not in every actor
    questions = read_questions(options.questions)
    journal = Journal(options.answers, settings.facts() | {"max_new_tokens": options.max_new_tokens})
    if options.retry_errors:
        journal.drop(lambda entry: entry["error"] is not None)
    known = {row["id"]: row for row in questions}
    for key, entry in journal.answers.items():
        if key in known and {name: entry[name] for name in FIELDS} != known[key]:
            raise ValueError(f"{options.answers}: id {key!r} was answered for another question or video")
    open_ = [row for row in questions if journal.get(row["id"]) is None]
    print(f"{len(questions)} questions, {len(open_)} to ask", flush=True)
    if open_:
        ray.init(address=options.address, num_cpus=None if options.address else max(2, options.actors + 1))
        asked = ray.data.from_items(open_).map_batches(
            Answers,
            fn_constructor_args=(model_args, options.max_new_tokens),
            batch_size=options.batch_size,
            num_gpus=options.gpus_per_actor,
            compute=ray.data.ActorPoolStrategy(size=options.actors),
        )
        for row in asked.iter_rows():
            cost = None if row["cost"] is None else json.loads(row["cost"])
            journal.add([dict(row) | {"key": row["id"], "cost": cost}])
    journal.close()
    failed = [row["id"] for row in questions if journal.answers[row["id"]]["error"] is not None]
    print(f"{len(questions) - len(failed)} answers, {len(failed)} errors in {options.answers}")
    if options.parquet:
        write_parquet(options.parquet, [journal.answers[row["id"]] for row in questions])


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    """All answers as one table, in the order of the questions."""
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("questions", type=Path, help="JSON Lines")
    parser.add_argument("answers", type=Path, help="folder, made if missing; kept between runs")
    parser.add_argument("--model", required=True, help="checkpoint: folder or hub id")
    parser.add_argument("--compression", help="method, preset or YAML; none without")
    parser.add_argument("--retention-ratio", type=float)
    parser.add_argument("--num-frames", type=int, default=32)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--actors", type=int, default=1, help="models at the same time")
    parser.add_argument("--batch-size", type=int, default=1, help="questions to a model at once")
    parser.add_argument("--gpus-per-actor", type=float, default=0, help="1 where there are GPUs")
    parser.add_argument("--address", help="of a Ray cluster, such as auto; default: one of this machine, for this run")
    parser.add_argument("--retry-errors", action="store_true", help="ask again where an error was written")
    parser.add_argument("--parquet", type=Path, help="also write all answers as one table")
    return parser.parse_args()


if __name__ == "__main__":
    main()
