"""The papers' numbers hold together, every row has its command, and measured numbers land beside the right ones."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
from pathlib import Path

import pytest
from test_cli import vidcompress  # noqa: F401  (a fixture)

from vidcompress.costs import MODELS
from vidcompress.integrations.settings import Settings
from vidcompress.papers.columns import COLUMNS
from vidcompress.papers.measured import read_results
from vidcompress.papers.published import PAPERS, UNSAID, jobs, methods_of_run, only, paper

SCRIPTS = Path(__file__).parent.parent / "scripts" / "reproduce"
HUB = "llava-hf/llava-onevision-qwen2-7b-ov-hf"

THEIR_OWN = {
    ("hieravid", "1", "FastV", "20%"), ("hieravid", "1", "PruneVid", "20%"), ("hieravid", "2", "HieraVid", "30%"),
    ("hieravid", "7", "Last Instruction Token", "30%"), ("unified", "2b", "Ours (w/o M)", "2%"),
    ("unified", "S2", "HoliTom", "15%/7.5%"), ("unified", "S6", "tau 0.6", "2%"), ("unified", "S7", "share 0.1", "2%"),
    ("unified", "6", "VisionZip", "2%"),
}  # fmt: skip
"""Rows whose printed mean or percentage is not that of the printed scores: looked up again, and so printed."""


def every_row():
    return [(name, table, row) for name in PAPERS for table in paper(name).tables for row in table.rows]


# -- the numbers -------------------------------------------------------------------------------------------------------
def test_means_and_percentages_follow_from_the_scores():
    """A slip of the pen in a score would show in its mean; the papers' own slips are listed."""
    wrong, checked = set(), 0
    for name in PAPERS:
        for table in paper(name).tables:
            base = next((row.published.get("average") for row in table.rows if row.run == {}), None)
            for row in table.rows:
                own = row.published
                mean, scores = own.get("average"), [own.get(column) for column in table.mean]
                if mean is not None and None not in scores:
                    checked += 1
                    if abs(statistics.fmean(scores) - mean) > 0.0501:
                        wrong.add((name, table.number, row.method, row.kept))
                if mean and base and own.get("percent"):
                    checked += 1
                    if abs(100 * mean / base - own["percent"]) > 0.15:
                        wrong.add((name, table.number, row.method, row.kept))
    assert checked > 400 and wrong == THEIR_OWN - {("unified", "6", "VisionZip", "2%")}


def test_durations_are_thirds_of_videomme():
    lengths = [f"videomme_{length}" for length in ("short", "medium", "long")]
    seen = [row.published for _, _, row in every_row() if row.published.get(lengths[0])]
    assert len(seen) == 13 + 11 + 7
    for own in seen:
        assert abs(statistics.fmean(own[length] for length in lengths) - own["videomme"]) < 0.11


def test_tables_that_repeat_a_row_repeat_its_numbers():
    """The same settings have the same score wherever a paper prints them, but where it does not."""
    scores, differing = {}, set()
    for name, table, row in every_row():
        if row.run is None:
            continue
        for column, value in row.published.items():
            if COLUMNS[column].kind != "benchmark" or value is None:
                continue
            key = (name, table.model, row.frames, json.dumps(methods_of_run(row.run)), column)
            if scores.setdefault(key, value) != value:
                differing.add((name, table.number, row.method))
    assert differing == {("hieravid", "7", "Last Instruction Token")}


