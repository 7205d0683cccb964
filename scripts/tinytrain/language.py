"""Second half of the training: the language model learns to answer, over tokens of a tower that is done learning.

Several questions about one clip share one forward: each sees the video and itself, and its positions start anew after
the video, which is exactly what it would see alone. Clips grow longer as training goes on (4 frames at first, 24 at
last), so that what binds colours to shapes is learnt where it is cheap; two more parts, each with a learning rate that
rises and falls again, are for what is learnt late: where things are, how many, how large. No token is left out, unless
the control run (`drops`) asks for it.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

from tinytrain.models import CELL, TEXT, Student
from tinytrain.vision import optimisers, schedule
from vidcompress.eval.tinyqa import FRAMES, TYPES, Question, invent, questions_about, render
from vidcompress.eval.tinyqa.words import VOCABULARY, encode

BATCH, PACKED, BLOCK = 8, 8, 16  # clips a step, questions a clip, ids a question
KEPT = (0.1, 0.5)  # of a clip's tokens, in the control run with drops


@dataclass(frozen=True)
class Part:
    """A part of training.

    Args:
        rate: highest learning rate of its cosine.
        curriculum: until which share of the part, clips of which lengths, each as likely as it is often in here.
        weights: what the loss of a type counts, where it is not 1.
        fresh: new clips a step.
    """

    rate: float
    curriculum: tuple[tuple[float, tuple[int, ...]], ...]
    weights: Mapping[str, float]
    fresh: int = 3


PARTS = (
    Part(4e-3, ((0.3, (4, 8)), (0.5, (8, 12)), (1.0, (FRAMES, FRAMES, FRAMES, 12))), {"place": 2.0, "direction": 2.0}),
    Part(3e-3, ((1.0, (FRAMES, FRAMES, FRAMES, 12)),), {"place": 2.0, "direction": 2.0}),
    Part(2e-3, ((1.0, (FRAMES,)),), {"size": 2.0, "digit": 2.0, "count": 2.0, "direction": 0.5}, fresh=5),
)


@dataclass
class Shelf:
    """Encoded clips of one length and size: tokens [N, D] in fp16, and their questions."""

    capacity: int
    clips: list[tuple[Tensor, list[Question]]] = field(default_factory=list)

    def add(self, clip: tuple[Tensor, list[Question]], rng: np.random.Generator) -> None:
        """Adds one, in the place of a random one when the shelf is full."""
        if len(self.clips) < self.capacity:
            self.clips.append(clip)
        else:
            self.clips[int(rng.integers(self.capacity))] = clip


def spread(questions: list[Question], count: int, rng: np.random.Generator) -> list[Question]:
    """`count` questions, as evenly over the types as the clip allows, no type's twice before every type's once."""
    by_type: dict[str, list[Question]] = defaultdict(list)
    for i in rng.permutation(len(questions)):
        by_type[questions[i].type].append(questions[i])
    chosen: list[Question] = []
    while len(chosen) < count:
        for name in rng.permutation(sorted(by_type)):
            of_type = by_type[str(name)]
            chosen.append(of_type.pop() if len(of_type) > 1 else of_type[0])
    return chosen[:count]


class Lessons:
    """Draws batches of clips and packs their questions."""

    def __init__(self, student: Student, part: int, seed: int, drops: bool, capacity: int = 5000) -> None:
        self.student, self.drops, self.part = student, drops, PARTS[part]
        self.rng = np.random.default_rng((seed, 5, part) if part else (seed, 5))
        self.shelves: dict[tuple[int, int, int], Shelf] = defaultdict(lambda: Shelf(capacity))

    def batch(self, done: float) -> tuple[Tensor, Tensor, Tensor, list[Question]]:
        """Embeddings [B, L, D], mask [1, 1, L, L], positions [A, 1, L], and the questions."""
        lengths = next(lengths for end, lengths in self.part.curriculum if done < end or end == 1.0)
        frames = int(self.rng.choice(lengths))
        height, width = self.student.sizes[int(self.rng.integers(len(self.student.sizes)))]
        shelf = self.shelves[frames, height, width]
        self._fill(shelf, max(self.part.fresh, 2 * BATCH - len(shelf.clips)), frames, height, width)
        picked = [shelf.clips[int(i)] for i in self.rng.integers(len(shelf.clips), size=BATCH)]
        questions = [q for _, known in picked for q in spread(known, PACKED, self.rng)]
        video = torch.stack([tokens for tokens, _ in picked]).float()
        embeds, positions = self._prompt(video, frames, height, width)
        ids = torch.tensor([block(q) for q in questions], device=video.device).view(BATCH, PACKED * BLOCK)
        embeds = torch.cat([embeds, self.student.decoder.embed_tokens(ids)], 1)
        mask, positions = pack(positions)
        return embeds, mask, positions, questions

    @torch.no_grad()
    def _fill(self, shelf: Shelf, count: int, frames: int, height: int, width: int) -> None:
        stories = [invent(int(s), height, width, frames) for s in self.rng.integers(1 << 40, size=count)]
        pixels = torch.from_numpy(np.stack([render(story) for story in stories]))
        tokens = (
            self.student.patches(pixels.to(self.student.device))["tokens"]
            .half()
            .reshape(count, -1, TEXT["hidden_size"])
        )
        for i, story in enumerate(stories):
            shelf.add((tokens[i].clone(), questions_about(story)), self.rng)

    def _prompt(self, video: Tensor, frames: int, height: int, width: int) -> tuple[Tensor, Tensor]:
        """Everything before the questions: [B, n, D] and its positions [A, n]."""
        student, device = self.student, video.device
        words = student.decoder.embed_tokens
        around = (torch.tensor(ids, dtype=torch.long, device=device) for ids in (student.before, student.after))
        before, after = map(words, around)
        positions = student.positions(frames // student.stride, height // CELL, width // CELL).to(device)
        total, start = video.shape[1], len(student.before)
        if self.drops and self.rng.random() < 0.5:
            kept = int(self.rng.uniform(*KEPT) * total)
            drawn = np.stack([np.sort(self.rng.permutation(total)[:kept]) for _ in range(BATCH)])
            chosen = torch.from_numpy(drawn).to(device)
            video = video.gather(1, chosen[..., None].expand(-1, -1, video.shape[-1]))
            kept_places = (start + chosen)[None].expand(len(positions), -1, -1)
            rows = positions[:, None].expand(-1, BATCH, -1)
            own = rows.gather(-1, kept_places)
            positions = torch.cat([rows[..., :start], own, rows[..., start + total :]], -1)
        else:
            positions = positions[:, None]
        parts = [before.expand(BATCH, -1, -1), video, student.between(BATCH), after.expand(BATCH, -1, -1)]
        return torch.cat(parts, 1), positions


def block(question: Question) -> list[int]:
    """BLOCK ids: question, the turn's end, the answer, padding."""
    ids = [*encode(question.text), *encode("<|im_end|> <|im_start|> assistant"), VOCABULARY[question.answer]]
    return ids + [VOCABULARY["<pad>"]] * (BLOCK - len(ids))


