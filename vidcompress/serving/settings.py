"""From what a user writes into `--hf-overrides` to what every process of a serving engine knows: one method, checked.

A server counts a video's tokens before it encodes it, keeps one KV length for all layers, and caches what the encoder
gave without the prompt. So only methods are served that act before the LLM, keep an exact count and do not read text.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import vidcompress
from vidcompress import patches
from vidcompress.config import load, read_yaml
from vidcompress.engine.decoder_signals import DECODER_SIGNALS
from vidcompress.method import Method, Pipeline, did_you_mean, list_methods
from vidcompress.tokens import Grid, Site

KEY = "vidcompress"
"""Where the user's words stand in a model's config."""

RESOLVED = "vidcompress_serving"
"""Where the checked settings stand in a model's config, for all processes of the engine."""

SIGNALS = frozenset({"frame_features", "saliency.head"})
"""What a served tower gives: both follow from its last hidden states, or from the queries and keys of one layer."""

MODEL_TYPES = ("llava_onevision", "qwen2_vl", "qwen2_5_vl")
"""Models that can be served compressed, by `config.model_type`."""


@dataclass(frozen=True)
class Serving:
    """What is served.

    Attributes:
        method: acts before the LLM; its `positions` are what the server does.
        head: source of the SigLIP pooling head, or None where the method or the tower needs none.
        version: of the vidcompress that read the settings.
    """

    method: Method
    head: str | None
    version: str

    def count(self, grid: Grid) -> int:
        """Tokens kept of a (t, h, w) video, known before it is encoded."""
        return self.method.budget(grid)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, from which `of` makes the same again in another process."""
        method = {"name": self.method.name, "settings": self.method.settings()}
        return {"method": method, "head": self.head, "version": self.version}

    @property
    def fingerprint(self) -> str:
        """Hex digest of all that decides which tokens are kept; part of the hash of every video that is cached."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()[:32]

    def __str__(self) -> str:
        said = ", ".join(f"{key}={value!r}" for key, value in self.method.settings().items())
        head = f", saliency head {self.head}" if self.head else ""
        return f"{self.method.name}({said}){head}"

    @classmethod
    def of(cls, config: Any) -> Serving | None:
        """What a model's config was resolved to; None for a model that is served as it is.

        Raises RuntimeError if another version of vidcompress resolved it, as on another host of the engine.
        """
        resolved = getattr(config, RESOLVED, None)
        if resolved is None:
            return None
        if resolved["version"] != vidcompress.__version__:
            raise RuntimeError(
                f"this host has vidcompress {vidcompress.__version__}, and the engine was started by one with "
                f"{resolved['version']}; they might keep different tokens. Install the same version everywhere"
            )
        return _made(json.dumps(resolved))


@functools.lru_cache(maxsize=4)
def _made(resolved: str) -> Serving:
    """What JSON of `Serving.to_dict` says; asked for with every request."""
    said = json.loads(resolved)
    method = list_methods()[said["method"]["name"]](**said["method"]["settings"])
    return Serving(method, said["head"], said["version"])


def resolve(compression: Any, config: Any) -> Serving:
    """The settings as they can be served with a model.

    Args:
        compression: a method's name, a named preset's, a mapping, a YAML path, or a list of one of these.
        config: of the model, as transformers reads it.

    Raises:
        ValueError: bad settings, a model or a method that cannot be served; the message says why.
        TypeError, FileNotFoundError: as `vidcompress.config.load`.
    """
    kind = getattr(config, "model_type", None)
    if kind not in MODEL_TYPES:
        raise ValueError(
            f"vidcompress cannot compress {kind!r} in a server{did_you_mean(str(kind), MODEL_TYPES)}; "
            f"it can: {', '.join(MODEL_TYPES)}. Remove {KEY!r} from --hf-overrides to serve the model as it is"
        )
    text = config.get_text_config()
    if "sliding_attention" in (getattr(text, "layer_types", None) or []):
        raise ValueError(
            "this text decoder has sliding-window layers; a window counts stored tokens, and compression changes "
            "their number (set use_sliding_window=False in the text config)"
        )
    pipeline = Pipeline.of(load(compression)).on(kind)
    _refuse(pipeline, text.num_hidden_layers)
    (method,) = pipeline
    method = _with_positions(method, _said_positions(compression), patches.find(config).rotary_axes)
    return Serving(method, _head(method, config), vidcompress.__version__)


