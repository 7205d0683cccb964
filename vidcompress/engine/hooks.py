"""`Engine`: shortens video tokens at the entrance of the text decoder of one stock model instance.

No forward is rewritten. The model places all features itself; then, in this order,

    get_video_features    its grid and signals are noted                                      (`encode`)
    base model, before    does this forward hold a video?                                     (`_base_before`)
    decoder, before       every video is reduced; embeddings, mask and positions follow       (`_decoder_before`)
    rotary embedding      gets the survivors' true positions                                  (`_rotary_before`)
    decoder, after        hidden states go back to the caller's length, the cache is noted    (`_decoder_after`)

The decoder itself is handed contiguous positions, because gappy ones look like packed sequences to the mask builder and
to FlashAttention. On later steps the caller's mask is mapped to what the cache stores.
"""

from __future__ import annotations

import inspect
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from vidcompress.engine import sequence
from vidcompress.engine.cache import CacheState, commit, state_of
from vidcompress.engine.context import ThreadState
from vidcompress.engine.overrides import Generate, GetVideoFeatures, NoAutoCompile, Override, PlainMasks, refuse_mask
from vidcompress.engine.saliency import TowerSignals, synchronise
from vidcompress.engine.siglip_head import SiglipHead
from vidcompress.method import Pipeline
from vidcompress.tokens import Reduction, Site, VideoTokens
from vidcompress.trace import Prompt, Step, Trace

if TYPE_CHECKING:
    from vidcompress.patches.base import EncodedVideo, Patch


@dataclass
class Encoding:
    """The videos of one call of `get_video_features`, what is to become of them, and the seconds their signals took."""

    videos: list[EncodedVideo]
    pipeline: Pipeline
    head: str | None
    seconds: float


@dataclass
class Pending:
    """A forward of the base model that holds video: [B, L] bool where, and the videos once they are encoded."""

    where: Tensor
    encoding: Encoding | None


@dataclass
class Running:
    """A forward of the decoder between its hooks.

    Attributes:
        state: what to note on the cache afterwards, if anything was removed.
        cache: the cache, or None.
        index, real: [B, n] the caller's column of every token, and whether it is one; None if nothing was removed.
        length: the caller's length.
        rotary: position ids for the rotary embedding, or None if the decoder has the true ones.
        placed: whether the rotary embedding got them.
    """

    state: CacheState | None
    cache: Any
    length: int
    index: Tensor | None = None
    real: Tensor | None = None
    rotary: Tensor | None = None
    placed: bool = False


@dataclass
class Plan:
    """What becomes of every row: the columns that stay, and new embeddings for some of them.

    Attributes:
        pipeline: the methods that were asked.
        prompt: the trace's record, filled on the way.
        started: when the work on this prompt began, in seconds of `time.perf_counter`.
    """

    pipeline: Pipeline
    prompt: Prompt
    started: float
    columns: list[Tensor] = field(default_factory=list)
    merged: list[tuple[int, Tensor, Tensor]] = field(default_factory=list)  # row, columns [K], embeddings [K, C]
    removed: int = 0

    def carry_out(self, tokens: sequence.Sequence) -> tuple[sequence.Sequence, Tensor]:
        """The shortened sequence, merged embeddings in place, and the column each of its tokens came from."""
        embeds = tokens.embeds
        if self.merged:
            row = torch.cat([torch.full_like(columns, r) for r, columns, _ in self.merged])
            column = torch.cat([columns for _, columns, _ in self.merged])
            embeds = embeds.index_put((row, column), torch.cat([new for _, _, new in self.merged]))
        return replace(tokens, embeds=embeds).shortened(self.columns, self.pipeline.positions == "renumber")


