"""examples/ray_batch.py with two actors: a run that is killed, one that goes on, a video that cannot be read."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from checkpoint import make_checkpoint, make_clip
from pyarrow import parquet
from transformers import AutoProcessor

import vidcompress
from vidcompress.measure import ask

EXAMPLE = Path(__file__).parents[2] / "examples" / "ray_batch.py"
QUESTIONS = 12
FRAMES = 8
STUCK, BAD = 4, 7
SETTINGS = ["--compression", "uniform_tokens", "--retention-ratio", "0.25", "--num-frames", str(FRAMES)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three clips, a file that is none, a pipe that nobody writes to, and questions about them."""
    folder = tmp_path_factory.mktemp("ray")
    make_checkpoint(folder / "model")
    clips = [make_clip(folder / f"{i}.mp4", frames=20 + 8 * i) for i in range(3)]
    (folder / "bad.mp4").write_bytes(b"no video")
    os.mkfifo(folder / "stuck.mp4")
    videos = {STUCK: folder / "stuck.mp4", BAD: folder / "bad.mp4"}
    rows = [
        {"id": i, "video": str(videos.get(i, clips[i % 3])), "question": f"What is in {i}?"} for i in range(QUESTIONS)
    ]
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def start(folder: Path, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, str(EXAMPLE), "questions.jsonl", "answers", "--model", "model", *SETTINGS]
    command += ["--max-new-tokens", "5", "--dtype", "float32", "--actors", "2", *more]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(EXAMPLE.parents[1])}
    return subprocess.Popen(
        command,
        cwd=folder,
        env=env,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def lines(folder: Path) -> list[dict[str, Any]]:
    path = folder / "answers" / "answers-0.jsonl"
    whole = path.read_text().split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in whole]


def test_a_killed_run_goes_on_without_loss_or_doubles(folder):
    first = start(folder)
    waited = time.monotonic() + 1200
    while len(lines(folder)) < 6:  # one actor waits for the pipe, so that this run cannot end by itself
        assert first.poll() is None and time.monotonic() < waited, first.communicate()[0]
        time.sleep(0.2)
    os.killpg(first.pid, signal.SIGKILL)
    first.communicate()
    kept = lines(folder)
    assert 6 <= len(kept) < QUESTIONS and str(STUCK) not in {row["id"] for row in kept}
    with (folder / "answers" / "answers-0.jsonl").open("a") as file:
        file.write('{"key": "3", "answer": "cut o')  # what a crash of the machine leaves

    (folder / "stuck.mp4").unlink()
    make_clip(folder / "stuck.mp4", frames=FRAMES - 2)
    second = start(folder, "--batch-size", "3", "--parquet", "all.parquet")
    printed, _ = second.communicate(timeout=1200)
    assert second.returncode == 0, printed
    assert f"{QUESTIONS} questions, {QUESTIONS - len(kept)} to ask" in printed
    assert f"{QUESTIONS - 1} answers, 1 errors" in printed
    found = lines(folder)
    assert found[: len(kept)] == kept
    assert sorted(int(row["id"]) for row in found) == list(range(QUESTIONS))
    (error,) = [row for row in found if row["error"]]
    assert error["id"] == str(BAD) and error["answer"] is None and "bad.mp4 is damaged" in error["error"]
    assert [row["id"] for row in parquet.read_table(folder / "all.parquet").to_pylist()] == [
        str(i) for i in range(QUESTIONS)
    ]


def test_the_answers_are_those_of_the_library(folder):
    model = vidcompress.from_pretrained(
        folder / "model", compression="uniform_tokens", retention_ratio=0.25, dtype="float32"
    )
    processor = AutoProcessor.from_pretrained(folder / "model")
    for row in lines(folder):
        if row["error"] is None:
            clip = vidcompress.load_video(row["video"], max_frames=FRAMES)
            assert ask(model, processor, clip, row["question"], max_new_tokens=5).answer == row["answer"]
            assert row["cost"]["tokens_after"] * 4 == row["cost"]["tokens_before"] == 16 * len(clip.frames)


def test_errors_are_asked_again_when_told(folder):
    make_clip(folder / "bad.mp4")
    run = start(folder, "--retry-errors")
    printed, _ = run.communicate(timeout=1200)
    assert run.returncode == 0 and f"{QUESTIONS} questions, 1 to ask" in printed, printed
    found = lines(folder)
    assert len(found) == QUESTIONS and not [row for row in found if row["error"]]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"id": 1, "video": "a.mp4"}', "line 2 lacks question"),
        ('{"id": 0, "video": "a.mp4", "question": "x"}', "id 0 is there twice"),
    ],
)
def test_bad_questions_are_refused(folder, tmp_path, line, message):
    (tmp_path / "questions.jsonl").write_text('{"id": 0, "video": "a.mp4", "question": "x"}\n' + line + "\n")
    (tmp_path / "model").symlink_to(folder / "model")
    printed, _ = (run := start(tmp_path)).communicate(timeout=1200)
    assert run.returncode != 0 and message in printed


def test_other_settings_are_refused(folder):
    printed, _ = (run := start(folder, "--retention-ratio", "0.5")).communicate(timeout=1200)
    assert run.returncode != 0 and "records a run with other settings" in printed
