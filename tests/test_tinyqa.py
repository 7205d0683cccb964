"""The generator of clips and questions, and the evaluation set that ships."""

from __future__ import annotations

import hashlib
import json
from collections import Counter

import numpy as np
import pytest

from vidcompress.eval.suites import load_suite
from vidcompress.eval.tinyqa import FRAMES, SIDE, TYPES, invent, questions_about, render
from vidcompress.eval.tinyqa.frozen import DATA, FIRST_SEED, make
from vidcompress.eval.tinyqa.render import draw
from vidcompress.eval.tinyqa.scenes import COLOURS, DIRECTIONS, SHAPES, STILL, Flash, Scene, Shape, Story

PLAIN, DOTS = 0, 4


def shape(colour: str, kind: str, radius: float, start: tuple[float, float], end: tuple[float, float], frames: int):
    """A shape that goes straight from one point to another."""
    (x0, y0), (x1, y1) = start, end
    step = (np.sign(x1 - x0), np.sign(y1 - y0))
    direction = {(-1, 0): "left", (1, 0): "right", (0, -1): "up", (0, 1): "down", (0, 0): "still"}[step]
    x, y = np.linspace(x0, x1, frames, dtype=np.float32), np.linspace(y0, y1, frames, dtype=np.float32)
    return Shape(SHAPES.index(kind), COLOURS.index(colour), radius, DIRECTIONS.index(direction), x, y)


def hand_made() -> Story:
    """A large red circle goes right, behind a small green square; then a blue circle rests, and a white 2 flashes."""
    first = Scene(0, 5, PLAIN)
    first.shapes = [
        shape("red", "circle", 10, (14, 36), (58, 36), 5),
        shape("green", "square", 5, (36, 36), (36, 36), 5),
    ]
    last = Scene(5, 3, DOTS, [shape("blue", "circle", 7, (36, 60), (36, 60), 3)])
    return Story(1, [first, last], Flash(2, COLOURS.index("white"), 6, 1, 2, 2))


def test_questions_of_a_story_made_by_hand():
    asked = {q.text: q.answer for q in questions_about(hand_made())}
    assert asked["which direction did the red circle move ?"] == "right"
    assert asked["which direction did the blue circle move ?"] == "still"
    assert asked["where is the red circle at the start ?"] == "left"
    assert asked["where is the red circle at the end ?"] == "right"
    assert asked["where is the green square at the end ?"] == "middle"
    assert asked["where is the blue circle at the start ?"] == "bottom"
    assert asked["what color is the square ?"] == "green"
    assert asked["what shape is the blue object ?"] == "circle"
    assert asked["which digit flashed briefly ?"] == "two"
    assert asked["what color is the digit ?"] == "white"
    assert asked["how many shapes in the first scene ?"] == "2"
    assert asked["how many shapes in the last scene ?"] == "1"
    assert asked["what background in the last scene ?"] == "dots"
    assert asked["what color is the circle in the first scene ?"] == "red"
    assert asked["what color is the circle in the last scene ?"] == "blue"
    assert asked["what color is the smallest object in the first scene ?"] == "green"
    assert asked["what color is the largest object in the first scene ?"] == "red"
    assert "what color is the circle ?" not in asked  # there are two
    orders = [q for q in questions_about(hand_made()) if q.type == "order"]
    assert orders and all(set(q.options) - {"blue"} == {q.answer} for q in orders)  # blue comes last


def test_what_is_drawn_is_what_happens():
    picture, owner = draw(hand_made())
    assert picture.shape == (8, SIDE, SIDE, 3) and picture.dtype == np.uint8
    red = (picture[:5, :, :, 0] > 180) & (picture[:5, :, :, 1] < 70) & (picture[:5, :, :, 2] < 70)
    middles = [np.nonzero(frame)[1].mean() for frame in red]
    assert middles[0] == pytest.approx(14, abs=1) and middles[-1] == pytest.approx(58, abs=1)
    assert (np.diff(middles) > 5).all()
    assert owner[2, 36, 36] == 2  # the square, drawn later, hides the circle behind it
    assert set(np.unique(owner[:5])) == {0, 1, 2} and set(np.unique(owner[5:])) == {0, 3, 4}
    assert (owner[[5, 7]] != 4).all() and (owner[6] == 4).any()  # the digit is there for one frame
    assert (picture[0] == picture[0]).all() and not np.array_equal(picture[4], picture[5])  # a cut


