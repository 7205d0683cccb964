"""What can be asked: suites of clips with multiple-choice questions."""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from vidcompress.eval.tinyqa.questions import Question

SUITES: dict[str, str] = {
    "tinyqa": "120 rendered clips of 24 frames, 8 questions each: an instrument for regressions, not VideoMME",
    "tinyqa-wide": "80 more, of wide and of tall frames, with long still stretches",
}
"""Names and what they are."""


@dataclass(frozen=True)
class Clip:
    """One clip, uint8 [T, H, W, 3], and what is asked about it."""

    name: str
    frames: np.ndarray
    questions: tuple[Question, ...]


def load_suite(name: str, limit: int | None = None) -> tuple[Clip, ...]:
    """The clips of a suite, the first `limit` of them.

    Raises:
        ValueError: an unknown suite, or a limit that leaves no question.
    """
    if name not in SUITES:
        near = get_close_matches(name, SUITES, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"there is no suite {name!r}; there are: {', '.join(SUITES)}{hint}")
    from vidcompress.eval.tinyqa.frozen import frozen

    clips = frozen(name)
    if limit is not None and limit < 1:
        raise ValueError(f"limit={limit} leaves no question to ask; expected 1 to {len(clips)} clips")
    return clips[:limit]
