"""What happens in a clip, before it is drawn: scenes, the shapes in them and how they move."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

FRAMES, SIDE = 24, 72
COLOURS = ("red", "green", "blue", "yellow", "magenta", "cyan", "orange", "white")
SHAPES = ("circle", "square", "triangle", "cross", "ring", "bar")
DIGITS = ("zero", "one", "two", "three", "four", "five")
TEXTURES = ("plain", "stripes", "checker", "gradient", "dots")
DIRECTIONS = ("left", "right", "up", "down", "still")
STILL = DIRECTIONS.index("still")
STEPS = np.array([(-1, 0), (1, 0), (0, -1), (0, 1), (0, 0)], np.float32)

RADII = ((4.6, 5.4), (6.6, 7.8), (9.4, 11.0))
"""Small, middle and large, in pixels: a token of the 72-pixel model covers 12 x 12."""
SHORTEST = 4  # frames of a scene
OVERLAP = 0.55  # of two radii: shapes may pass this near and hide part of each other


@dataclass
class Shape:
    """One shape in one scene; x and y are its centre in every frame of that scene, in pixels."""

    kind: int
    colour: int
    radius: float
    direction: int
    x: np.ndarray
    y: np.ndarray


@dataclass
class Scene:
    """Frames `start` to `start + length`: a background and its shapes, the last ones in front."""

    start: int
    length: int
    texture: int
    shapes: list[Shape] = field(default_factory=list)


@dataclass
class Flash:
    """A digit seen for a moment; x and y are its upper left corner."""

    digit: int
    colour: int
    start: int
    length: int
    x: int
    y: int


@dataclass
class Story:
    """A clip's content. `seed` also draws what does not matter: shades, noise, the phase of textures."""

    seed: int
    scenes: list[Scene]
    flash: Flash | None
    height: int = SIDE
    width: int = SIDE


def invent(seed: int, height: int = SIDE, width: int = SIDE, frames: int = FRAMES) -> Story:
    """The story of one clip; the same for the same arguments and version of numpy.

    Args:
        height, width: of the frames in pixels.
        frames: of the clip; at least 4.
    """
    rng = np.random.default_rng(seed)
    most = min(4, frames // SHORTEST)
    count = 1 + rng.choice(most, p=np.array([0.2, 0.3, 0.3, 0.2][:most]) / sum([0.2, 0.3, 0.3, 0.2][:most]))
    spare = frames - SHORTEST * count
    lengths = SHORTEST + rng.multinomial(spare, rng.dirichlet(np.full(count, 0.8)))
    flash_colour = int(rng.integers(len(COLOURS)))
    pairs = [divmod(int(i), len(SHAPES)) for i in rng.permutation(len(COLOURS) * len(SHAPES))]
    pairs = [pair for pair in pairs if pair[0] != flash_colour]
    scenes, start = [], 0
    for length in lengths:
        scene = Scene(start, int(length), int(rng.integers(len(TEXTURES))))
        for _ in range(int(rng.integers(1, 6 if count < 3 else 4))):
            _place(scene, pairs, rng, height, width)
        scenes.append(scene)
        start += int(length)
    return Story(seed, scenes, _flash(flash_colour, rng, height, width, frames), height, width)


def _place(scene: Scene, pairs: list[tuple[int, int]], rng: np.random.Generator, height: int, width: int) -> None:
    """Adds a shape of a colour and kind that the clip does not have, if a free path is found."""
    taken = {s.colour for s in scene.shapes}
    colour, kind = pairs.pop(next(i for i, pair in enumerate(pairs) if pair[0] not in taken))
    low, high = RADII[int(rng.integers(len(RADII)))]
    radius = float(rng.uniform(low, high))
    direction = int(rng.integers(4)) if rng.random() < 0.7 else STILL
    size = np.array([width, height], np.float32)
    for _ in range(30):
        first = rng.uniform(radius + 1, size - radius - 1).astype(np.float32)
        last = first + STEPS[direction] * np.float32(rng.uniform(20, 42))
        if (last < radius + 1).any() or (last > size - radius - 1).any():
            continue
        rest = rng.integers(scene.length // 2 + 1) if rng.random() < 0.5 else 0  # frames it stands still at the end
        way = np.minimum(np.linspace(0, 1, scene.length - rest).tolist() + [1.0] * int(rest), 1)[:, None]
        path = first + (last - first) * way.astype(np.float32)
        apart = [np.hypot(path[:, 0] - s.x, path[:, 1] - s.y) / (radius + s.radius) for s in scene.shapes]
        if all(d.min() > OVERLAP and np.mean(d > 0.95) >= 0.6 for d in apart):
            scene.shapes.append(Shape(kind, colour, radius, direction, path[:, 0], path[:, 1]))
            return


def _flash(colour: int, rng: np.random.Generator, height: int, width: int, frames: int) -> Flash | None:
    if rng.random() < 0.4:
        return None
    length = int(rng.integers(1, 3))
    start = int(rng.integers(frames - length + 1))
    x, y = int(rng.integers(1, width - 11)), int(rng.integers(1, height - 15))
    return Flash(int(rng.integers(len(DIGITS))), colour, start, length, x, y)