class Engine:
    """Hooks on one model. `configure` sets or changes what it does, `remove` undoes everything.

    Args:
        model: a transformers model that `patch` serves.
        trace: where reductions are recorded.
    """

    def __init__(self, model: nn.Module, patch: Patch, trace: Trace) -> None:
        self.model, self.patch, self.trace = model, patch, trace
        self.base, self.decoder = patch.base(model), patch.decoder(model)
        self.local = ThreadState()
        self._setup: tuple[Pipeline, TowerSignals | None, str | None]
        self._base_signature = inspect.signature(type(self.base).forward)
        before, after = {"with_kwargs": True}, {"always_call": True}
        self._hooks = [
            self.base.register_forward_pre_hook(self._base_before, **before),
            self.base.register_forward_hook(self._base_after, **after),
            self.decoder.register_forward_pre_hook(self._decoder_before, **before),
            self.decoder.register_forward_hook(self._decoder_after, **after),
            self.decoder.rotary_emb.register_forward_pre_hook(self._rotary_before, **before),
        ]
        self._overrides: list[Override] = [GetVideoFeatures(self.base, self)]
        if hasattr(type(model), "generate"):
            self._overrides += [cls(model, self) for cls in (Generate, PlainMasks, NoAutoCompile)]
        for override in self._overrides:
            override.install()

    def configure(self, pipeline: Pipeline, head: SiglipHead | None, source: str | None) -> None:
        """Uses `pipeline` from the next prompt on. `source` says where the head comes from."""
        before = getattr(self, "_setup", None)
        signals = self.patch.tower_signals(self.model, pipeline.needs, head) if pipeline.needs else None
        self._setup = (pipeline, signals, source)  # in one step: other threads may be encoding
        if before is not None and before[1] is not None:
            before[1].remove()

    def remove(self) -> None:
        """Takes every hook and override off; the model is itself again. Does nothing the second time."""
        for hook in self._hooks:
            hook.remove()
        for override in self._overrides:
            override.remove()
        if hasattr(self, "_setup"):
            pipeline, signals, _ = self._setup
            self._setup = (pipeline, None, None)
            if signals is not None:
                signals.remove()
        self._hooks, self._overrides = [], []

    # -- the encoder -------------------------------------------------------------------------------------------------
    def encode(self, override: Override, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Runs `get_video_features` and notes what it encoded, on its output and for the forward it runs in."""
        given = inspect.signature(type(self.base).get_video_features).bind(self.base, *args, **kwargs).arguments
        recording: AbstractContextManager[dict[str, Any]] = nullcontext({})
        while True:
            pipeline, wanted, head = self._setup
            if wanted is None:
                break
            layer = self.patch.signal_layer(self.model, given)
            if wanted.acquire():  # else another thread is switching
                recording = wanted.recording(layer, self.trace.enabled)
                break
        with recording as signals:
            output = override.original(*args, **kwargs)
        seconds = signals.pop("seconds", 0.0)
        encoding = Encoding(self.patch.encoded(self.model, given, signals), pipeline, head, seconds)
        if not isinstance(output, tuple):
            output.vidcompress = encoding  # generate() encodes first and hands this object to the forward,
        self.local.encoding = encoding  # or a copy without the attribute (accelerate moves it to a device)
        if self.local.pending is not None:
            self.local.pending.encoding = encoding
        return output

    # -- the base model ----------------------------------------------------------------------------------------------
    def _base_before(self, base: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.local.pending = self.local.running = None
        given: dict[str, Any] = self._base_signature.bind_partial(base, *args, **kwargs).arguments if args else kwargs
        encoded = (given.get("mm_encoder_outputs") or {}).get("video")
        ids = given.get("input_ids")
        if given.get("pixel_values_videos") is None and encoded is None:
            self._refuse_placeholders(ids, given.get("past_key_values"))
            return
        refuse_mask(given.get("attention_mask"))
        encoding = getattr(encoded, "vidcompress", self.local.encoding if self.local.generating else None)
        if encoded is not None and encoding is None:
            raise ValueError(
                "the video features in mm_encoder_outputs were not encoded by this model since compression was applied "
                "(or were cut into prefill chunks); pass pixel_values_videos, and prefill_chunk_size=None"
            )
        token = self.patch.video_token(self.model)
        if ids is not None:
            where = ids == token
        else:
            embeds = given["inputs_embeds"]
            placeholder = base.get_input_embeddings()(torch.tensor(token, device=embeds.device))
            where = (embeds == placeholder.to(embeds.device)).all(-1)
        self.local.pending = Pending(where, None if encoded is None else encoding)

    def _refuse_placeholders(self, ids: Tensor | None, cache: Any) -> None:
        """A prompt with video placeholders and no video cannot be reduced: an error, not silence."""
        # A decoded token, or the guesses that generate() verifies, may be placeholders by chance.
        later = cache is not None and int(cache.get_seq_length())
        if ids is None or self.local.drafting or (later and (self.local.generating or ids.shape[1] == 1)):
            return
        self.refuse_placeholders(ids)

    def refuse_placeholders(self, ids: Tensor) -> None:
        """ValueError if new prompt tokens hold video placeholders although no video came with them."""
        count = int((ids == self.patch.video_token(self.model)).sum())
        if count:
            raise ValueError(f"the prompt holds {count} video placeholders but no video: pass pixel_values_videos")

    def _base_after(self, base: nn.Module, args: Any, output: Any) -> None:
        pending, self.local.pending, self.local.running = self.local.pending, None, None
        if not self.local.generating:
            self.local.encoding = None
        if pending is not None and output is not None:
            raise RuntimeError(
                f"a prompt with a video went through {type(base).__name__} and nothing was reduced: its text decoder "
                "was not called through its hooks (was its class or forward replaced after compression was applied?)"
            )

    # -- the text decoder --------------------------------------------------------------------------------------------
    def _decoder_before(
        self, decoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        pending, self.local.pending, self.local.running = self.local.pending, None, None
        cache = kwargs.get("past_key_values")
        state = state_of(cache)
        if pending is None and state is None:
            return None
        refuse_mask(kwargs.get("attention_mask"))
        past = 0 if cache is None else int(cache.get_seq_length())
        tokens = sequence.read(kwargs, past, state, self.patch.rotary_axes)
        length = tokens.length
        plan = None if pending is None else self._plan(tokens, pending)
        if state is None and (plan is None or not plan.removed):
            self._record(plan, length)
            return None
        use_cache = kwargs.get("use_cache")
        if cache is None and (decoder.config.use_cache if use_cache is None else use_cache):
            cache = kwargs["past_key_values"] = DynamicCache(config=decoder.config)
        index = rotary = None
        if plan is not None and plan.removed:
            tokens, index = plan.carry_out(tokens)
            rotary = tokens.positions[0] if self.patch.rotary_axes == 1 else tokens.positions
        self._hand_over(kwargs, tokens, contiguous=rotary is not None)
        if state is not None:
            state.served = True
        state = None
        if index is not None:
            tail = sequence.untouched(index, tokens.mask, length)
            stored = tokens.full_mask.shape[1] - tail
            state = CacheState(past + length - tail, tokens.full_mask[:, :stored], tokens.shift)
        self.local.running = Running(state, cache, length, index, tokens.mask, rotary)
        self._record(plan, tokens.length)
        return args, kwargs

    def _hand_over(self, kwargs: dict[str, Any], tokens: sequence.Sequence, contiguous: bool) -> None:
        """Writes the sequence back into the decoder's arguments."""
        batch, n = tokens.mask.shape
        kwargs["inputs_embeds"] = tokens.embeds
        whole = kwargs.get("attention_mask") is None and batch == 1
        kwargs["attention_mask"] = None if whole else tokens.full_mask
        if contiguous:
            kwargs["position_ids"] = torch.arange(n, device=tokens.mask.device).expand(batch, -1)
        else:
            kwargs["position_ids"] = tokens.positions[0] if self.patch.rotary_axes == 1 else tokens.positions

    def _rotary_before(
        self, rotary: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        running = self.local.running
        if running is None or running.rotary is None:
            return None
        running.placed = True
        if "position_ids" in kwargs:
            kwargs["position_ids"] = running.rotary
            return args, kwargs
        return (args[0], running.rotary, *args[2:]), kwargs

    def _decoder_after(self, decoder: nn.Module, args: Any, output: Any) -> Any:
        running, self.local.running = self.local.running, None
        before = None if running is None else state_of(running.cache)
        if before is not None:
            before.served = False
        if running is None or output is None or running.state is None:
            return output
        if not running.placed:
            raise RuntimeError(
                f"the rotary embedding of {type(decoder).__name__} was not called through its hooks, so the survivors "
                "have wrong positions (was it replaced after compression was applied?)"
            )
        if running.cache is not None:
            commit(running.cache, running.state)

        def back(hidden: Tensor) -> Tensor:
            return sequence.scatter(hidden, running.index, running.real, running.length)

        output.last_hidden_state = back(output.last_hidden_state)
        if output.hidden_states is not None:
            output.hidden_states = tuple(back(hidden) for hidden in output.hidden_states)
        return output

    # -- the reduction -----------------------------------------------------------------------------------------------
    def _plan(self, tokens: sequence.Sequence, pending: Pending) -> Plan:
        """Asks the method about every video, row by row."""
        assert pending.encoding is not None
        videos = pending.encoding.videos
        where = pending.where.to(tokens.mask.device)
        copies = self._copies(int(where.sum()), videos)
        started = time.perf_counter() if self.trace.enabled else 0.0
        plan = Plan(pending.encoding.pipeline, _prompt(pending.encoding, tokens.length), started)
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
                    decided[following] = self._reduce(tokens.embeds[row, mine], video, row, following, plan)
                reduction, embeds = decided[following]
                stays[mine[reduction.keep]] = True
                stays[newlines] = True
                if embeds is not None:
                    plan.merged.append((row, mine[reduction.keep], embeds))
                plan.removed += video.tokens - len(reduction)
                following += 1
            plan.columns.append(stays.nonzero().squeeze(1))
        return plan

    def _record(self, plan: Plan | None, length: int) -> None:
        """Ends the record of a prompt that the decoder is about to run over with `length` tokens."""
        if plan is not None and self.trace.enabled:
            synchronise(plan.columns[0].device)
            plan.prompt.seconds = time.perf_counter() - plan.started
            plan.prompt.length_after = length
            self.trace.prompts.append(plan.prompt)

    def _copies(self, found: int, videos: list[EncodedVideo]) -> int:
        """How often every sample was repeated (beams, num_return_sequences)."""
        expected = sum(v.placeholders for v in videos)
        if not expected or not found or found % expected:
            raise ValueError(
                f"the prompt holds {found} video placeholders, its {len(videos)} videos need {expected} (a newline "
                "token each included); was it tokenised for other frames, truncated, or cut into prefill chunks?"
            )
        return found // expected

    def _reduce(
        self, features: Tensor, video: EncodedVideo, row: int, number: int, plan: Plan
    ) -> tuple[Reduction, Tensor | None]:
        """The decision for one video and, if it merges, the survivors' embeddings."""
        method = plan.pipeline.stages[Site.projector()]
        signals = {name: s.to(features.device).flatten(1) for name, s in video.signals.items()}
        signals = {name: s if name == "frame_features" else s.flatten() for name, s in signals.items()}
        if "frame_features" in method.needs and "frame_features" not in signals:
            # Without a pooling head: the mean of the frame's tokens, FastVID's rule for towers that have none.
            signals["frame_features"] = features.detach().unflatten(0, (video.grid[0], -1)).float().mean(1)
        _refuse_nonfinite({"projector output": features, **signals}, f"video {number} (row {row})")
        start = 0.0
        if self.trace.enabled:
            synchronise(features.device)
            start = time.perf_counter()
        reduction = method.decide(VideoTokens(features.detach(), video.grid, None, signals), Site.projector())
        if self.trace.enabled:
            synchronise(features.device)
            seconds = time.perf_counter() - start
            plan.prompt.steps.append(
                Step(
                    row=row,
                    video=number,
                    site=Site.projector(),
                    method=method.name,
                    grid=video.grid,
                    before=video.tokens,
                    after=len(reduction),
                    newlines=video.newlines,
                    seconds=seconds,
                    reduction=reduction,
                )
            )
        return reduction, None if reduction.slot is None else reduction.apply(features)


def _prompt(encoding: Encoding, length: int) -> Prompt:
    """The trace's record of a prompt, as it begins."""
    compression = [{"method": m.name, **m.settings()} for m in encoding.pipeline]
    return Prompt(length_before=length, signal_seconds=encoding.seconds, compression=compression, head=encoding.head)


def _refuse_nonfinite(values: dict[str, Tensor], whose: str) -> None:
    """ValueError that names the tensor holding NaN or inf; one wait for the device if all is well."""
    finite = torch.stack([v.isfinite().all() for v in values.values()])
    if not finite.all():
        bad = [name for name, ok in zip(values, finite.tolist(), strict=True) if not ok]
        raise ValueError(
            f"{' and '.join(bad)} of {whose} holds NaN or inf; tokens cannot be compared. "
            "Look at the input frames, and at the dtype of the vision tower (fp16 overflows where bf16 does not)"
        )
