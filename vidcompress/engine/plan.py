"""What becomes of the videos of one prompt: the method is asked about each, and the sequence is shortened."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vidcompress.engine.saliency import synchronise
from vidcompress.engine.sequence import Sequence
from vidcompress.method import Pipeline
from vidcompress.tokens import Reduction, Site, VideoTokens
from vidcompress.trace import Prompt, Step, Trace

if TYPE_CHECKING:
    from vidcompress.patches.base import EncodedVideo


@dataclass
class Encoding:
    """One call of `get_video_features`.

    Attributes:
        videos: what was encoded, in order.
        pipeline: what is to become of them, whatever is switched to meanwhile.
        head: where the SigLIP pooling head came from, or None.
        seconds: what taking the signals cost.
    """

    videos: list[EncodedVideo]
    pipeline: Pipeline
    head: str | None
    seconds: float


@dataclass
class Plan:
    """What becomes of every row: the columns that stay, and new embeddings for some of them.

    Attributes:
        pipeline: the methods that were asked.
        columns: for every row the columns that stay.
        merged: (row, columns [K], embeddings [K, C]) of every video that was merged.
        changed: whether anything was removed or merged at all.
        prompt: the trace's record, or None if the trace is off.
        started: when the work on this prompt began, in seconds of `time.perf_counter`.
    """

    pipeline: Pipeline
    columns: list[Tensor] = field(default_factory=list)
    merged: list[tuple[int, Tensor, Tensor]] = field(default_factory=list)
    changed: bool = False
    prompt: Prompt | None = None
    started: float = 0.0

    @classmethod
    def make(cls, tokens: Sequence, where: Tensor, encoding: Encoding, traced: bool) -> Plan:
        """Asks the method about every video, row by row.

        Args:
            tokens: the sequence with all features in place.
            where: [B, L] bool, the video placeholders, newlines included.

        Raises ValueError if placeholders and videos do not match, or a video's values are not finite.
        """
        videos, where = encoding.videos, where.to(tokens.mask.device)
        copies = _copies(int(where.sum()), videos)
        plan = cls(encoding.pipeline)
        if traced:
            compression = [{"method": m.name, **m.settings()} for m in encoding.pipeline]
            plan.started = time.perf_counter()
            plan.prompt = Prompt([], tokens.length, 0, 0.0, encoding.seconds, compression, encoding.head)
        decided: dict[int, tuple[Reduction, Tensor | None]] = {}
        first = following = 0
        for row in range(where.shape[0]):
            if row % copies:
                following = first  # beams and return sequences of one sample share its videos
            else:
                first = following
            stays = tokens.mask[row] & ~where[row]
            places = where[row].nonzero().squeeze(1)
            while places.numel():
                if following == len(videos) or places.numel() < videos[following].placeholders:
                    raise ValueError(
                        f"row {row} has {int(where[row].sum())} video placeholders, which is no whole number of its "
                        f"videos ({[v.placeholders for v in videos]} placeholders each); a truncated prompt?"
                    )
                video = videos[following]
                mine, newlines, places = places.tensor_split([video.tokens, video.placeholders])
                if following not in decided:
                    decided[following] = plan._reduce(tokens.embeds[row, mine], video, row, following)
                reduction, embeds = decided[following]
                stays[mine[reduction.keep]] = True
                stays[newlines] = True
                if embeds is not None:
                    plan.merged.append((row, mine[reduction.keep], embeds))
                plan.changed |= not reduction.is_identity
                following += 1
            plan.columns.append(stays.nonzero().squeeze(1))
        return plan

    def carry_out(self, tokens: Sequence) -> tuple[Sequence, Tensor]:
        """The shortened sequence, merged embeddings in place, and the column each of its tokens came from."""
        embeds = tokens.embeds
        if self.merged:
            row = torch.cat([torch.full_like(columns, r) for r, columns, _ in self.merged])
            column = torch.cat([columns for _, columns, _ in self.merged])
            embeds = embeds.index_put((row, column), torch.cat([new for _, _, new in self.merged]))
        return replace(tokens, embeds=embeds).shortened(self.columns, self.pipeline.positions == "renumber")

    def record(self, trace: Trace, length: int) -> None:
        """Ends the record of a prompt that the decoder is about to run over with `length` tokens."""
        if self.prompt is not None:
            synchronise(self.columns[0].device)
            self.prompt.seconds = time.perf_counter() - self.started
            self.prompt.length_after = length
            trace.prompts.append(self.prompt)

    def _reduce(
        self, features: Tensor, video: EncodedVideo, row: int, number: int
    ) -> tuple[Reduction, Tensor | None]:
        """The decision for one video and, if it merges, the survivors' embeddings."""
        method = self.pipeline.stages[Site.projector()]
        signals = {
            name: s.to(features.device) if name == "frame_features" else s.to(features.device).flatten()
            for name, s in video.signals.items()
        }
        if "frame_features" in method.needs and "frame_features" not in signals:
            # Without a pooling head: the mean of the frame's tokens, FastVID's rule for towers that have none.
            signals["frame_features"] = features.detach().unflatten(0, (video.grid[0], -1)).float().mean(1)
        _refuse_nonfinite({"projector output": features, **signals}, f"video {number} (row {row})")
        seen = VideoTokens(features.detach(), video.grid, None, signals)
        if self.prompt is None:
            reduction = method.decide(seen, Site.projector())
        else:
            synchronise(features.device)
            start = time.perf_counter()
            reduction = method.decide(seen, Site.projector())
            synchronise(features.device)
            step = Step(
                row=row,
                video=number,
                site=Site.projector(),
                method=method.name,
                grid=video.grid,
                before=video.tokens,
                after=len(reduction),
                newlines=video.newlines,
                seconds=time.perf_counter() - start,
                reduction=reduction,
            )
            self.prompt.steps.append(step)
        return reduction, None if reduction.slot is None else reduction.apply(features)


def _copies(found: int, videos: list[EncodedVideo]) -> int:
    """How often every sample was repeated (beams, num_return_sequences)."""
    expected = sum(v.placeholders for v in videos)
    if not expected or not found or found % expected:
        raise ValueError(
            f"the prompt holds {found} video placeholders, its {len(videos)} videos need {expected} (a newline "
            "token each included); was it tokenised for other frames, truncated, or cut into prefill chunks?"
        )
    return found // expected


def _refuse_nonfinite(values: dict[str, Tensor], whose: str) -> None:
    """ValueError that names the tensor holding NaN or inf; one wait for the device if all is well."""
    finite = torch.stack([v.isfinite().all() for v in values.values()])
    if not finite.all():
        bad = [name for name, ok in zip(values, finite.tolist(), strict=True) if not ok]
        raise ValueError(
            f"{' and '.join(bad)} of {whose} holds NaN or inf; tokens cannot be compared. "
            "Look at the input frames, and at the dtype of the vision tower (fp16 overflows where bf16 does not)"
        )
