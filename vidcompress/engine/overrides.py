"""Stand-ins for methods of one model instance. They are objects of module-level classes, not closures, so that a
patched model can be deep-copied and pickled; removing them uncovers the class's own method again.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from torch import nn

from vidcompress.engine.cache import state_of

if TYPE_CHECKING:
    from vidcompress.engine.hooks import Engine


ASSISTED = ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp")
"""By which generate() is told to decode guesses."""


class Override:
    """Callable put on `owner` under `method`; subclasses say what a call does."""

    method: str

    def __init__(self, owner: nn.Module, engine: Engine) -> None:
        self.owner, self.engine = owner, engine
        self.covered = owner.__dict__.get(self.method)  # somebody else's stand-in
        self.__name__ = self.method
        self.__doc__ = getattr(getattr(type(owner), self.method, None), "__doc__", None)

    def original(self, *args: Any, **kwargs: Any) -> Any:
        """What was there before: the class's own method, as a rule."""
        if self.covered is not None:
            return self.covered(*args, **kwargs)
        return getattr(type(self.owner), self.method)(self.owner, *args, **kwargs)

    @property
    def __signature__(self) -> inspect.Signature:
        # generate() inspects get_video_features to choose which arguments to hand over
        return inspect.signature(self.covered or getattr(type(self.owner), self.method).__get__(self.owner))

    def install(self) -> None:
        """Puts this in front of the method."""
        self.owner.__dict__[self.method] = self

    def remove(self) -> None:
        """Uncovers what was there before."""
        if self.owner.__dict__.get(self.method) is self:
            del self.owner.__dict__[self.method]
            if self.covered is not None:
                self.owner.__dict__[self.method] = self.covered

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError


class GetVideoFeatures(Override):
    """Notes grid and signals of every video that is encoded."""

    method = "get_video_features"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.engine.encode(self, args, kwargs)


class Generate(Override):
    """Refuses what compression cannot serve, before any work is done."""

    method = "generate"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        config = kwargs.get("generation_config", args[1] if len(args) > 1 else None)
        if kwargs.get("pixel_values_videos") is not None:
            refuse_mask(kwargs.get("attention_mask"))
            in_force = self.owner.generation_config if config is None else config
            chunk = kwargs.get("prefill_chunk_size", getattr(in_force, "prefill_chunk_size", None))
            if chunk is not None:
                raise ValueError(
                    f"prefill_chunk_size={chunk} with a video: a chunk may hold part of a video, and a video is "
                    "reduced as a whole; use prefill_chunk_size=None (the compressed prompt is short)"
                )
        self._refuse_without_single_steps(args, kwargs, config)
        local = self.engine.local
        outer = local.generating, local.encoding, local.drafting, local.prompt_length
        local.generating, local.encoding = True, None
        # without a cache every step encodes anew: what was decoded meanwhile is no part of the question
        local.prompt_length = _prompt_length(args, kwargs)
        # transformers gives a draft model in assisted decoding the prompt without its video
        local.drafting = bool(getattr(config, "is_assistant", False))
        try:
            if not local.drafting:
                self._refuse_placeholders(args, kwargs)
            return self.original(*args, **kwargs)
        finally:
            local.generating, local.encoding, local.drafting, local.prompt_length = outer

    def _refuse_without_single_steps(self, args: tuple[Any, ...], kwargs: dict[str, Any], config: Any) -> None:
        """ValueError if cached tokens are to be evicted by what is decoded, and decoding gives no occasion for it."""
        state = state_of(kwargs.get("past_key_values"))
        brought = kwargs.get("pixel_values_videos") is not None or kwargs.get("mm_encoder_outputs")
        evicts = brought and self.engine.pipeline.evicts
        if not evicts and not (state is not None and state.videos):
            return
        in_force = self.owner.generation_config if config is None else config
        given = {name: kwargs.get(name, getattr(in_force, name, None)) for name in (*ASSISTED, "use_cache")}
        assisted = [name for name in ASSISTED if given[name]]
        if assisted:
            raise ValueError(
                f"{assisted[0]} with a method that evicts cached tokens between decoding steps: it decodes several "
                "guesses at a time and takes some back, which an eviction could not be; decode without it"
            )
        if given["use_cache"] is False:
            raise ValueError(
                "use_cache=False with a method that evicts cached tokens between decoding steps: there is no cache"
            )

    def _refuse_placeholders(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A later turn must bring the video of its placeholders along; those before the cache's end are old ones."""
        ids = _prompt_ids(args, kwargs)
        brought = kwargs.get("pixel_values_videos") is not None or kwargs.get("mm_encoder_outputs")
        if ids is None or brought:
            return
        cache = kwargs.get("past_key_values")
        past = 0 if cache is None else int(cache.get_seq_length())
        self.engine.refuse_placeholders(ids[:, past:] if ids.shape[1] > past else ids)


def _prompt_ids(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The prompt's ids as generate() was given them, or None."""
    return kwargs.get("input_ids", kwargs.get("inputs", args[0] if args else None))


def _prompt_length(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | None:
    """Tokens of the prompt; None if generate() was given neither ids nor embeddings."""
    prompt = _prompt_ids(args, kwargs)
    prompt = kwargs.get("inputs_embeds") if prompt is None else prompt
    return None if prompt is None else prompt.shape[1]


class PlainMasks(Override):
    """Static caches make generate() build 4-D masks for the caller's length; the engine needs the 2-D one."""

    method = "create_masks_for_generate"

    def __call__(self, *args: Any, attention_mask: Any = None, **kwargs: Any) -> Any:
        return attention_mask

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.__call__)


class NoAutoCompile(Override):
    """The hooks keep Python state, so static-cache decoding must not be compiled behind the caller's back."""

    method = "_valid_auto_compile_criteria"

    def __call__(self, *args: Any, **kwargs: Any) -> bool:
        return False


def refuse_mask(mask: Any) -> None:
    """ValueError unless `mask` is None or 2-D, TypeError if it is no tensor at all."""
    if isinstance(mask, (list, tuple)):
        raise TypeError(f"attention_mask is a {type(mask).__name__}; pass a 2-D tensor [batch, length] or none")
    if isinstance(mask, dict) or (mask is not None and mask.dim() != 2):
        shape = "a dict of masks" if isinstance(mask, dict) else f"shape {tuple(mask.shape)}"
        raise ValueError(
            f"attention_mask is {shape}: a prepared mask cannot follow tokens that are removed; "
            "pass a 2-D mask [batch, length] or none"
        )