def _refuse(pipeline: Pipeline, depth: int) -> None:
    """ValueError for what a server cannot do, by the method's name."""
    for method in pipeline:
        text = sorted(method.needs & DECODER_SIGNALS)
        inner = [str(site) for site in method.sites(depth) if site != Site.projector()]
        why = None
        if text:
            why = f"needs {', '.join(text)}: what the encoder gives is cached and shared without the prompt"
        elif inner:
            why = f"acts at {', '.join(inner)}: a server keeps one KV length for all layers"
        elif not method.exact:
            why = "keeps a number of tokens that depends on the video: a server counts them before it encodes"
        elif missing := sorted(method.needs - SIGNALS):
            why = f"needs {', '.join(missing)}, which a served tower does not give ({', '.join(sorted(SIGNALS))})"
        if why is not None:
            raise ValueError(f"{method.name} cannot be served: it {why}. Served are: {', '.join(servable(depth))}")


@functools.cache
def servable(depth: int) -> tuple[str, ...]:
    """Names of the methods that can be served with a decoder of so many layers, by their default settings."""
    names = []
    for name, cls in list_methods().items():
        method = cls()
        try:
            outer = method.sites(depth) == [Site.projector()]
        except ValueError:
            outer = False
        if outer and method.exact and method.needs <= SIGNALS:
            names.append(name)
    return tuple(names)


def _said_positions(compression: Any) -> str | None:
    """The `positions` that the user asked for, as opposed to a default."""
    if isinstance(compression, (list, tuple)) and compression:
        return _said_positions(compression[0])
    if isinstance(compression, str) and compression.endswith((".yaml", ".yml")):
        from pathlib import Path

        return _said_positions(read_yaml(Path(compression)))
    return compression.get("positions") if isinstance(compression, Mapping) else None


def _with_positions(method: Method, said: str | None, axes: int) -> Method:
    """The method with the positions that its model gets: a server numbers the tokens of 1-D rotary models itself."""
    if axes > 1:
        return method
    if said == "keep":
        raise ValueError(
            "positions='keep' cannot be served with this model: the server numbers its tokens consecutively. "
            "Leave it out, or say 'renumber'"
        )
    return replace(method, positions="renumber")


def _head(method: Method, config: Any) -> str | None:
    """Source of the SigLIP pooling head, for methods and towers that need one; ValueError if none is known."""
    patch = patches.find(config)
    wanted = getattr(method, "siglip_head", None)
    if not patch.has_siglip:
        if wanted not in ("auto", "none", None):
            raise ValueError(
                f"siglip_head={wanted!r}: the vision tower of {config.model_type} is no SigLIP; its own queries and "
                "keys give the saliency, so leave siglip_head at 'auto'"
            )
        return None
    if not method.needs & SIGNALS:
        return None
    # a patch asks models, of which only the config is known here
    model: Any = SimpleNamespace(config=config, base_model=SimpleNamespace(config=config))
    source = patch.default_head(model) if wanted in ("auto", None) else wanted
    if source in (None, "none"):
        reason = "siglip_head is 'none'" if wanted == "none" else "no published SigLIP head fits this vision tower"
        raise ValueError(
            f"{method.name} cannot be served: it takes its saliency from SigLIP's pooling head, and {reason}. Set "
            "siglip_head to a folder, file or hub id of the SigLIP checkpoint, readable on every host"
        )
    if not isinstance(config.vision_feature_layer, int) or config.vision_feature_select_strategy != "full":
        raise ValueError(
            f"{method.name} cannot be served: the pooling head takes one layer's features of all patches, and this "
            f"model uses vision_feature_layer={config.vision_feature_layer}, "
            f"vision_feature_select_strategy={config.vision_feature_select_strategy!r}"
        )
    return source
