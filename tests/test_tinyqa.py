"""The generator of clips and questions, and the evaluation set that ships."""

from __future__ import annotations

import hashlib
import json
from collections import Counter

import numpy as np
import pytest

from vidcompress.eval.suites import SUITES, load_suite
from vidcompress.eval.tinyqa import FRAMES, SIDE, TYPES, invent, questions_about, render
from vidcompress.eval.tinyqa.frozen import EDITIONS, HELD, data, make, shown
from vidcompress.eval.tinyqa.render import draw
from vidcompress.eval.tinyqa.scenes import COLOURS, DIRECTIONS, SHAPES, STILL, Flash, Scene, Shape, Story

PLAIN, DOTS = 0, 4

every_suite = pytest.mark.parametrize("suite", SUITES)


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


@pytest.mark.parametrize(
    ("suite", "sizes", "least", "pixels", "words"),
    [
        ("tinyqa", [(72, 72)], 60, "61212539e7c0b43d", "d214f222cb291eaf"),
        ("tinyqa-wide", [(60, 84), (84, 60)], 29, "607a429aa0a8ad78", "c90973be9bad6d80"),
    ],
)
def test_the_evaluation_sets(suite, sizes, least, pixels, words):
    clips = load_suite(suite)
    assert len(clips) == EDITIONS[suite].clips
    for i, clip in enumerate(clips):
        assert clip.frames.shape == (FRAMES, *sizes[i % len(sizes)], 3)
    asked = Counter(q.type for clip in clips for q in clip.questions)
    assert set(asked) == set(TYPES) and asked.total() == 8 * len(clips) and min(asked.values()) >= least
    assert sum(path.stat().st_size for path in data(suite)) < 3e6
    assert hashlib.sha256(b"".join(clip.frames.tobytes() for clip in clips)).hexdigest().startswith(pixels)
    assert hashlib.sha256(repr([clip.questions for clip in clips]).encode()).hexdigest().startswith(words)


@every_suite
def test_guessing_does_not_help(suite):
    """Of no type is one answer right more often than in half of the questions."""
    for kind in TYPES:
        answers = Counter(q.answer for clip in load_suite(suite) for q in clip.questions if q.type == kind)
        assert max(answers.values()) / answers.total() < 0.5, kind


@every_suite
def test_it_can_be_made_anew(suite):
    """The generator still gives the set that ships, but for pixels that the last digit of a sine decides."""
    arrays, questions = make(suite)
    with np.load(data(suite)[0]) as shipped:
        assert shipped.files == [*arrays]
        assert all(np.mean(arrays[name] != shipped[name]) < 1e-3 for name in arrays)
    assert questions == json.loads(data(suite)[1].read_text(encoding="utf-8"))


def test_no_clip_is_in_two_sets():
    seeds = {suite: range(e.first_seed, e.first_seed + e.clips) for suite, e in EDITIONS.items()}
    assert all(min(own) >= 1 << 40 for own in seeds.values())  # training draws below
    assert not set(seeds["tinyqa"]) & set(seeds["tinyqa-wide"])


def runs(equal: np.ndarray) -> list[int]:
    """How many frames every stretch of equal ones has, of whether each but the first repeats the one before."""
    cuts = np.flatnonzero(np.r_[True, ~equal, True])
    return np.diff(cuts).tolist()


def test_half_of_a_wide_clip_stands_still():
    with np.load(data("tinyqa-wide")[0]) as arrays:
        clips = [clip for name in ("clean_60x84", "clean_84x60") for clip in arrays[name]]
    for clip in clips:
        repeats = (clip[1:] == clip[:-1]).all((1, 2, 3))
        assert repeats.sum() >= FRAMES / 2 and max(runs(repeats)) >= HELD


@pytest.mark.parametrize("seed", range(20))
def test_frames_are_held_but_not_a_digit(seed):
    story = invent(seed, 60, 84, 12)
    frames = shown(story)
    assert np.unique(frames).tolist() == list(range(12)) and len(frames) == FRAMES
    lengths = Counter(frames.tolist())
    assert set(lengths.values()) - {1} and all(n == 1 or n >= HELD for n in lengths.values())
    digit = 1 + sum(len(scene.shapes) for scene in story.scenes)
    visible = (draw(story)[1][frames] == digit).any((1, 2)).sum()
    assert visible == (story.flash.length if story.flash else 0)
    assert shown(invent(seed)).tolist() == list(range(FRAMES))  # none is held where the story is long enough


@pytest.mark.parametrize("limit", [0, -1])
def test_limits_that_leave_nothing(limit):
    with pytest.raises(ValueError, match=f"limit={limit} leaves no question to ask; expected 1 to 80 clips"):
        load_suite("tinyqa-wide", limit)


def test_a_limit_takes_the_first_clips():
    assert [clip.name for clip in load_suite("tinyqa-wide", 2)] == ["tinyqa-wide-000", "tinyqa-wide-001"]


def test_unknown_suites():
    with pytest.raises(
        ValueError, match=r"there is no suite 'tinyq'; there are: tinyqa, tinyqa-wide; did you mean 'tinyqa'"
    ):
        load_suite("tinyq")
