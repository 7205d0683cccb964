"""`Engine`: shortens video tokens at the entrance of the text decoder of one stock model instance.

No forward is rewritten. The model places all features itself; then, in this order,

    get_video_features    its grid and signals are noted                                      (`encode`)
    base model, before    does this forward hold a video?                                     (`_base_before`)
    decoder, before       every video is reduced (`Plan`); embeddings, mask and positions follow (`_decoder_before`)
    rotary embedding      gets the survivors' true positions                                  (`_rotary_before`)
    decoder, after        hidden states go back to the caller's length, the cache is noted    (`_decoder_after`)

The decoder itself is handed contiguous positions, because gappy ones look like packed sequences to the mask builder and
to FlashAttention. On later steps the caller's mask is mapped to what the cache stores.
"""

from __future__ import annotations

import inspect
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from vidcompress.engine import sequence
from vidcompress.engine.cache import CacheState, commit, state_of
from vidcompress.engine.context import ThreadState
from vidcompress.engine.overrides import Generate, GetVideoFeatures, NoAutoCompile, Override, PlainMasks, refuse_mask
from vidcompress.engine.plan import Encoding, Plan
from vidcompress.engine.saliency import TowerSignals
from vidcompress.engine.siglip_head import SiglipHead
from vidcompress.method import Pipeline
from vidcompress.trace import Trace

if TYPE_CHECKING:
    from vidcompress.patches.base import Patch


@dataclass
class Pending:
    """A forward of the base model that holds video: [B, L] bool where, and the videos once they are encoded."""

    where: Tensor
    encoding: Encoding | None


@dataclass
class Running:
    """A forward of the decoder between its hooks.

    Attributes:
        cache: the cache, or None.
        length: the caller's length.
        state: what to note on the cache afterwards; this and the following are None if nothing was removed.
        index, real: [B, n] the caller's column of every token, and whether it is one.
        rotary: the survivors' position ids, for the rotary embedding.
        placed: whether the rotary embedding got them.
    """

    cache: Any
    length: int
    state: CacheState | None = None
    index: Tensor | None = None
    real: Tensor | None = None
    rotary: Tensor | None = None
    placed: bool = False


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
        plan = None
        if pending is not None:
            assert pending.encoding is not None
            plan = Plan.make(tokens, pending.where, pending.encoding, self.trace.enabled)
        if state is None and (plan is None or not plan.changed):
            if plan is not None:
                plan.record(self.trace, length)
            return None
        use_cache = kwargs.get("use_cache")
        if cache is None and (decoder.config.use_cache if use_cache is None else use_cache):
            cache = kwargs["past_key_values"] = DynamicCache(config=decoder.config)
        running = Running(cache, length)
        if plan is not None and plan.changed:
            tokens, running.index = plan.carry_out(tokens)
            running.real, running.rotary = tokens.mask, tokens.position_ids
            tail = sequence.untouched(running.index, tokens.mask, length)
            stored = tokens.full_mask.shape[1] - tail
            running.state = CacheState(past + length - tail, tokens.full_mask[:, :stored], tokens.shift)
        self._hand_over(kwargs, tokens, contiguous=running.rotary is not None)
        if plan is not None:
            plan.record(self.trace, tokens.length)
        if state is not None:
            state.served = True
        self.local.running = running
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
            kwargs["position_ids"] = tokens.position_ids

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
