"""The evaluation sets as they ship: pixels and questions, not seeds; random streams change between libraries."""

from __future__ import annotations

import functools
import json
from collections import Counter, defaultdict
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import numpy as np

from vidcompress.eval.suites import Clip
from vidcompress.eval.tinyqa.questions import Question, questions_about
from vidcompress.eval.tinyqa.render import add_grain, draw, grain
from vidcompress.eval.tinyqa.scenes import FRAMES, SIDE, Story, invent


@dataclass(frozen=True)
class Edition:
    """How a set was made.

    Attributes:
        clips: how many.
        first_seed: of its clips, which count up from it; training draws below 1 << 40.
        sizes: heights and widths of the frames, in pixels; clips take turns.
        told: frames that a story is invented for; some of them are held, so that FRAMES result.
    """

    clips: int
    first_seed: int
    sizes: tuple[tuple[int, int], ...] = ((SIDE, SIDE),)
    told: int = FRAMES


EDITIONS = {
    "tinyqa": Edition(120, 1 << 41),
    "tinyqa-wide": Edition(80, 1 << 42, ((60, 84), (84, 60)), told=12),
}
"""By the name of the suite."""
QUESTIONS = 8  # a clip
HELD = 5  # frames that a held one shows for, at least


def data(suite: str) -> tuple[Path, Path]:
    """The files of a suite: the pixels' and the questions'."""
    folder, edition = Path(str(files("vidcompress.eval.tinyqa") / "data")), suite.removeprefix("tinyqa")
    return folder / f"clips{edition}.npz", folder / f"questions{edition}.json"


@functools.cache
def frozen(suite: str) -> tuple[Clip, ...]:
    """The clips of one of EDITIONS, each with 8 questions. Read from the package, the same on every machine."""
    pixels, words = data(suite)
    with np.load(pixels) as arrays:
        clean = [arrays[name] for name in arrays.files if name.startswith("clean")]
        values, seeds = arrays["grain"], arrays["seeds"].tolist()
    asked = json.loads(words.read_text(encoding="utf-8"))
    return tuple(
        Clip(
            name=f"{suite}-{i:03d}",
            frames=add_grain(clean[i % len(clean)][i // len(clean)], values, seed),
            questions=tuple(Question(q["type"], q["text"], q["answer"], tuple(q["options"])) for q in asked[i]),
        )
        for i, seed in enumerate(seeds)
    )


def make(suite: str) -> tuple[dict[str, np.ndarray], list[list[dict[str, object]]]]:
    """The arrays and the questions that the files of a suite hold, made anew by this version of numpy.

    Returns:
        `clean`, uint8 [clips, FRAMES, H, W, 3] (where there are several sizes, an array each, named by it), `grain` and
        `seeds`; and of every clip its questions.
    """
    edition = EDITIONS[suite]
    turns = len(edition.sizes)
    sizes = [edition.sizes[i % turns] for i in range(edition.clips)]
    stories = [invent(edition.first_seed + i, *size, edition.told) for i, size in enumerate(sizes)]
    clean = [draw(story)[0][shown(story)] for story in stories]
    names = ["clean"] if turns == 1 else [f"clean_{height}x{width}" for height, width in edition.sizes]
    arrays = {name: np.stack(clean[i::turns]) for i, name in enumerate(names)}
    arrays |= {"grain": grain(), "seeds": np.array([story.seed for story in stories])}
    asked: Counter[str] = Counter()
    questions = [_balanced(questions_about(story), story.seed, asked) for story in stories]
    return arrays, [[vars(q) | {"options": list(q.options)} for q in of_clip] for of_clip in questions]


def shown(story: Story) -> np.ndarray:
    """[FRAMES]: which frame of the story each frame of its clip shows.

    One to three frames of a shorter story are held, for at least HELD each, but none with the digit, which only
    flashes. What is true of the story stays true of the clip.
    """
    told, flash = sum(scene.length for scene in story.scenes), story.flash
    digit = range(0) if flash is None else range(flash.start, flash.start + flash.length)
    times, spare = np.ones(told, np.int64), FRAMES - told
    if spare:
        rng = np.random.default_rng((story.seed, 7))
        most = min(3, spare // (HELD - 1))
        held = rng.choice([i for i in range(told) if i not in digit], rng.integers(1, most + 1), replace=False)
        times[held] += HELD - 1
        times[held] += rng.multinomial(FRAMES - times.sum(), np.full(len(held), 1 / len(held)))
    return np.repeat(np.arange(told), times)


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