def pack(prefix: Tensor) -> tuple[Tensor, Tensor]:
    """The mask [1, 1, L, L] and positions [A, B, L] of PACKED questions after a prefix with positions [A, B, n]."""
    start, device = prefix.shape[-1], prefix.device
    mask = torch.ones(start + PACKED * BLOCK, start + PACKED * BLOCK, dtype=torch.bool, device=device).tril()
    for first in range(start, len(mask), BLOCK):
        mask[first : first + BLOCK, start:first] = False
    own = prefix[..., -1].amax() + 1 + torch.arange(BLOCK, device=device).repeat(PACKED)
    return mask[None, None], torch.cat([prefix, own.expand(*prefix.shape[:2], -1)], -1)


def packed_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, scaling: float, **_: Any
) -> tuple[Tensor, None]:
    """What the mask of `pack` says, half of it without a mask: a fifth less time a step than transformers' own sdpa.

    Args:
        query, key, value: [B, H or H', L, D], H' dividing H.
        attention_mask: [1, 1, L, L].

    Returns [B, L, H, D] and no weights.
    """
    start = query.shape[2] - PACKED * BLOCK
    shared = {"scale": scaling, "enable_gqa": True}
    prefix = (x[:, :, :start] for x in (query, key, value))
    own = F.scaled_dot_product_attention(
        query[:, :, start:], key, value, attn_mask=attention_mask[:, :, start:], **shared
    )
    video = F.scaled_dot_product_attention(*prefix, is_causal=True, **shared)
    return torch.cat([video, own], 2).transpose(1, 2), None


def train_language(student: Student, part: int, steps: int, seed: int, drops: bool) -> list[dict[str, float]]:
    """Trains the decoder for one of PARTS; returns a log of accuracies by type over the last hundred steps."""
    AttentionInterface.register("packed", packed_attention)
    student.decoder.set_attn_implementation("packed")
    for module in student.eyes:
        module.requires_grad_(False)
    head = student.model.lm_head
    made, parameters = optimisers([student.decoder, head], PARTS[part].rate)
    extra = [p for p in student.extra if p.requires_grad]
    made[1].add_param_group({"params": extra})
    lessons, log = Lessons(student, part, seed, drops), []
    right: dict[str, list[bool]] = defaultdict(list)
    start, end_of_turn, device = time.process_time(), VOCABULARY["<|im_end|>"], student.device
    for step in range(steps):
        for optimiser in made:
            for group in optimiser.param_groups:
                group["lr"] = schedule(PARTS[part].rate, step, step / steps, warm=100)
        embeds, mask, positions, questions = lessons.batch(step / steps)
        states = student.decode(embeds, mask, positions)
        asked = torch.tensor([len(encode(q.text)) + 2 for q in questions], device=device).view(BATCH, PACKED)
        asked = asked + torch.arange(PACKED, device=device) * BLOCK + embeds.shape[1] - PACKED * BLOCK
        rows = torch.arange(BATCH, device=device)[:, None]
        logits, ends = head(states[rows, asked]).flatten(0, 1), head(states[rows, asked + 1]).flatten(0, 1)
        answers = torch.tensor([VOCABULARY[q.answer] for q in questions], device=device)
        weights = torch.tensor([PARTS[part].weights.get(q.type, 1.0) for q in questions], device=device)
        loss = (F.cross_entropy(logits, answers, reduction="none") * weights).sum() / weights.sum()
        total = loss + 0.05 * F.cross_entropy(ends, torch.full_like(answers, end_of_turn))
        for optimiser in made:
            optimiser.zero_grad()
        total.backward()
        nn.utils.clip_grad_norm_([*parameters, *extra], 1.0)
        for optimiser in made:
            optimiser.step()
        for question, ok in zip(questions, (logits.argmax(-1) == answers).tolist()):
            right[question.type].append(ok)
        if step % 100 == 99:
            share = {name: float(np.mean(right[name])) for name in TYPES if right[name]}
            log.append({"step": step + 1, "part": part, "cpu_seconds": time.process_time() - start, **share})
            log[-1] |= {"loss": float(loss.detach()), "mean": float(np.mean(list(share.values())))}
            print({k: round(v, 2) for k, v in log[-1].items()}, flush=True)
            right.clear()
    student.decoder.set_attn_implementation("sdpa")
    return log
