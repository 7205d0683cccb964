"""The evaluation set as it ships: pixels and questions, not seeds, because random streams change between libraries."""

from __future__ import annotations

import functools
import json
from collections import Counter, defaultdict
from importlib.resources import files

import numpy as np

from vidcompress.eval.suites import Clip
from vidcompress.eval.tinyqa.questions import Question, questions_about
from vidcompress.eval.tinyqa.render import add_grain, draw, grain
from vidcompress.eval.tinyqa.scenes import invent

FIRST_SEED = 1 << 41  # training draws below 1 << 40
CLIPS, QUESTIONS = 120, 8  # and questions a clip
DATA = files("vidcompress.eval.tinyqa") / "data"


@functools.cache
def frozen() -> tuple[Clip, ...]:
    """The 120 clips, each with 8 questions. Read from the package, the same on every machine."""
    with (DATA / "clips.npz").open("rb") as file, np.load(file) as arrays:
        clean, values, seeds = arrays["clean"], arrays["grain"], arrays["seeds"].tolist()
    asked = json.loads((DATA / "questions.json").read_text(encoding="utf-8"))
    return tuple(
        Clip(
            name=f"tinyqa-{i:03d}",
            frames=add_grain(clean[i], values, seed),
            questions=tuple(Question(q["type"], q["text"], q["answer"], tuple(q["options"])) for q in asked[i]),
        )
        for i, seed in enumerate(seeds)
    )


def make() -> tuple[dict[str, np.ndarray], list[list[dict[str, object]]]]:
    """The arrays of `clips.npz` and the content of `questions.json`, made anew by this version of numpy."""
    stories = [invent(FIRST_SEED + i) for i in range(CLIPS)]
    clean = np.stack([draw(story)[0] for story in stories])
    arrays = {"clean": clean, "grain": grain(), "seeds": np.array([story.seed for story in stories])}
    asked: Counter[str] = Counter()
    questions = [_balanced(questions_about(story), story.seed, asked) for story in stories]
    return arrays, [[vars(q) | {"options": list(q.options)} for q in of_clip] for of_clip in questions]


def _balanced(questions: list[Question], seed: int, asked: Counter[str]) -> list[Question]:
    """QUESTIONS of them, no type twice before each once, those first that were asked least; counts them in `asked`."""
    by_type: dict[str, list[Question]] = defaultdict(list)
    for i in np.random.default_rng((seed, 6)).permutation(len(questions)):
        by_type[questions[i].type].append(questions[i])
    chosen: list[Question] = []
    while len(chosen) < QUESTIONS and any(by_type.values()):
        for name in sorted((n for n in by_type if by_type[n]), key=lambda n: (asked[n], n))[: QUESTIONS - len(chosen)]:
            chosen.append(by_type[name].pop())
    asked.update(question.type for question in chosen)
    return chosen
