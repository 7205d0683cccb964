"""Batches of conversations about videos to answers, and what each took: behind lmms-eval and the Ray example."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from vidcompress import patches
from vidcompress.engine.handle import handle_of
from vidcompress.measure import Run, timed_generate
from vidcompress.video import Video, prepare_conversations


@dataclass(frozen=True)
class Question:
    """One row of a batch.

    Attributes:
        conversation: messages as chat templates take them; videos and images stand in `content` without their data.
        clips, pictures: those data, in the order of the messages.
    """

    conversation: list[dict[str, Any]]
    clips: list[Video] = field(default_factory=list)
    pictures: list[Any] = field(default_factory=list)

    @property
    def shape(self) -> tuple[int, ...]:
        """Frames of every clip: LLaVA-OneVision's processor stacks clips, so only equal shapes share a batch."""
        return tuple(len(clip.frames) for clip in self.clips)


@dataclass(frozen=True)
class Cost:
    """What one answer took; times in milliseconds and memory in MB are those of the whole batch it was part of.

    Attributes:
        frames: over all clips of the prompt.
        pixels: that the vision encoder was given of this prompt's clips, over all frames (after resizing, padding
            frames included).
        tokens_before, tokens_after: video tokens the encoder made, and those the decoder's last layer ran over.
        prompt_tokens: of the whole prompt before compression, padding excluded.
        new_tokens: written, the end of the answer included.
        mean_length: tokens a decoder layer ran over, padding included, the mean over layers; None without compression.
        batch: rows that were answered together.
        head: where the SigLIP pooling head came from; None if none was used.
    """

    frames: int
    pixels: int
    tokens_before: int
    tokens_after: int
    prompt_tokens: int
    new_tokens: int
    mean_length: float | None
    batch: int
    vision_ms: float
    compression_ms: float
    prefill_ms: float
    generation_ms: float
    peak_memory_mb: float | None
    head: str | None

    def to_dict(self) -> dict[str, Any]:
        """JSON-serialisable."""
        return asdict(self)


def answer(
    model: Any, processor: Any, questions: Sequence[Question], *, max_new_tokens: int = 64, **options: Any
) -> list[tuple[str, Cost]]:
    """Answers a batch of questions, greedily unless `options` (for `generate`) say otherwise.

    Args:
        model: a video-LLM that has a patch, compressed or not; a compressed one records a trace.

    Returns text and cost for each question. An error of the processor, the engine or the model is raised, never
    turned into an answer.

    Raises:
        ValueError: no patch for the model, a trace that is off, more than one answer asked for.
    """
    if options.get("num_return_sequences", 1) != 1:
        raise ValueError(f"one answer a question, got num_return_sequences={options['num_return_sequences']}")
    handle = handle_of(model)
    if handle is not None:
        if not handle.trace.enabled:
            raise ValueError("answers of a compressed model need its trace: set handle.trace.enabled = True")
        handle.trace.clear()  # a batch without video leaves no record, and must not be given an older one
    patch = patches.find(model.config)
    inputs = prepare_conversations(
        processor, [q.conversation for q in questions], [q.clips for q in questions], [q.pictures for q in questions]
    ).to(model.device)
    # Pixels only: Qwen2.5-VL's seconds a frame, rounded to bf16, would move positions.
    typed = {k: v.to(model.dtype) if k.startswith("pixel_values") else v for k, v in inputs.items()}
    run = timed_generate(model, typed, max_new_tokens, **options)
    seen = any(q.clips for q in questions)
    grids = [v.tokens for v in patch.encoded(model, inputs, {})] if seen else []
    pixels = _pixels(inputs) if seen else []
    length = inputs["input_ids"].shape[1]
    written = run.sequences[:, length:]
    texts = processor.batch_decode(written, skip_special_tokens=True)
    found, first = [], 0
    for row, question in enumerate(questions):
        own = slice(first, first + len(question.clips))
        first = own.stop
        cost = _cost(run, row, sum(grids[own]), sum(pixels[own]), len(questions), question)
        cost |= {"prompt_tokens": int(inputs["attention_mask"][row].sum()), "new_tokens": _written(written[row], model)}
        found.append((texts[row].strip(), Cost(**cost)))
    return found


def _cost(run: Run, row: int, before: int, pixels: int, batch: int, question: Question) -> dict[str, Any]:
    record = run.record
    steps = [] if record is None else [step for step in record.steps if step.row == row]
    lengths = [] if record is None else record.layer_lengths
    after = sum({step.video: step.after for step in steps}.values()) if steps else before
    return {
        "frames": sum(question.shape),
        "pixels": pixels,
        "tokens_before": before,
        "tokens_after": after,
        "mean_length": sum(lengths) / len(lengths) if lengths else None,
        "batch": batch,
        "vision_ms": run.vision_ms,
        "compression_ms": run.compression_ms,
        "prefill_ms": run.prefill_ms,
        "generation_ms": run.generation_ms,
        "peak_memory_mb": run.peak_memory_mb,
        "head": None if record is None else record.head,
    }


def _pixels(inputs: Mapping[str, Any]) -> list[int]:
    """Of every video of a batch: what the encoder reads, over three channels."""
    values = inputs["pixel_values_videos"]
    if "video_grid_thw" in inputs:  # [patches of all videos, values of a patch]
        return [int(grid.prod()) * values.shape[1] // 3 for grid in inputs["video_grid_thw"]]
    return [values[0].numel() // 3] * len(values)  # [videos, frames, 3, height, width]


def _written(tokens: torch.Tensor, model: Any) -> int:
    """Tokens of one answer up to its end; what follows pads a batch."""
    ends = model.generation_config.eos_token_id
    ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
    stops = torch.isin(tokens.cpu(), torch.tensor(ends, dtype=tokens.dtype)).nonzero()
    return int(stops[0]) + 1 if len(stops) else len(tokens)
