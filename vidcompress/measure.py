"""One question to one model, with every stage timed: used by the CLI and the demo. Times include the compression."""

from __future__ import annotations

import inspect
import statistics
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from vidcompress import patches
from vidcompress.costs import measured_kv_bytes
from vidcompress.engine.handle import handle_of
from vidcompress.engine.saliency import synchronise
from vidcompress.profiling import peak_memory_mb, reset_peak_memory
from vidcompress.trace import Prompt
from vidcompress.video import Video, prepare_inputs


@dataclass(frozen=True)
class Result:
    """What one answer took. Times in milliseconds, memory in MB; `generation` is everything after the prefill.

    Attributes:
        tokens_before, tokens_after: video tokens the encoder made, and those that the decoder's last layer ran over
            (newlines excluded).
        prompt_before, prompt_after: tokens of the whole prompt, text and newlines included, and those that entered the
            decoder.
        mean_length: tokens a decoder layer ran over, the mean over its layers.
        prefill_ms: the decoder's first run, without the time that compression took within it.
        decode_tokens_per_second: new tokens after the first, over the time from the end of the prefill; None for one.
        kv_cache_mb: keys and values that the cache holds after the answer.
        settings: name and fields of every method; empty without compression.
        head: where the SigLIP pooling head came from; None if none was used.
        peak_memory_mb: most memory during the call, allocated on the GPU or resident in the process; None where the
            system does not tell.
    """

    compression: str
    settings: list[dict[str, Any]]
    head: str | None
    answer: str
    frames: int
    tokens_before: int
    tokens_after: int
    prompt_before: int
    prompt_after: int
    mean_length: float
    new_tokens: int
    decode_ms: float
    vision_ms: float
    compression_ms: float
    prefill_ms: float
    generation_ms: float
    decode_tokens_per_second: float | None
    kv_cache_mb: float | None
    peak_memory_mb: float | None
    device: str
    dtype: str

    def to_dict(self) -> dict[str, Any]:
        """JSON-serialisable."""
        return asdict(self)


@dataclass(frozen=True)
class Run:
    """One call of `generate`, its stages timed; milliseconds and MB as in `Result`.

    Attributes:
        sequences: [B, L] prompt and answer.
        record: what the engine did; None without compression.
        generation_ms: everything after the prefill.
        first_token_ms: from the call to the end of the prefill.
    """

    sequences: torch.Tensor
    record: Prompt | None
    vision_ms: float
    compression_ms: float
    prefill_ms: float
    generation_ms: float
    first_token_ms: float
    decode_tokens_per_second: float | None
    kv_cache_mb: float | None
    peak_memory_mb: float | None


class _Clock:
    """Seconds spent in the vision encoder and in the first run of the decoder."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.vision = self.prefill = 0.0
        self.started: float | None = None
        self.prefilled: float | None = None

    def now(self) -> float:
        synchronise(self.device)
        return time.perf_counter()

    def before_decoder(self, module: nn.Module, args: Any) -> None:
        self.started = None if self.prefilled is not None else self.now()

    def after_decoder(self, module: nn.Module, args: Any, output: Any) -> None:
        if self.started is not None:
            self.prefilled = self.now()
            self.prefill, self.started = self.prefilled - self.started, None


@contextmanager
def _stages(model: Any) -> Iterator[_Clock]:
    """Times the stages of what runs inside. Registered after the engine's hooks, so the prefill is the short one."""
    patch = patches.find(model.config)
    base, decoder = patch.base(model), patch.decoder(model)
    clock = _Clock(next(decoder.parameters()).device)
    encode, own = base.get_video_features, base.__dict__.get("get_video_features")

    def timed(*args: Any, **kwargs: Any) -> Any:
        start = clock.now()
        output = encode(*args, **kwargs)
        clock.vision += clock.now() - start
        return output

    timed.__signature__ = inspect.signature(encode)  # type: ignore[attr-defined]
    base.__dict__["get_video_features"] = timed
    hooks = [
        decoder.register_forward_pre_hook(clock.before_decoder),
        decoder.register_forward_hook(clock.after_decoder, prepend=True),
    ]
    try:
        yield clock
    finally:
        for hook in hooks:
            hook.remove()
        if own is None:
            del base.__dict__["get_video_features"]
        else:
            base.__dict__["get_video_features"] = own