@pytest.mark.parametrize("seed", range(20))
def test_stories_keep_their_promises(seed):
    story = invent(seed)
    lengths = [scene.length for scene in story.scenes]
    assert sum(lengths) == FRAMES and min(lengths) >= 4
    assert [scene.start for scene in story.scenes] == list(np.cumsum([0, *lengths[:-1]]))
    pairs = [(s.colour, s.kind) for scene in story.scenes for s in scene.shapes]
    assert len(set(pairs)) == len(pairs)
    for scene in story.scenes:
        assert 1 <= len(scene.shapes) <= 5
        for s in scene.shapes:
            assert len(s.x) == len(s.y) == scene.length
            moved = np.array([s.x[-1] - s.x[0], s.y[-1] - s.y[0]])
            if s.direction == STILL:
                assert not moved.any()
            else:
                assert np.abs(moved).max() >= 20 and np.abs(moved).min() < 1e-3
            assert s.radius < s.x.min() and s.x.max() < SIDE - s.radius
    for question in questions_about(story):
        assert question.answer in question.options and question.type in TYPES
    texts = [q.text for q in questions_about(story) if q.type != "order"]
    assert len(set(texts)) == len(texts)


def test_the_same_seed_is_the_same_clip():
    assert np.array_equal(render(invent(3)), render(invent(3)))
    assert not np.array_equal(render(invent(3)), render(invent(4)))
    wide = render(invent(3, height=60, width=84, frames=8))
    assert wide.shape == (8, 60, 84, 3)


def test_the_evaluation_set():
    clips = load_suite("tinyqa")
    assert len(clips) == 120 and {clip.frames.shape for clip in clips} == {(24, 72, 72, 3)}
    asked = Counter(q.type for clip in clips for q in clip.questions)
    assert set(asked) == set(TYPES) and len(TYPES) >= 9 and min(asked.values()) >= 60 and asked.total() == 960
    assert sum((DATA / name).stat().st_size for name in ("clips.npz", "questions.json")) < 12e6
    pixels = hashlib.sha256(b"".join(clip.frames.tobytes() for clip in clips)).hexdigest()
    assert pixels.startswith("61212539e7c0b43d")
    words = hashlib.sha256(repr([clip.questions for clip in clips]).encode()).hexdigest()
    assert words.startswith("d214f222cb291eaf")


def test_guessing_does_not_help():
    """Of no type is one answer right more often than in half of the questions."""
    for kind in TYPES:
        answers = Counter(q.answer for clip in load_suite("tinyqa") for q in clip.questions if q.type == kind)
        assert max(answers.values()) / answers.total() < 0.5, kind


def test_it_can_be_made_anew():
    """The generator still gives the set that ships, but for pixels that the last digit of a sine decides."""
    arrays, questions = make()
    with (DATA / "clips.npz").open("rb") as file, np.load(file) as shipped:
        assert np.mean(arrays["clean"] != shipped["clean"]) < 1e-3
    assert arrays["seeds"][0] == FIRST_SEED
    assert questions == json.loads((DATA / "questions.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("limit", [0, -1])
def test_limits_that_leave_nothing(limit):
    with pytest.raises(ValueError, match=f"limit={limit} leaves no question"):
        load_suite("tinyqa", limit)


def test_unknown_suites():
    with pytest.raises(ValueError, match=r"there is no suite 'tinyq'.*did you mean 'tinyqa'"):
        load_suite("tinyq")
