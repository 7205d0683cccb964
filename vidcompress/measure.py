"""One question to one model, with every stage timed: used by the CLI and the demo. Times include the compression."""

from __future__ import annotations

import contextlib
import inspect
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vidcompress import patches
from vidcompress.engine.handle import handle_of
from vidcompress.engine.saliency import synchronise
from vidcompress.video import Video, prepare_inputs


@dataclass(frozen=True)
class Result:
    """What one answer took. Times in milliseconds, memory in MB; `generation` is everything after the prefill.

    Attributes:
        tokens_before, tokens_after: video tokens the encoder made, and those the decoder ran over (newlines excluded).
        prompt_before, prompt_after: the same for the whole prompt, text and newlines included.
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
    new_tokens: int
    decode_ms: float
    vision_ms: float
    compression_ms: float
    prefill_ms: float
    generation_ms: float
    peak_memory_mb: float | None
    device: str
    dtype: str

    def to_dict(self) -> dict[str, Any]:
        """JSON-serialisable."""
        return asdict(self)


class _Clock:
    """Seconds spent in the vision encoder and in the first run of the decoder."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.vision = self.prefill = 0.0
        self.started: float | None = None
        self.prefilled = False

    def now(self) -> float:
        synchronise(self.device)
        return time.perf_counter()

    def before_decoder(self, module: nn.Module, args: Any) -> None:
        self.started = None if self.prefilled else self.now()

    def after_decoder(self, module: nn.Module, args: Any, output: Any) -> None:
        if self.started is not None:
            self.prefill, self.started, self.prefilled = self.now() - self.started, None, True


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
    floating = {k: v.to(model.dtype) if v.is_floating_point() else v for k, v in inputs.items()}
    device = next(model.parameters()).device
    _reset_peak(device)
    with _stages(model) as clock:
        start = clock.now()
        output = model.generate(**floating, max_new_tokens=max_new_tokens, do_sample=False)
        total = clock.now() - start
    length = inputs["input_ids"].shape[1]
    patch = patches.find(model.config)
    found = patch.encoded(model, inputs, {})
    before = after = sum(v.tokens for v in found)
    prompt_after, compression, signals = length, 0.0, 0.0
    settings, head = [], None
    if handle is not None and handle.trace.last is not None:
        last = handle.trace.last
        settings, head = last.compression, last.head
        after, prompt_after = last.after, last.length_after
        compression, signals = last.seconds + last.signal_seconds, last.signal_seconds
    vision = clock.vision - signals
    answer = processor.batch_decode(output[:, length:], skip_special_tokens=True)[0].strip()
    return Result(
        compression="none" if handle is None else handle.compression.name,
        settings=settings,
        head=head,
        answer=answer,
        frames=len(video.frames),
        tokens_before=before,
        tokens_after=after,
        prompt_before=length,
        prompt_after=prompt_after,
        new_tokens=output.shape[1] - length,
        decode_ms=1e3 * decode_seconds,
        vision_ms=1e3 * vision,
        compression_ms=1e3 * compression,
        prefill_ms=1e3 * clock.prefill,
        generation_ms=1e3 * (total - clock.vision - (compression - signals) - clock.prefill),
        peak_memory_mb=_peak_mb(device),
        device=str(device),
        dtype=str(model.dtype).removeprefix("torch."),
    )


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def _peak_mb(device: torch.device) -> float | None:
    """Most memory since `_reset_peak`: allocated on the GPU or resident in the process; None where it is not told."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    with contextlib.suppress(OSError):
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return next(int(line.split()[1]) / 1e3 for line in status.splitlines() if line.startswith("VmHWM"))
    return None