def ask(
    model: Any, processor: Any, video: Video, prompt: str, *, max_new_tokens: int = 64, decode_seconds: float = 0.0
) -> Result:
    """Asks `prompt` about `video`, greedily, and measures.

    Args:
        model: a video-LLM that has a patch, compressed or not.
        processor: its processor, with a chat template.
        decode_seconds: what decoding the video file took, to be reported along.

    Raises:
        ValueError: no patch for the model, no chat template, a trace that is off, or anything the engine refuses.
    """
    handle = handle_of(model)
    if handle is not None and not handle.trace.enabled:
        raise ValueError("measuring a compressed model needs its trace: set handle.trace.enabled = True")
    inputs = prepare_inputs(processor, video, prompt).to(model.device)
    # Pixels only: Qwen2.5-VL's seconds a frame, rounded to bf16, would move positions.
    typed = {k: v.to(model.dtype) if k.startswith("pixel_values") else v for k, v in inputs.items()}
    run = timed_generate(model, typed, max_new_tokens)
    length = inputs["input_ids"].shape[1]
    record = run.record or Prompt(length_before=length, length_after=length, layer_lengths=[length])
    before = sum(v.tokens for v in patches.find(model.config).encoded(model, inputs, {}))
    return Result(
        compression="none" if handle is None else handle.compression.name,
        settings=record.compression,
        head=record.head,
        answer=processor.batch_decode(run.sequences[:, length:], skip_special_tokens=True)[0].strip(),
        frames=len(video.frames),
        tokens_before=before,
        tokens_after=record.after if record.steps else before,
        prompt_before=length,
        prompt_after=record.length_after,
        mean_length=statistics.fmean(record.layer_lengths),
        new_tokens=run.sequences.shape[1] - length,
        decode_ms=1e3 * decode_seconds,
        vision_ms=run.vision_ms,
        compression_ms=run.compression_ms,
        prefill_ms=run.prefill_ms,
        generation_ms=run.generation_ms,
        decode_tokens_per_second=run.decode_tokens_per_second,
        kv_cache_mb=run.kv_cache_mb,
        peak_memory_mb=run.peak_memory_mb,
        device=str(model.device),
        dtype=str(model.dtype).removeprefix("torch."),
    )


def timed_generate(model: Any, inputs: Mapping[str, Any], max_new_tokens: int, **options: Any) -> Run:
    """`model.generate(**inputs)`, greedily unless `options` say otherwise, with every stage timed.

    A compressed model's trace must be on.
    """
    handle, device = handle_of(model), next(model.parameters()).device
    reset_peak_memory(device)
    with _stages(model) as clock:
        start = clock.now()
        settings = {"do_sample": False} | options | {"max_new_tokens": max_new_tokens, "return_dict_in_generate": True}
        output = model.generate(**inputs, **settings)
        end = clock.now()
    record = None if handle is None else handle.trace.last
    inner, total, signals = (
        (0.0, 0.0, 0.0) if record is None else (record.inner_seconds, record.seconds, record.signal_seconds)
    )
    written = output.sequences.shape[1] - inputs["input_ids"].shape[1]
    prefilled = end if clock.prefilled is None else clock.prefilled
    return Run(
        sequences=output.sequences,
        record=record,
        vision_ms=1e3 * (clock.vision - signals),
        compression_ms=1e3 * (total + signals),
        prefill_ms=1e3 * (clock.prefill - inner),
        generation_ms=1e3 * (end - start - clock.vision - (total - inner) - clock.prefill),
        first_token_ms=1e3 * (prefilled - start),
        decode_tokens_per_second=len(output.sequences) * (written - 1) / (end - prefilled) if written > 1 else None,
        kv_cache_mb=_cache_mb(output.past_key_values),
        peak_memory_mb=peak_memory_mb(device),
    )


def _cache_mb(cache: Any) -> float | None:
    """Keys and values of a cache; None if there is none."""
    return None if cache is None else sum(measured_kv_bytes(cache)) / 1e6
