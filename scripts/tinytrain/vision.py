"""First half of the training: a tower that knows, in every patch, which shape of which colour it shows and where."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinytrain.models import CELL, PATCH, TEXT, TOWER, Student
from vidcompress.eval.tinyqa import SIDE
from vidcompress.eval.tinyqa.questions import PLACES, side
from vidcompress.eval.tinyqa.render import add_grain, draw, draw_digit, grain
from vidcompress.eval.tinyqa.scenes import COLOURS, DIGITS, RADII, SHAPES, TEXTURES, Flash, Scene, Shape, Story

KINDS = 1 + len(SHAPES) + len(DIGITS)  # 0 is background
SIDES = 1 + len(PLACES)  # 0 is background, or where one might argue
BATCH = 24


def crowd(seed: int, frames: int = 1, height: int = SIDE, width: int = SIDE) -> tuple[np.ndarray, np.ndarray, dict]:
    """A picture full of shapes and digits, as uint8 [frames, H, W, 3], and its labels.

    Returns:
        The picture; who owns its pixels [frames, H, W]; and `kind` and `colour` [n + 1] of every owner, 0 the
        background, `centre` [n + 1, 3] (x, y, radius) in pixels, and `texture`.
    """
    rng = np.random.default_rng((seed, 3))
    scene, places = Scene(0, frames, int(rng.integers(len(TEXTURES)))), []
    digits: list[Flash] = []
    for _ in range(9):
        is_digit = rng.random() < 0.25
        low, high = (7.0, 8.0) if is_digit else RADII[int(rng.integers(len(RADII)))]
        r, colour = float(rng.uniform(low, high)), int(rng.integers(len(COLOURS)))
        for _ in range(6):
            x, y = rng.uniform(r + 1, width - r - 1), rng.uniform(r + 1, height - r - 1)
            if all(math.hypot(x - a, y - b) > rng.uniform(0.6, 0.95) * (r + q) for a, b, q in places):
                break
        else:
            continue
        places.append((x, y, r))
        if is_digit:
            left, top = int(np.clip(x - 5, 1, width - 11)), int(np.clip(y - 7, 1, height - 15))
            first = int(rng.integers(frames))
            digits.append(Flash(int(rng.integers(len(DIGITS))), colour, first, frames - first, left, top))
        else:
            drift = rng.uniform(-3, 3, 2) * np.arange(frames)[:, None]
            path = (np.array([x, y]) + drift).astype(np.float32)
            scene.shapes.append(Shape(int(rng.integers(len(SHAPES))), colour, r, 0, path[:, 0], path[:, 1]))
    picture, owner = draw(Story(seed, [scene], None, height, width))
    floats = picture.astype(np.float32)
    for number, digit in enumerate(digits, len(scene.shapes) + 1):
        draw_digit(digit, floats, owner, number)
    things = [(1 + s.kind, 1 + s.colour, s.x[0], s.y[0], s.radius) for s in scene.shapes]
    things += [(1 + len(SHAPES) + d.digit, 1 + d.colour, d.x + 5, d.y + 7, 7.0) for d in digits]
    table = np.array([(0, 0, 0, 0, 0), *things], np.float32)
    labels = {"kind": table[:, 0], "colour": table[:, 1], "centre": table[:, 2:], "texture": scene.texture}
    return add_grain(floats.astype(np.uint8), grain(), seed), owner, labels


def _owners(owner: np.ndarray, cell: int, least: int) -> np.ndarray:
    """[h, w]: of every cell of `cell` x `cell` pixels the thing that covers most, 0 below `least` pixels a frame."""
    frames, height, width = owner.shape
    cells = owner.reshape(frames, height // cell, cell, width // cell, cell).transpose(1, 3, 0, 2, 4)
    cells = cells.reshape(height // cell, width // cell, -1)
    counts = np.stack([(cells == number).sum(-1) for number in range(1, max(2, int(owner.max()) + 1))], -1)
    return np.where(counts.max(-1) >= least * frames, 1 + counts.argmax(-1), 0)


class Labels(nn.Module):
    """Linear read-outs that a good tower makes easy, and their losses; thrown away after training."""

    def __init__(self, pooled: bool, absolute: bool) -> None:
        super().__init__()
        width, hidden = TOWER["width"], TEXT["hidden_size"]
        self.kind, self.colour = nn.Linear(hidden, KINDS), nn.Linear(hidden, 1 + len(COLOURS))
        self.texture, self.patch_kind = nn.Linear(hidden, len(TEXTURES)), nn.Linear(width, KINDS)
        self.side = nn.Linear(hidden, SIDES) if absolute else None
        self.offset, self.mask = nn.Linear(width, 3), nn.Linear(width, PATCH * PATCH)
        self.pooled = nn.Linear(width, KINDS - 1 + len(COLOURS) + len(TEXTURES)) if pooled else None

    def forward(self, seen: dict[str, Tensor], batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, float]]:
        tokens, last = seen["tokens"], seen["last"]
        something = (batch["token_kind"] > 0).float()
        weight = (1 + 2 * something) / (1 + 2 * something).mean()
        kind, colour = self.kind(tokens), self.colour(tokens)
        losses = {
            "kind": (_cross_entropy(kind, batch["token_kind"]) * weight).mean(),
            "colour": (_cross_entropy(colour, batch["token_colour"]) * weight).mean(),
            "texture": 0.5 * _cross_entropy(self.texture(tokens), batch["token_texture"]).mean(),
            "place": 0.5 * (tokens[..., :2] - batch["place"]).square().mean(),
            "patch": (_cross_entropy(self.patch_kind(last), batch["kind"]) * (1 + 2 * (batch["kind"] > 0))).mean() / 2,
            "offset": ((self.offset(last) - batch["offset"]).abs().mean(-1) * (batch["kind"] > 0)).mean() * 2,
            "mask": F.binary_cross_entropy_with_logits(self.mask(seen["first"]), batch["mask"]),
        }
        if self.side is not None:
            side = self.side(tokens)
            losses["side"] = (_cross_entropy(side, batch["side"]) * weight).mean()
        if self.pooled is not None:
            losses["pooled"] = 0.5 * F.binary_cross_entropy_with_logits(self.pooled(seen["pooled"]), batch["all"])
        found = something > 0
        report = {name: float(value.detach()) for name, value in losses.items()}
        report["kind right"] = float((kind.argmax(-1) == batch["token_kind"])[found].float().mean())
        report["colour right"] = float((colour.argmax(-1) == batch["token_colour"])[found].float().mean())
        if self.side is not None:
            report["side right"] = float((side.argmax(-1) == batch["side"])[found].float().mean())
        return torch.stack(list(losses.values())).sum(), report


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape)


def make_batch(
    absolute: bool, seeds: Iterable[int], frames: int, height: int, width: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """Pictures uint8 [B, frames, H, W, 3] and the labels of their patches and tokens.

    `place` of a token is how far its object is from the middle of the picture or, unless `absolute`, from the token, in
    tokens; 0 where there is none, so that what attends widely still reads where the objects are.
    """
    pictures, rows = [], []
    for seed in seeds:
        picture, owner, truth = crowd(seed, frames, height, width)
        pictures.append(picture)
        rows.append(_labels(owner, truth, height, width, absolute))
    batch = {name: torch.from_numpy(np.stack([row[name] for row in rows])) for name in rows[0]}
    return torch.from_numpy(np.stack(pictures)), batch


def _labels(owner: np.ndarray, truth: dict, height: int, width: int, absolute: bool) -> dict[str, np.ndarray]:
    patch, token = _owners(owner, PATCH, 4), _owners(owner, 2 * PATCH, 8)
    rows, columns = np.mgrid[: height // PATCH, : width // PATCH] * PATCH + PATCH / 2
    centre = truth["centre"][patch]
    offset = np.stack([(centre[..., 0] - columns) / 8, (centre[..., 1] - rows) / 8, centre[..., 2] / 4 - 2], -1)
    inside = (owner[0] > 0).reshape(height // PATCH, PATCH, width // PATCH, PATCH).transpose(0, 2, 1, 3)
    rows, columns = (np.mgrid[: height // CELL, : width // CELL] + 0.5) * CELL
    origin = (width / 2, height / 2) if absolute else np.stack([columns, rows], -1)
    place = (truth["centre"][token][..., :2] - origin) / CELL * (token > 0)[..., None]
    centres = truth["centre"][:, :2] / (width, height)
    sides = np.array([0, *(1 + PLACES.index(s) if (s := side(x, y)) else 0 for x, y in centres[1:])])
    kinds, colours = truth["kind"][1:].astype(int), truth["colour"][1:].astype(int)
    everything = np.zeros(KINDS - 1 + len(COLOURS) + len(TEXTURES), np.float32)
    everything[kinds - 1] = 1
    everything[KINDS - 1 + colours - 1] = 1
    everything[KINDS - 1 + len(COLOURS) + truth["texture"]] = 1
    return {
        "kind": truth["kind"][patch].astype(np.int64).reshape(-1),
        "offset": offset.astype(np.float32).reshape(-1, 3),
        "mask": inside.reshape(-1, PATCH * PATCH).astype(np.float32),
        "token_kind": truth["kind"][token].astype(np.int64).reshape(-1),
        "token_colour": truth["colour"][token].astype(np.int64).reshape(-1),
        "token_texture": np.full(token.size, truth["texture"], np.int64),
        "place": place.astype(np.float32).reshape(-1, 2),
        "side": sides[token].reshape(-1),
        "all": everything,
    }


def optimisers(modules: Iterable[nn.Module], rate: float) -> tuple[list[torch.optim.Optimizer], list[nn.Parameter]]:
    """Muon for the matrices inside layers, AdamW for all else."""
    named = {id(p): (n, p) for module in modules for n, p in module.named_parameters() if p.requires_grad}
    inner = [p for n, p in named.values() if p.ndim == 2 and "embed" not in n and "lm_head" not in n]
    outer = [p for n, p in named.values() if p.ndim != 2 or "embed" in n or "lm_head" in n]
    muon = torch.optim.Muon(inner, lr=rate, weight_decay=0.01, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    adam = torch.optim.AdamW(outer, lr=rate, weight_decay=0.0, betas=(0.9, 0.98))
    return [muon, adam], inner + outer


def schedule(rate: float, step: int, done: float, warm: int = 60) -> float:
    """Linear warm-up, then a cosine down to 2 %; `done` in [0, 1]."""
    return rate * min(1, (step + 1) / warm) * (0.49 * (1 + math.cos(math.pi * min(done, 1))) + 0.02)


def train_vision(student: Student, steps: int, seed: int, rate: float = 4e-3) -> list[dict[str, float]]:
    """Trains the student's eyes; returns a log of losses and accuracies over tokens that show something."""
    labels = Labels(student.has_head, student.knows_place).to(student.device)
    made, parameters = optimisers([*student.eyes, labels], rate)
    rng, log, start = np.random.default_rng((seed, 4)), [], time.process_time()
    for step in range(steps):
        for optimiser in made:
            for group in optimiser.param_groups:
                group["lr"] = schedule(rate, step, step / steps)
        height, width = student.sizes[int(rng.integers(len(student.sizes)))]
        seeds = rng.integers(1 << 40, size=BATCH).tolist()
        pictures, batch = make_batch(student.knows_place, seeds, student.stride, height, width)
        batch = {name: values.to(student.device) for name, values in batch.items()}
        loss, report = labels(student.patches(pictures.to(student.device)), batch)
        for optimiser in made:
            optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimiser in made:
            optimiser.step()
        if step % 50 == 49:
            log.append({"step": step + 1, "cpu_seconds": time.process_time() - start, **report})
            print({k: round(v, 3) for k, v in log[-1].items()}, flush=True)
    return log
