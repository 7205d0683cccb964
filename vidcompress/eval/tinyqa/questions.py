"""Multiple-choice questions that a story answers without doubt."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from vidcompress.eval.tinyqa.scenes import COLOURS, DIGITS, DIRECTIONS, SHAPES, TEXTURES, Scene, Story

NUMBERS = ("1", "2", "3", "4", "5")
PLACES = ("left", "right", "top", "bottom", "middle")
TYPES: dict[str, str] = {
    "color": "the colour of the only shape of its kind",
    "shape": "the kind of the only shape of its colour",
    "digit": "which digit flashed for one or two frames",
    "digitcolor": "the colour of that digit",
    "direction": "where a shape moved, or that it stood still",
    "place": "where in the picture a shape began or ended",
    "count": "how many shapes the first or last scene has",
    "scope": "the colour of a kind that other scenes have in other colours",
    "size": "the colour of the smallest or largest shape of a scene",
    "background": "the texture of the first or last scene",
    "order": "which of two colours came first",
}
"""Kinds of questions and what each asks."""


@dataclass(frozen=True)
class Question:
    """One question; every option, the answer among them, is one word."""

    type: str
    text: str
    answer: str
    options: tuple[str, ...]


def questions_about(story: Story) -> list[Question]:
    """All questions of a clip, in a fixed order."""
    return [*_about_shapes(story), *_about_flash(story), *_about_scenes(story), *_about_order(story)]


def _about_shapes(story: Story) -> Iterator[Question]:
    shapes = [shape for scene in story.scenes for shape in scene.shapes]
    kinds, colours = Counter(s.kind for s in shapes), Counter(s.colour for s in shapes)
    for shape in shapes:
        kind, colour = SHAPES[shape.kind], COLOURS[shape.colour]
        if kinds[shape.kind] == 1:
            yield Question("color", f"what color is the {kind} ?", colour, COLOURS)
        if colours[shape.colour] == 1:
            yield Question("shape", f"what shape is the {colour} object ?", kind, SHAPES)
        text = f"which direction did the {colour} {kind} move ?"
        yield Question("direction", text, DIRECTIONS[shape.direction], DIRECTIONS)
        for word, frame in (("start", 0), ("end", -1)):
            place = side(shape.x[frame] / story.width, shape.y[frame] / story.height)
            if place is not None:
                yield Question("place", f"where is the {colour} {kind} at the {word} ?", place, PLACES)


def side(x: float, y: float) -> str | None:
    """One of PLACES for a centre at (x, y), as parts of the picture's width and height; None where one might argue."""
    x, y = x - 0.5, y - 0.5
    far, near = max(abs(x), abs(y)), min(abs(x), abs(y))
    if far < 0.1:
        return "middle"
    if far < 0.18 or far - near < 0.08:
        return None
    return ("left" if x < 0 else "right") if abs(x) > abs(y) else ("top" if y < 0 else "bottom")


def _about_flash(story: Story) -> Iterator[Question]:
    if story.flash is not None:
        yield Question("digit", "which digit flashed briefly ?", DIGITS[story.flash.digit], DIGITS)
        yield Question("digitcolor", "what color is the digit ?", COLOURS[story.flash.colour], COLOURS)


def _about_scenes(story: Story) -> Iterator[Question]:
    kinds = Counter(shape.kind for scene in story.scenes for shape in scene.shapes)
    for word, scene in (("first", story.scenes[0]), ("last", story.scenes[-1])):
        where = f"in the {word} scene ?"
        yield Question("count", f"how many shapes {where}", NUMBERS[len(scene.shapes) - 1], NUMBERS)
        yield Question("background", f"what background {where}", TEXTURES[scene.texture], TEXTURES)
        here = Counter(shape.kind for shape in scene.shapes)
        for shape in scene.shapes:
            if here[shape.kind] == 1 < kinds[shape.kind]:
                text = f"what color is the {SHAPES[shape.kind]} {where}"
                yield Question("scope", text, COLOURS[shape.colour], COLOURS)
        yield from _about_size(scene, where)


def _about_size(scene: Scene, where: str) -> Iterator[Question]:
    ranked = sorted(scene.shapes, key=lambda shape: shape.radius)
    if len(ranked) > 1 and ranked[1].radius - ranked[0].radius > 1.1:
        yield Question("size", f"what color is the smallest object {where}", COLOURS[ranked[0].colour], COLOURS)
    if len(ranked) > 1 and ranked[-1].radius - ranked[-2].radius > 1.1:
        yield Question("size", f"what color is the largest object {where}", COLOURS[ranked[-1].colour], COLOURS)


def _about_order(story: Story) -> Iterator[Question]:
    colours = Counter(shape.colour for scene in story.scenes for shape in scene.shapes)
    seen = [(i, s.colour) for i, scene in enumerate(story.scenes) for s in scene.shapes if colours[s.colour] == 1]
    rng = np.random.default_rng((story.seed, 2))
    for _ in range(2 if len(seen) > 1 else 0):
        (one, first), (other, second) = (seen[i] for i in rng.choice(len(seen), 2, replace=False))
        if one != other:
            pair = (COLOURS[first], COLOURS[second])
            text = f"which came first {pair[0]} or {pair[1]} ?"
            yield Question("order", text, pair[0] if one < other else pair[1], pair)
