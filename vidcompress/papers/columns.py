"""The columns of the papers' tables: which task of lmms-eval measures each, and how."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Column:
    """One column.

    Attributes:
        title: as the papers have it.
        task: of lmms-eval; None for what is not a benchmark.
        metric: of that task.
        scale: by which lmms-eval's value is multiplied; papers print percent.
        duration: of the videos that count; None for all.
        parts: how many subtasks the task is the mean of.
        kind: a benchmark; a number of the paper that is not measured; the mean and its share of the uncompressed
            model's; or what the runs took, where they answered one prompt at a time.
    """

    title: str
    task: str | None = None
    metric: str = ""
    scale: float = 1.0
    duration: str | None = None
    parts: int = 0
    kind: Literal["benchmark", "printed", "average", "percent", "cost"] = "benchmark"


def _videomme(title: str, duration: str | None = None, task: str = "videomme") -> Column:
    return Column(title, task, "videomme_perception_score", duration=duration)


COLUMNS = {
    "videomme": _videomme("VideoMME"),
    "videomme_short": _videomme("VideoMME short", "short"),
    "videomme_medium": _videomme("VideoMME medium", "medium"),
    "videomme_long": _videomme("VideoMME long", "long"),
    "videomme_w_subtitle": _videomme("VideoMME with subtitles", task="videomme_w_subtitle"),
    "mlvu_dev": Column("MLVU dev", "mlvu_dev", "mlvu_percetion_score"),  # the metric is spelt so
    "mlvu_test": Column("MLVU test", "mlvu_test", "mlvu_percetion_score"),
    "longvideobench_val_v": Column("LongVideoBench", "longvideobench_val_v", "lvb_acc", scale=100),
    "mvbench": Column("MVBench", "mvbench", "mvbench_accuracy", parts=20),
    "egoschema": Column("EgoSchema", "egoschema", "submission"),
    "nextqa_mc_test": Column("NExT-QA choice", "nextqa_mc_test", "exact_match", scale=100),
    "nextqa_oe_test": Column("NExT-QA open", "nextqa_oe_test", "WUPS"),
    "activitynetqa_accuracy": Column("ActivityNet-QA", "activitynetqa", "gpt_eval_accuracy"),
    "activitynetqa_score": Column("ActivityNet-QA score", "activitynetqa", "gpt_eval_score"),
    "tflops": Column("TFLOPs", kind="printed"),
    "average": Column("mean", kind="average"),
    "percent": Column("% of uncompressed", kind="percent"),
    "process_ms": Column("compression, ms", kind="cost"),
    "prefill_ms": Column("prefill, ms", kind="cost"),
    "llm_prefill_ms": Column("compression and prefill, ms", kind="cost"),
    "llm_generate_ms": Column("compression to last token, ms", kind="cost"),
    "first_token_ms": Column("vision to first token, ms", kind="cost"),
    "tokens_per_second": Column("tokens/s", kind="cost"),
}
"""By the name that the papers' YAMLs use.

MLVU is read as `mlvu_dev` in the InfoMerge paper and as `mlvu_test` in Unified, which call it the same: 64.9 and 47.7
of one uncompressed model are too far apart for one task.
"""


def tasks_of(names: list[str]) -> list[str]:
    """The tasks of lmms-eval that columns need, each once, in order."""
    return list(dict.fromkeys(task for name in names if (task := COLUMNS[name].task) is not None))
