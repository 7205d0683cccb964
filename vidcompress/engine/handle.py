"""`Handle`: one application of a compression to one model, and its undoing."""

from __future__ import annotations

import warnings
from typing import Any

from torch import nn

from vidcompress import patches
from vidcompress.config import Compression, load
from vidcompress.engine.assistant import Assistant
from vidcompress.engine.decoder_signals import DECODER_SIGNALS
from vidcompress.engine.hooks import Engine
from vidcompress.engine.siglip_head import SiglipHead, load_siglip_head
from vidcompress.method import Method, Pipeline
from vidcompress.trace import Trace

ATTRIBUTE = "_vidcompress"
"""Where a compressed model keeps its handle."""

HEAD_SIGNALS = frozenset({"frame_features", "saliency.head"})


class Handle:
    """What `vidcompress.apply` returns: `.trace`, `.switch(...)`, `.remove()`; also a context manager.

    Raises:
        ValueError: the model has no patch, is compressed already, or cannot serve this method; nothing is changed.
        TypeError: `model` is no torch module.
    """

    def __init__(self, model: Any, compression: Method | Pipeline, trace: bool = True) -> None:
        if not isinstance(model, nn.Module) or not hasattr(model, "config"):
            raise TypeError(f"expected a transformers model, got {type(model).__name__}")
        present = handle_of(model)
        if present is not None:
            raise ValueError(
                f"this model already compresses with {present.compression.name!r}; "
                "use handle.switch(...) to change the method, or handle.remove() first"
            )
        self.model: Any = model
        self.trace = Trace(trace)
        self._patch = patches.find(model.config)
        self._patch.check(model)
        self._heads: dict[str, SiglipHead] = {}
        self._named: str | None = None
        self._assistants: dict[str, Assistant] = {}
        self.compression: Pipeline = Pipeline.of(compression).on(getattr(model.config, "model_type", ""))
        self._check(self.compression)
        parts = (*self._head(self.compression), self._assistant(self.compression))
        self._engine = Engine(model, self._patch, self.trace)
        try:
            self._engine.configure(self.compression, *parts)
        except BaseException:
            self._engine.remove()
            raise
        for part in self._parts():
            part.__dict__[ATTRIBUTE] = self

    def switch(self, compression: Compression, **settings: Any) -> Handle:
        """Uses another method from the next prompt on. If it is refused, the present one stays in force.

        A SigLIP head that was named before stays, unless the new method names another.
        """
        if not self.active:
            raise ValueError("this handle was removed; apply the compression anew")
        pipeline = Pipeline.of(load(compression, **settings)).on(self.model.config.model_type)
        self._check(pipeline)
        self._engine.configure(pipeline, *self._head(pipeline), self._assistant(pipeline))
        self.compression = pipeline
        return self

    @property
    def active(self) -> bool:
        """False once removed."""
        return self.model.__dict__.get(ATTRIBUTE) is self

    def remove(self) -> None:
        """Makes the model bit-exactly its own again. Does nothing the second time."""
        if self.active:
            self._engine.remove()
            self._assistants.clear()
            for part in self._parts():
                del part.__dict__[ATTRIBUTE]

    def _parts(self) -> set[Any]:
        """Where the handle is kept: the model, and the base model on which everything hooks."""
        return {self.model, self._patch.base(self.model)}

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *exc: object) -> None:
        self.remove()

    def __repr__(self) -> str:
        state = "" if self.active else ", removed"
        return f"Handle({self.compression.name} on {type(self.model).__name__}{state}, {self.trace!r})"

    # -- what is refused before anything is changed ------------------------------------------------------------------
    def _check(self, pipeline: Pipeline) -> None:
        missing = pipeline.needs - self._patch.provides - DECODER_SIGNALS
        if missing:
            raise ValueError(
                f"{pipeline.name} needs {sorted(missing)}, which {self.model.config.model_type} does not provide "
                f"(it provides {sorted(self._patch.provides | DECODER_SIGNALS)})"
            )
        decoder = self._patch.decoder(self.model)
        if "sliding_attention" in (getattr(decoder.config, "layer_types", None) or []):
            raise ValueError(
                "this text decoder has sliding-window layers; a window counts stored tokens, and compression changes "
                "their number. Only full attention is supported (set use_sliding_window=False in the text config)"
            )
        attentive = {name for name in pipeline.needs & DECODER_SIGNALS if "hidden" not in name}
        if attentive and (getattr(self.model, "_tp_size", None) or 1) > 1:
            raise ValueError(
                f"{pipeline.name} needs {sorted(attentive)}, of which a rank of a tensor-parallel model sees its own "
                "heads only, so that ranks would keep different tokens; use a method that reduces before the decoder"
            )
        pipeline.looks(len(decoder.layers))
        deepstack = self._patch.deepstack_layers(self.model)
        for site, method in pipeline.stages(len(decoder.layers)).items():
            if 0 <= site.layer < deepstack:
                raise ValueError(
                    f"{method.name} acts at {site}; the first {deepstack} layers of this model add features to the "
                    f"video tokens (deepstack), so reduction inside the LLM can begin at layer {deepstack}"
                )

    def _assistant(self, pipeline: Pipeline) -> Assistant | None:
        """Who takes first looks for this pipeline, if it is not the model itself."""
        for method in pipeline:
            name = getattr(method, "assistant", None)
            if name:
                if name not in self._assistants:
                    self._assistants[name] = Assistant(name, self.model)
                return self._assistants[name].looking_at(getattr(method, "layers", None))
        return None

    def _head(self, pipeline: Pipeline) -> tuple[SiglipHead | None, str | None]:
        """The SigLIP pooling head the pipeline asks for and its source, or None with one warning if there is none."""
        sources = {getattr(m, "siglip_head", "auto") for m in pipeline if m.needs & HEAD_SIGNALS}
        if not sources:
            return None, None
        if not self._patch.has_siglip:
            wanted = sources - {"auto", "none", None}
            if wanted:
                raise ValueError(
                    f"siglip_head={wanted.pop()!r}: the vision tower of {self.model.config.model_type} is no SigLIP; "
                    "its own queries and keys give the saliency, so leave siglip_head at 'auto'"
                )
            return None, None
        if len(sources) > 1:
            raise ValueError(f"the methods of a pipeline must agree on siglip_head, got {sorted(map(str, sources))}")
        source: str | None = sources.pop()
        reason = "none was asked for (siglip_head)"
        if source == "auto" and self._named is None:
            source = self._patch.default_head(self.model)
            reason = "no published SigLIP head fits this vision tower"
            try:
                if source is not None:
                    return self._load(source), source
            except OSError as error:
                reason = f"{source} could not be read ({error})"
        elif source not in (None, "none"):
            named = self._named if source == "auto" else source
            assert named is not None
            head, self._named = self._load(named), named
            return head, named
        warnings.warn(
            f"{pipeline.name} takes its saliency from SigLIP's pooling head, and {reason}: it falls back to the "
            "attention that tokens receive in the tower's last layer, and to mean tokens as frame features. Results "
            "differ from the paper's; set siglip_head to a folder, file or hub id of the SigLIP checkpoint",
            stacklevel=4,
        )
        return None, None

    def _load(self, source: str) -> SiglipHead:
        if source not in self._heads:
            self._heads[source] = load_siglip_head(source, self._patch.vision_config(self.model))
        return self._heads[source]


def handle_of(model: Any) -> Handle | None:
    """The handle of a compressed model, e.g. of one loaded with `compression=...`; None for a plain model."""
    for part in (model, getattr(model, "base_model", None)):
        handle = getattr(part, "__dict__", {}).get(ATTRIBUTE)
        if handle is not None:
            return handle
    return None
