"""`Engine`: shortens video tokens at the entrance of the text decoder of one stock model instance.

No forward is rewritten. The model places all features itself; then, in this order,

    get_video_features    its grid and signals are noted                                      (`encode`)
    base model, before    does this forward hold a video?                                     (`_base_before`)
    decoder, before       every video is reduced (`Plan`); embeddings, mask and positions follow (`_decoder_before`)
    rotary embedding      gets the survivors' true positions                                  (`_rotary_before`)
    decoder layer, before every video is reduced again where a method acts (`Running`)        (`_layer_before`)
    decoder, after        hidden states go back to the caller's length, the cache is noted; after a decoding step
                          cached tokens are evicted where a method acts there (`evict`)       (`_decoder_after`)

The decoder itself is handed contiguous positions, because gappy ones look like packed sequences to the mask builder and
to FlashAttention. On later steps the caller's mask is mapped to what the cache stores.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vidcompress.engine import sequence
from vidcompress.engine.cache import commit, served, state_of
from vidcompress.engine.context import ThreadState
from vidcompress.engine.eviction import evict, refuse_fixed_cache
from vidcompress.engine.first_look import FirstLook, lent
from vidcompress.engine.overrides import Override, refuse_mask
from vidcompress.engine.plan import Encoding, Pending, Plan
from vidcompress.engine.sequence import Sequence
from vidcompress.engine.siglip_head import SiglipHead
from vidcompress.engine.stages import Running
from vidcompress.method import Pipeline
from vidcompress.tokens import Site
from vidcompress.trace import Trace

if TYPE_CHECKING:
    from vidcompress.engine.assistant import Assistant
    from vidcompress.patches.base import Patch


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
        self._setup: tuple[Pipeline, SiglipHead | None, str | None, Assistant | None]
        self.tower = patch.tower_signals(model)
        self._base_signature = inspect.signature(type(self.base).forward)
        before, after = {"with_kwargs": True}, {"always_call": True}
        self._hooks = []
        if self.base is not self.decoder:
            self._hooks.append(self.base.register_forward_pre_hook(self._base_before, **before))
            self._hooks.append(self.base.register_forward_hook(self._base_after, **after))
        self._hooks += [
            self.decoder.register_forward_pre_hook(self._decoder_before, **before),
            self.decoder.register_forward_hook(self._decoder_after, **after),
            self.decoder.rotary_emb.register_forward_pre_hook(self._rotary_before, **before),
        ]
        self._layers = list(self.decoder.layers)
        for i, layer in enumerate(self._layers):
            self._hooks.append(layer.register_forward_pre_hook(functools.partial(self._layer_before, i), **before))
        self._overrides = patch.overrides(model, self)
        for override in self._overrides:
            override.install()

    def configure(
        self, pipeline: Pipeline, head: SiglipHead | None, source: str | None, assistant: Assistant | None = None
    ) -> None:
        """Uses `pipeline` from the next prompt on. `source` says where the head comes from."""
        if pipeline.needs & self.patch.provides:
            self.patch.signal_layer(self.model, {})
        self._setup = (pipeline, head, source, assistant)  # in one step: other threads may be encoding

    @property
    def pipeline(self) -> Pipeline:
        """What becomes of the next prompt."""
        return self._setup[0]

    def remove(self) -> None:
        """Takes every hook and override off; the model is itself again. Does nothing the second time."""
        for hook in self._hooks:
            hook.remove()
        for override in self._overrides:
            override.remove()
        self.tower.remove()
        self._hooks, self._overrides = [], []

    # -- the encoder -------------------------------------------------------------------------------------------------
    @torch.compiler.disable
    def encode(self, override: Override, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Runs `get_video_features` and notes what it encoded, on its output and for the forward it runs in."""
        given = inspect.signature(type(self.base).get_video_features).bind(self.base, *args, **kwargs).arguments
        output, encoding = self.record(given, lambda: override.original(*args, **kwargs))
        if not isinstance(output, tuple):
            output.vidcompress = encoding  # generate() encodes first and hands this object to the forward,
        self.local.encoding = encoding  # or a copy without the attribute (accelerate moves it to a device)
        if self.local.pending is not None:
            self.local.pending.encoding = encoding
        return output

    def record(self, given: Mapping[str, Any], encode: Callable[[], Any]) -> tuple[Any, Encoding]:
        """What `encode` gives, and what its videos are and the tower said of them.

        Args:
            given: arguments of the call that encodes videos, by name.
            encode: makes that call.
        """
        self.patch.check_call(self.model, given)
        pipeline, head, source, assistant = self._setup
        needs = pipeline.needs & self.patch.provides
        recording: AbstractContextManager[dict[str, Any]] = nullcontext({})
        if self.tower.wanted(needs, head):
            layer = self.patch.signal_layer(self.model, given)
            recording = self.tower.recording(layer, needs, head, self.trace.enabled)
        with recording as signals:
            output = encode()
        seconds = signals.pop("seconds", 0.0)
        videos = self.patch.encoded(self.model, given, signals)
        return output, Encoding(videos, pipeline, source, seconds, assistant, given if assistant else {})

    # -- the base model ----------------------------------------------------------------------------------------------
    @torch.compiler.disable
    def _base_before(self, base: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.local.pending = None
        self._serve(None)
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

        def where(token: int) -> Tensor:
            if ids is not None:
                return ids == token
            embeds = given["inputs_embeds"]
            placeholder = base.get_input_embeddings()(torch.tensor(token, device=embeds.device))
            return (embeds == placeholder.to(embeds.device)).all(-1)

        image = self.patch.image_token(self.model)
        cache, prompt = given.get("past_key_values"), self.local.prompt_length
        past = 0 if cache is None else int(cache.get_seq_length())
        self.local.pending = Pending(
            where(self.patch.video_token(self.model)),
            None if image is None else where(image),
            None if encoded is None else encoding,
            sys.maxsize if prompt is None else prompt - past,
            given,
        )

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

    @torch.compiler.disable
    def _base_after(self, base: nn.Module, args: Any, output: Any) -> None:
        pending, self.local.pending = self.local.pending, None
        self._serve(None)
        if not self.local.generating:
            self.local.encoding = None
        if pending is not None and output is not None:
            raise RuntimeError(
                f"a prompt with a video went through {type(base).__name__} and nothing was reduced: its text decoder "
                "was not called through its hooks (was its class or forward replaced after compression was applied?)"
            )

    # -- the text decoder --------------------------------------------------------------------------------------------
    @torch.compiler.disable
    def _decoder_before(
        self, decoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        pending, self.local.pending = self.local.pending, None
        self._serve(None)
        cache = kwargs.get("past_key_values")
        state = state_of(cache)
        if pending is None and state is None:
            return None
        refuse_mask(kwargs.get("attention_mask"))
        if kwargs.get("inputs_embeds") is None:
            kwargs["inputs_embeds"] = decoder.embed_tokens(kwargs.pop("input_ids"))
        past = 0 if cache is None else int(cache.get_seq_length())
        tokens, following = sequence.read(kwargs, past, state, self.patch.rotary_axes)
        plan = None
        if pending is not None:
            plan = Plan.make(tokens, pending.for_rows(len(tokens.mask)), len(decoder.layers), self.trace.enabled)
            self._refuse_checkpointing(decoder, plan)
            if plan.assistant is not None:
                plan.assistant.look(plan, pending, past)
        use_cache = kwargs.get("use_cache")
        if cache is None and (decoder.config.use_cache if use_cache is None else use_cache):
            cache = kwargs["past_key_values"] = self.patch.new_cache(decoder)
        batch, length = tokens.mask.shape
        whole = kwargs.get("attention_mask") is None and batch == 1
        common = (length, past, following, whole, state, self.patch.causal_mask)
        running = Running(decoder, cache, plan, *common)
        if plan is not None and plan.evictions and cache is not None:
            refuse_fixed_cache(cache, plan.evictions)
        if running.has_inner_sites or (plan is not None and plan.looks):
            self._refuse_replaced_layers(decoder)
        if plan is not None and plan.looks:
            look = FirstLook(plan, plan.looks)
            self.look(Running(decoder, lent(cache) if past else None, None, *common, look), tokens, kwargs)
        tokens = running.begin(tokens)
        if running.changed and kwargs.get("visual_pos_masks") is not None:
            running.narrow_deepstack(kwargs)
        kwargs |= running.arguments(tokens, kwargs)
        if state is not None:
            state.served = True
        self._serve(running)
        return args, kwargs

    def _serve(self, running: Running | None) -> None:
        """Hooks inside the decoder are for this forward from now on, or have nothing to do."""
        self.local.running = running
        self.local.concerns_layers = running is not None and running.concerns_layers
        self.local.concerns_rotary = running is not None and running.rotary_positions is not None

    def look(self, running: Running, tokens: Sequence, kwargs: dict[str, Any]) -> None:
        """Makes a first look: a run of the decoder over all `tokens`, which stores nothing for later."""
        assert running.look is not None
        running.begin(tokens)
        quiet = {name: value for name, value in kwargs.items() if not name.startswith(("output_", "return_"))}
        quiet |= {**running.arguments(tokens, kwargs), "past_key_values": running.cache, "use_cache": False}
        self._serve(running)
        try:
            with served(running.state):
                running.look.take(lambda: running.decoder.forward(**quiet))
        finally:
            self._serve(None)

    def _refuse_checkpointing(self, decoder: Any, plan: Plan) -> None:
        """ValueError if layers would be run again in the backward pass, without what the hooks know."""
        inner = [str(site) for site in plan.stages if site != Site.projector()]
        if inner and decoder.training and getattr(decoder, "gradient_checkpointing", False):
            raise ValueError(
                f"gradient checkpointing runs decoder layers twice, and compression acts at {', '.join(inner)}; "
                "call gradient_checkpointing_disable(), or reduce before the decoder only"
            )

    def _refuse_replaced_layers(self, decoder: Any) -> None:
        """RuntimeError if decoder layers are not those that the hooks are on."""
        layers = list(decoder.layers)
        replaced = [i for i, layer in enumerate(layers) if i >= len(self._layers) or layer is not self._layers[i]]
        if replaced or len(layers) < len(self._layers):
            raise RuntimeError(
                f"decoder layers {replaced or 'at the end'} of {type(decoder).__name__} were not called through their "
                "hooks: they were replaced after compression was applied; remove it and apply it again"
            )

    # These two are traced, so that a compiled decoder stays one graph where they have nothing to do.
    def _layer_before(
        self, i: int, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        return self._layer(i, layer, args, kwargs) if self.local.concerns_layers else None

    def _rotary_before(
        self, rotary: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        return self._place(args, kwargs) if self.local.concerns_rotary else None

    @torch.compiler.disable
    def _layer(
        self, i: int, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        return self.local.running.layer(i, layer, args, kwargs)

    @torch.compiler.disable
    def _place(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        running: Running = self.local.running
        if running.placed:
            return None
        positions, running.placed = running.rotary_positions, True
        if "position_ids" in kwargs:
            kwargs["position_ids"] = positions
            return args, kwargs
        return (args[0], positions, *args[2:]), kwargs

    @torch.compiler.disable
    def _decoder_after(self, decoder: nn.Module, args: Any, output: Any) -> Any:
        running: Running | None = self.local.running
        self._serve(None)
        before = None if running is None else state_of(running.cache)
        if before is not None:
            before.served = False
        if running is None or output is None:
            return output
        if running.rotary_positions is not None and not running.placed:
            raise RuntimeError(
                f"the rotary embedding of {type(decoder).__name__} was not called through its hooks, so the survivors "
                "have wrong positions (was it replaced after compression was applied?)"
            )
        if running.plan is not None:
            running.refuse_skipped_sites()
            running.plan.record(self.trace, running.lengths())
        elif running.due:
            evict(running, self.trace.enabled)
        may_evict = running.plan is not None and bool(running.plan.evictions)
        if running.cache is not None and (running.changed or may_evict):
            commit(running.cache, running.new_state())
        if not running.changed:
            return output
        output.last_hidden_state = running.back(output.last_hidden_state, running.stages[-1])
        if output.hidden_states is not None:
            # the first is what entered layer 0, the others what left a layer
            output.hidden_states = tuple(
                None if hidden is None else running.back(hidden, running.stage_of(max(i - 1, 0)))
                for i, hidden in enumerate(output.hidden_states)
            )
        return output
