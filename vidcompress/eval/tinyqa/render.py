"""From a story to pixels."""

from __future__ import annotations

import functools

import numpy as np

from vidcompress.eval.tinyqa.scenes import STILL, Flash, Scene, Shape, Story

RGB = np.array(
    [(225, 35, 35), (30, 190, 50), (45, 70, 235), (235, 220, 40), (225, 50, 215), (40, 215, 225), (245, 135, 25)]
    + [(245, 245, 245)],
    np.float32,
)
"""One a colour of `scenes.COLOURS`."""
FONT = (
    "01110 10001 10011 10101 11001 10001 01110",
    "00100 01100 00100 00100 00100 00100 01110",
    "01110 10001 00001 00110 01000 10000 11111",
    "11110 00001 00001 01110 00001 00001 11110",
    "00010 00110 01010 10010 11111 00010 00010",
    "11111 10000 11110 00001 00001 10001 01110",
)
GLYPHS = [np.kron([[int(bit) for bit in row] for row in rows.split()], np.ones((2, 2), int)) > 0 for rows in FONT]
"""Digits of 14 x 10 pixels."""
NOISE = 3.0  # standard deviation of a frame's grain, in grey levels
GRAIN = 1 << 19  # values of grain from which every frame takes a run


def render(story: Story) -> np.ndarray:
    """uint8 [T, H, W, 3]: the clip, with grain."""
    clean, _ = draw(story)
    return add_grain(clean, grain(), story.seed)


def draw(story: Story) -> tuple[np.ndarray, np.ndarray]:
    """The clip without grain, uint8 [T, H, W, 3], and what covers each pixel, int8 [T, H, W].

    The latter counts from 1 in the order of the story's shapes, scene after scene; the digit comes after the last one,
    0 is background.
    """
    rng = np.random.default_rng((story.seed, 1))
    frames = sum(scene.length for scene in story.scenes)
    picture = np.empty((frames, story.height, story.width, 3), np.float32)
    owner = np.zeros(picture.shape[:3], np.int8)
    number = 0
    for scene in story.scenes:
        here = slice(scene.start, scene.start + scene.length)
        picture[here] = _background(scene, story, rng)
        for shape in scene.shapes:
            number += 1
            box, cover = _coverage(shape, story.height, story.width)
            colour = RGB[shape.colour] * np.float32(rng.uniform(0.88, 1.0))
            picture[here][box] += cover[..., None] * (colour - picture[here][box])
            owner[here][box][np.broadcast_to(cover > 0.5, owner[here][box].shape)] = number
    if story.flash is not None:
        draw_digit(story.flash, picture, owner, number + 1)
    return np.clip(np.rint(picture), 0, 255).astype(np.uint8), owner


@functools.cache
def grain(seed: int = 7) -> np.ndarray:
    """int8 [GRAIN]: the grain of all clips."""
    return np.rint(np.random.default_rng(seed).standard_normal(GRAIN) * NOISE).astype(np.int8)


def add_grain(clean: np.ndarray, values: np.ndarray, seed: int) -> np.ndarray:
    """uint8 [T, H, W, 3]: the clip with its run of the grain, in whole numbers, so that it is the same everywhere."""
    pixels = clean[..., 0].size
    start = seed * 7919 % (len(values) - pixels)
    run = values[start : start + pixels].reshape(*clean.shape[:3], 1)
    return np.clip(clean.astype(np.int16) + run, 0, 255).astype(np.uint8)


def _background(scene: Scene, story: Story, rng: np.random.Generator) -> np.ndarray:
    """[n, H, W, 3] grey levels; n is 1 for one that stands still."""
    base = (rng.uniform(45, 115) + rng.uniform(-16, 16, 3)).astype(np.float32)
    height, period, angle = rng.uniform(22, 36), rng.uniform(8, 14), rng.uniform(0, 2 * np.pi)
    pans = rng.random() < 0.4
    speed = rng.uniform(-4, 4, 2)
    t = np.arange(scene.length if pans else 1, dtype=np.float32)[:, None, None]
    x = np.arange(story.width, dtype=np.float32) + (speed[0] * t + rng.uniform(0, period)).astype(np.float32)
    y = np.arange(story.height, dtype=np.float32)[:, None] + (speed[1] * t + rng.uniform(0, period)).astype(np.float32)
    if scene.texture == 0:
        wave = np.zeros((1, story.height, story.width))
    elif scene.texture == 1:
        wave = np.where(np.sin((np.cos(angle) * x + np.sin(angle) * y) * (2 * np.pi / period)) > 0, 1.0, -1.0)
    elif scene.texture == 2:
        wave = np.where((np.floor(x * 2 / period) + np.floor(y * 2 / period)) % 2 > 0, 1.0, -1.0)
    elif scene.texture == 3:
        across = np.cos(angle) * (np.arange(story.width) / story.width - 0.5)
        down = np.sin(angle) * (np.arange(story.height)[:, None] / story.height - 0.5)
        wave = 2.8 * (across + down)[None]
    else:
        centre = np.square(np.mod(x, period) - period / 2) + np.square(np.mod(y, period) - period / 2)
        wave = np.where(centre < np.square(0.28 * period), 1.3, -0.3)
    return base + (height * wave).astype(np.float32)[..., None]


def _coverage(shape: Shape, height: int, width: int) -> tuple[tuple[slice, slice, slice], np.ndarray]:
    """How much of each pixel the shape covers, from the distance to its edge.

    Returns the part of the scene's [n, H, W] pixels that it may touch, and a number in [0, 1] for each of them, one
    frame for a shape that stands still.
    """
    reach = 1.2 * shape.radius + 1
    left, right = (int(np.clip(v, 0, width)) for v in (shape.x.min() - reach, shape.x.max() + reach + 1))
    top, bottom = (int(np.clip(v, 0, height)) for v in (shape.y.min() - reach, shape.y.max() + reach + 1))
    frames = 1 if shape.direction == STILL else len(shape.x)
    dx = np.arange(left, right, dtype=np.float32) - shape.x[:frames, None, None]
    dy = np.arange(top, bottom, dtype=np.float32)[:, None] - shape.y[:frames, None, None]
    r, ax, ay = np.float32(shape.radius), np.abs(dx), np.abs(dy)
    if shape.kind == 0:
        inside = r - np.hypot(dx, dy)
    elif shape.kind == 1:
        inside = 0.85 * r - np.maximum(ax, ay)
    elif shape.kind == 2:
        inside = np.minimum((0.6 * (dy + r) - ax) * 0.86, 0.75 * r - dy)
    elif shape.kind == 3:
        inside = np.maximum(np.minimum(0.32 * r - ax, r - ay), np.minimum(0.32 * r - ay, r - ax))
    elif shape.kind == 4:
        distance = np.hypot(dx, dy)
        inside = np.minimum(r - distance, distance - 0.55 * r)
    else:
        inside = np.minimum(1.15 * r - ax, 0.38 * r - ay)
    return (slice(None), slice(top, bottom), slice(left, right)), np.clip(inside + 0.5, 0, 1)


def draw_digit(flash: Flash, picture: np.ndarray, owner: np.ndarray, number: int) -> None:
    """Puts a digit into a picture [T, H, W, 3], and its number into who owns the pixels [T, H, W]."""
    glyph = GLYPHS[flash.digit]
    rows, columns = slice(flash.y, flash.y + glyph.shape[0]), slice(flash.x, flash.x + glyph.shape[1])
    for frame in range(flash.start, flash.start + flash.length):
        picture[frame, rows, columns][glyph] = RGB[flash.colour]
        owner[frame, rows, columns][glyph] = number