def test_rows_are_those_of_the_text():
    """Cells picked by eye, a few of every table."""
    picked = {
        ("infomerge", "1", "Ours", "5%", "mlvu_dev"): 59.5,
        ("infomerge", "2", "FastVID", "10%", "videomme_long"): 50.4,
        ("infomerge", "3", "Ours", "10%", "llm_prefill_ms"): 225.6,
        ("infomerge", "4", "TFD, richness", "15%", "videomme"): 58.2,
        ("infomerge", "6", "uniqueness 0.30, richness 0.70", "10%", "videomme"): 57.4,
        ("unified", "1", "Ours", "2%/1%", "egoschema"): 57.6,
        ("unified", "2a", "HoliTom", "1%/0.5%", "videomme"): 51.7,
        ("unified", "2b", "Ours", "1%/0.5%", "mlvu_test"): 23.1,
        ("unified", "5", "similarity, clusters", "2%", "mvbench"): 51.8,
        ("unified", "6", "Ours", "2%", "first_token_ms"): 473.8,
        ("unified", "S1", "Ours(w/o M)", "2%", "mlvu_test"): 32.7,
        ("unified", "S2", "DyToK", "5%", "longvideobench_val_v"): 49.1,
        ("unified", "S3", "HoliTom", "2%", "activitynetqa_score"): 3.31,
        ("hieravid", "1", "HieraVid", "10%", "nextqa_oe_test"): 31.3,
        ("hieravid", "2", "Framefusion", "20%", "videomme_w_subtitle"): 60.1,
        ("hieravid", "3", "PruneVid", "30%", "videomme"): 53.8,
        ("hieravid", "6", "lambda 0.8", "30%", "egoschema"): 57.5,
    }
    found = {
        (name, table.number, row.method, row.kept, column): value
        for name, table, row in every_row()
        for column, value in row.published.items()
    }
    assert {key: found[key] for key in picked} == picked


def test_every_row_runs_or_says_why_not():
    for name, table, row in every_row():
        assert (row.run is None) == (row.absent is not None), (name, table.number, row.method)
        assert table.model in MODELS and set(row.published) == set(table.columns) <= set(COLUMNS)
        assert row.run is None or bool(methods_of_run(row.run)) == bool(row.run)
    assert len(every_row()) == 289 - 7


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: paper("unifid"), "unknown paper 'unifid' .did you mean 'unified'"),
        (lambda: only(paper("infomerge"), ["9"]), "has no table '9' here; it has 1, 2, 3"),
    ],
)
def test_what_is_not_there_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# -- the commands ------------------------------------------------------------------------------------------------------
def dry_run(name, *arguments, **variables):
    done = subprocess.run(
        ["bash", str(SCRIPTS / f"{name}.sh"), "--dry-run", *arguments],
        env={"PATH": "/usr/bin:/bin", **variables}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return [line.split() for line in done.stdout.splitlines()]


def option(command, name):
    return command[command.index(name) + 1]


@pytest.mark.parametrize("name", PAPERS)
def test_every_row_has_its_command(name):
    """What a script prints, read as lmms-eval would, is what the row means."""
    runs = []
    for command in dry_run(name):
        assert command[:5] == ["python", "-m", "lmms_eval", "--model", "vidcompress"] and "--log_samples" in command
        values = {k: _typed(v) for k, v in (pair.split("=", 1) for pair in option(command, "--model_args").split(","))}
        if not runs:
            Settings.parse(values | {"batch_size": option(command, "--batch_size")})
        facts = {k: values.pop(k) for k in ("pretrained", "max_num_frames", "record")}
        facts["compression"] = methods_of_run(values)
        runs.append((facts, option(command, "--tasks").split(",")))
    for table, row in [(t, r) for of, t, r in every_row() if of == name and r.run is not None]:
        wanted = methods_of_run(row.run)
        own = [
            tasks
            for facts, tasks in runs
            if facts["pretrained"] == MODELS[table.model].hub
            and facts["max_num_frames"] == (row.frames or UNSAID)
            and facts["compression"] == wanted
        ]
        assert len(own) == 1 and set(table.tasks) <= set(own[0]), (table.number, row.method, row.kept)
    assert len(runs) == len(jobs(paper(name)))


def _typed(value):
    """As lmms-eval reads it."""
    for kind in (int, float):
        try:
            return kind(value)
        except ValueError:
            continue
    return value


@pytest.mark.parametrize("name", [*PAPERS, "run"])
def test_the_scripts_are_bash_and_fresh(name):
    path = SCRIPTS / f"{name}.sh"
    subprocess.run(["bash", "-n", str(path)], check=True)
    if name in PAPERS:
        import runpy

        render = runpy.run_path(str(SCRIPTS.parent / "make_reproduce.py"))["render"]
        assert path.read_text() == render(name) + "\n", "run `make tables`"


def test_options_of_the_scripts(tmp_path):
    (command,) = dry_run("hieravid", "qwen2*hieravid*", TASKS="videomme,mvbench", BATCH="4", RESULTS="out")
    assert option(command, "--tasks") == "videomme" and option(command, "--batch_size") == "4"
    assert option(command, "--output_path") == "out/qwen2-vl-7b-32f-hieravid-30/videomme"
    given = {"LAUNCH": "torchrun --nproc_per_node 8", "MODEL_ARGS": "attn_implementation=flash_attention_2"}
    (command,) = dry_run("infomerge", "llava-video*infomerge-0.1", **given)
    assert command[:3] == ["torchrun", "--nproc_per_node", "8"]
    assert option(command, "--model_args").endswith(",attn_implementation=flash_attention_2")
    script = str(SCRIPTS / "infomerge.sh")
    assert "usage:" in subprocess.run(["bash", script, "--help"], capture_output=True, text=True, check=True).stdout
    assert subprocess.run(["bash", script, "--wrong"], capture_output=True).returncode == 2
    for arguments, more in ((["no-such-row"], {}), (["--dry-run"], {"TASKS": "videomm"})):
        nothing = subprocess.run(["bash", script, *arguments], env=os.environ | more, capture_output=True, text=True)
        assert nothing.returncode == 1 and "no row matches" in nothing.stderr and nothing.stdout == ""


def test_a_run_without_results_stops_the_script_and_one_with_results_is_not_repeated(tmp_path):
    """`python` stands for lmms-eval, which ends with 0 whatever happens."""
    fake = tmp_path / "fake"
    fake.write_text(
        '#!/bin/bash\necho "$@" >> calls\n'
        '[ -z "$WRITES" ] || { mkdir -p "${@: -1}"; touch "${@: -1}/a_results.json"; }\n'
    )
    fake.chmod(0o755)
    command = ["bash", str(SCRIPTS / "infomerge.sh"), "*32f-infomerge-0.1"]
    env = {"PATH": "/usr/bin:/bin", "LAUNCH": str(fake)}

    def call(**more):
        return subprocess.run(command, cwd=tmp_path, env=env | more, capture_output=True, text=True)

    first = call()
    assert first.returncode == 1 and "no results; what was answered is in results/llava-onevision-7b" in first.stderr
    assert call(WRITES="1").returncode == 0
    assert "has results for videomme,mlvu_dev,longvideobench_val_v" in call().stdout
    assert len((tmp_path / "calls").read_text().splitlines()) == 2


# -- beside them what was measured -------------------------------------------------------------------------------------
COST = {
    "frames": 32, "pixels": 32 * 384 * 384, "tokens_before": 6272, "tokens_after": 627, "prompt_tokens": 6400,
    "new_tokens": 3, "mean_length": 700.0, "batch": 1, "vision_ms": 100.0, "compression_ms": 20.0, "prefill_ms": 200.0,
    "generation_ms": 50.0, "peak_memory_mb": 1.0, "head": "google/siglip-so400m-patch14-384",
}  # fmt: skip


def write(folder, task, metric, values, *, date="20261101_000000", schema=1, model="vidcompress", of=None, **given):
    """A results file and its samples as lmms-eval 0.7.3 writes them; `values` are the samples' of the metric."""
    facts = Settings.parse({"pretrained": HUB} | given).facts() | {"schema": schema}
    folder = folder / "model"
    folder.mkdir(parents=True, exist_ok=True)
    samples = [
        {"doc_id": i, metric: value, "token_counts": [{"input_tokens": 1, "vidcompress": facts | {"cost": COST}}]}
        for i, value in enumerate(values)
    ]
    scores = [100 * v["score"] if isinstance(v, dict) else v for v in values]
    content = {
        "results": {task: {"alias": task, f"{metric},none": statistics.fmean(scores), f"{metric}_stderr,none": 0.1}},
        "config": {"model": model},
        "n-samples": {task: {"original": of or len(values), "effective": len(values)}},
    }
    (folder / f"{date}_results.json").write_text(json.dumps(content))
    lines = "".join(json.dumps(sample) + "\n" for sample in samples)
    (folder / f"{date}_samples_{task}.jsonl").write_text(lines)


def videomme(*rights):
    """Two right, say, of three: short, medium, long in turn."""
    return [{"score": float(right), "duration": ("short", "medium", "long")[i % 3]} for i, right in enumerate(rights)]


def table_of(run, *arguments):
    code, out, err = run("table", *arguments, "--json")
    assert code == 0, err
    return json.loads(out)


def row_of(report, number, method, kept, **facts):
    table = next(table for table in report["tables"] if table["number"] == number)
    (row,) = [
        row
        for row in table["rows"]
        if (row["method"], row["kept"]) == (method, kept) and all(row[k] == v for k, v in facts.items())
    ]
    return row


@pytest.fixture
def results(tmp_path):
    """Ours at 10 % on all tasks, the plain model on all, and something else."""
    ours = {"compression": "infomerge", "retention_ratio": 0.1, "siglip_head": "/models/siglip"}
    for name, given, right in (("ours", ours, (1, 0, 1, 1, 0, 1)), ("plain", {}, (1, 1, 1, 1, 0, 1))):
        write(tmp_path / name / "a", "videomme", "videomme_perception_score", videomme(*right), **given)
        write(tmp_path / name / "b", "mlvu_dev", "mlvu_percetion_score", [60.0, 60.0], **given)
        write(tmp_path / name / "c", "longvideobench_val_v", "lvb_acc", [0.5, 0.6], of=1337, **given)
    return tmp_path


def test_measured_numbers_land_beside_the_printed_ones(vidcompress, results):  # noqa: F811
    report = table_of(vidcompress, "--paper", "infomerge", "--results", results)
    ours = row_of(report, "1", "Ours", "10%")
    cells = ours["cells"]
    assert cells["videomme"]["published"] == 57.7 and cells["videomme"]["measured"] == pytest.approx(400 / 6)
    lengths = [cells[f"videomme_{length}"]["measured"] for length in ("short", "medium", "long")]
    assert lengths == [100.0, 0.0, 100.0]
    assert cells["mlvu_dev"]["measured"] == 60 and cells["longvideobench_val_v"]["measured"] == pytest.approx(55)
    mean = (400 / 6 + 60 + 55) / 3
    assert cells["average"]["measured"] == pytest.approx(mean)
    assert cells["percent"]["measured"] == pytest.approx(100 * mean / ((500 / 6 + 60 + 55) / 3))
    assert ours["facts"]["frames"] == 32 and ours["facts"]["pixels"] == 384 * 384
    assert (ours["facts"]["tokens_before"], ours["facts"]["tokens_after"]) == (6272, 627)
    assert ours["questions"] == {"asked": 10, "available": 6 + 2 + 1337} and len(ours["runs"]) == 3
    assert ours["runs"][0]["versions"] and ours["runs"][0]["compression"][0]["temperature"] == 1.2
    assert row_of(report, "1", "Ours", "5%")["cells"]["videomme"]["measured"] is None
    assert row_of(report, "1", "MMG-Vid", "15%")["absent"]
    assert row_of(report, "6", "uniqueness 0.90, richness 0.10", "10%")["cells"]["videomme"]["measured"] is not None
    timed = row_of(report, "3", "Ours", "10%")["cells"]
    assert timed["llm_prefill_ms"]["measured"] == 220 and timed["llm_generate_ms"]["measured"] == 270
    assert report["left_out"] == []


def test_the_table_for_people(vidcompress, results):  # noqa: F811
    code, out, _ = vidcompress("table", "--paper", "infomerge", "--results", results, "--only", "1", "--markdown")
    assert code == 0
    (line,) = [line for line in out.splitlines() if line.startswith("| Ours | 10% |")]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[2:7] == ["4.2", "68.9 / 100.0", "55.9 / 0.0", "48.2 / 100.0", "57.7 / 66.7"]
    assert cells[-4:] == ["32.0", "147456", "6272 to 627", "10 of 1345"]
    (line,) = [line for line in out.splitlines() if line.startswith("| MMG-Vid")]
    assert [cell.strip() for cell in line.strip("|").split("|")][3:7] == ["", "", "", "57.9 /"]
    assert "- Ours 10%: measured on a part of the questions (--limit)" in out
    assert "- MMG-Vid: publishes neither code" in out and "google/siglip-so400m" in out
    code, out, _ = vidcompress("table", "--paper", "hieravid", "--only", "3", "--markdown")
    assert code == 0 and "Qwen2-VL-7B" in out and "57.6 /" in out


def test_the_newest_run_counts_and_the_rest_is_named(vidcompress, results):  # noqa: F811
    again = {"compression": "infomerge", "retention_ratio": 0.1, "date": "20261102_000000"}
    write(results / "again", "mlvu_dev", "mlvu_percetion_score", [70.0], **again)
    write(results / "fewer", "mlvu_dev", "mlvu_percetion_score", [99.0], **again | {"max_num_frames": 16})
    write(results / "other", "mlvu_dev", "mlvu_percetion_score", [99.0], **again | {"pretrained": "me/another-model"})
    write(results / "foreign", "mlvu_dev", "mlvu_percetion_score", [99.0], model="llava_hf")
    report = table_of(vidcompress, "--paper", "infomerge", "--results", results)
    assert row_of(report, "1", "Ours", "10%")["cells"]["mlvu_dev"]["measured"] == 70
    assert len(report["left_out"]) == 4
    assert sum("of the model 'llava_hf'" in reason for reason in report["left_out"]) == 1
    assert sum("its mlvu_dev fills no row shown" in reason for reason in report["left_out"]) == 3


def test_a_task_in_parts_needs_all_of_them(vidcompress, tmp_path):  # noqa: F811
    given = {"compression": "unified", "retention_ratio": 0.02}
    for i in range(19):
        write(tmp_path / str(i), f"mvbench_{i}", "mvbench_accuracy", [50.0], **given)
    find = ("--paper", "unified", "--results", tmp_path, "--only", "1")
    assert row_of(table_of(vidcompress, *find), "1", "Ours", "2%/1%")["cells"]["mvbench"]["measured"] is None
    write(tmp_path / "19", "mvbench_19", "mvbench_accuracy", [70.0], **given)
    assert row_of(table_of(vidcompress, *find), "1", "Ours", "2%/1%")["cells"]["mvbench"]["measured"] == 51


def test_times_of_batches_are_not_shown(vidcompress, results, monkeypatch):  # noqa: F811
    monkeypatch.setitem(COST, "batch", 2)
    write(results / "b", "videomme", "videomme_perception_score", videomme(1), date="20261103_000000",
          compression="infomerge", retention_ratio=0.1)  # fmt: skip
    code, out, _ = vidcompress("table", "--paper", "infomerge", "--results", results, "--only", "3", "--markdown")
    assert code == 0 and "| Ours | 10% | 225.6 / | 257.6 / |" in out
    assert "- Ours: no times, for prompts were answered in batches" in out


def cut_samples(folder):
    path = next(folder.rglob("*_samples_*"))
    path.write_text(path.read_text()[:-20])


def without_samples(folder):
    next(folder.rglob("*_samples_*")).unlink()


def cached(folder):
    path = next(folder.rglob("*_samples_*"))
    path.write_text('{"doc_id": 0, "token_counts": [null]}\n')


def broken(folder):
    next(folder.rglob("*_results.json")).write_text("{")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: None, None),
        (cut_samples, "is no JSON, perhaps cut off"),
        (without_samples, "run lmms-eval with --log_samples"),
        (cached, "nothing of vidcompress; was --use_cache given"),
        (broken, "is no JSON, perhaps cut off"),
    ],
)
def test_damaged_results_are_refused(spoil, message, tmp_path):
    write(tmp_path, "mlvu_dev", "mlvu_percetion_score", [60.0])
    spoil(tmp_path)
    if message is None:
        assert len(read_results(tmp_path)[0]) == 1
    else:
        with pytest.raises(ValueError, match=message):
            read_results(tmp_path)


def test_results_that_cannot_be_read(vidcompress, tmp_path):  # noqa: F811
    for folder, message in ((tmp_path / "none", "there is no such folder"), (tmp_path, "an evaluation that crashed")):
        code, _, err = vidcompress("table", "--paper", "infomerge", "--results", folder)
        assert code == 2 and message in err
    write(tmp_path, "mlvu_dev", "mlvu_percetion_score", [60.0], schema=2)
    code, _, err = vidcompress("table", "--paper", "infomerge", "--results", tmp_path)
    assert code == 2 and "schema 2, this version reads 1; it was written by vidcompress 0." in err
    code, _, err = vidcompress("table", "--paper", "infomerge", "--json", "--markdown")
    assert code == 2 and "not both" in err
