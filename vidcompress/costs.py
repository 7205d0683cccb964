"""What a prompt costs the text decoder, from a model's dimensions alone: FLOPs by three papers' formulas, KV memory.

The three papers count differently (the same 6272 tokens in the same 7B decoder are 48.8, 41.4 or 40.8 T), so that a
number stands only beside numbers of its own formula. None counts newline tokens, embeddings, norms, rotary embedding,
softmax, vision tower, projector or language-modelling head, nor what the compression itself takes.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vidcompress.method import Method, Pipeline
    from vidcompress.tokens import Grid

DECODED = 100
"""Tokens that the Unified paper has written after the prompt ("R = 100")."""


@dataclass(frozen=True, kw_only=True)
class Dimensions:
    """A text decoder, and how many tokens a video frame becomes.

    Attributes:
        layers, hidden, intermediate: decoder layers L, width d, width m of the MLP.
        heads, kv_heads, head_dim: of the attention; keys and values have `kv_heads * head_dim` channels each.
        frame: (rows, columns) of a frame's video tokens, newlines not counted; None where they depend on the video.
        frames: that the papers sample from a video; None where they do not say.
        hub: id of the checkpoint.
    """

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    frame: tuple[int, int] | None = None
    frames: int | None = None
    hub: str | None = None

    @classmethod
    def of(cls, config: Any) -> Dimensions:
        """Of a transformers config, multimodal or of a text decoder alone.

        Raises ValueError if it lacks what describes a decoder with MLP and attention.
        """
        from vidcompress.patches import backbones

        backbone = backbones().get(getattr(config, "model_type", ""))
        text = config.get_text_config()
        names = ("vocab_size", "num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads")
        missing = [name for name in names if not isinstance(getattr(text, name, None), int)]
        if missing:
            kind = getattr(config, "model_type", type(config).__name__)
            raise ValueError(f"the config of {kind!r} has no {', '.join(missing)}; a text decoder's config is needed")
        layers, hidden, intermediate, heads = (getattr(text, name) for name in names[1:])
        return cls(
            layers=layers,
            hidden=hidden,
            intermediate=intermediate,
            heads=heads,
            kv_heads=getattr(text, "num_key_value_heads", None) or heads,
            head_dim=getattr(text, "head_dim", None) or hidden // heads,
            frame=None if backbone is None else backbone().frame_grid(config),
        )

    def grid(self, frames: int | None = None) -> Grid:
        """(t, h, w) of a video of so many frames, by default as many as the papers sample.

        Raises ValueError for less than one frame, and where nothing says how many tokens a frame is.
        """
        frames = self.frames if frames is None else frames
        if frames is not None and frames < 1:
            raise ValueError(f"a video has at least 1 frame, got {frames}")
        if self.frame is None:
            raise ValueError("this model's tokens a frame depend on the video: give its grid (--grid 32x14x14)")
        if frames is None:
            raise ValueError("give the number of frames (--frames): no paper says how many this model is to sample")
        return (frames, *self.frame)


_QWEN2_0_5B = Dimensions(layers=24, hidden=896, intermediate=4864, heads=14, kv_heads=2, head_dim=64)
_QWEN2_7B = Dimensions(layers=28, hidden=3584, intermediate=18944, heads=28, kv_heads=4, head_dim=128)
_QWEN2_72B = Dimensions(layers=80, hidden=8192, intermediate=29568, heads=64, kv_heads=8, head_dim=128)
_QWEN2_1_5B = Dimensions(layers=28, hidden=1536, intermediate=8960, heads=12, kv_heads=2, head_dim=128)
_QWEN2_5_3B = Dimensions(layers=36, hidden=2048, intermediate=11008, heads=16, kv_heads=2, head_dim=128)
_QWEN3_4B = Dimensions(layers=36, hidden=2560, intermediate=9728, heads=32, kv_heads=8, head_dim=128)
_QWEN3_8B = Dimensions(layers=36, hidden=4096, intermediate=12288, heads=32, kv_heads=8, head_dim=128)
# a token passes 8 experts of width 768
_QWEN3_30B_A3B = Dimensions(layers=48, hidden=2048, intermediate=8 * 768, heads=32, kv_heads=4, head_dim=128)
_LLAMA_7B = Dimensions(layers=32, hidden=4096, intermediate=11008, heads=32, kv_heads=32, head_dim=128)


def _onevision(text: Dimensions, size: str) -> Dimensions:
    """27 x 27 patches, pooled bilinearly to 14 x 14."""
    return replace(text, frame=(14, 14), frames=32, hub=f"llava-hf/llava-onevision-qwen2-{size}-ov-hf")


def _video(text: Dimensions, size: str) -> Dimensions:
    """27 x 27 patches, averaged to 13 x 13."""
    return replace(text, frame=(13, 13), frames=64, hub=f"lmms-lab/LLaVA-Video-{size}-Qwen2")


MODELS: dict[str, Dimensions] = {
    "llava-onevision-0.5b": _onevision(_QWEN2_0_5B, "0.5b"),
    "llava-onevision-7b": _onevision(_QWEN2_7B, "7b"),
    "llava-onevision-72b": _onevision(_QWEN2_72B, "72b"),
    "llava-video-7b": _video(_QWEN2_7B, "7B"),
    "llava-video-72b": _video(_QWEN2_72B, "72B"),
    "llava-next-video-7b": replace(_LLAMA_7B, frame=(12, 12), hub="llava-hf/LLaVA-NeXT-Video-7B-hf"),
    "qwen2-vl-2b": replace(_QWEN2_1_5B, hub="Qwen/Qwen2-VL-2B-Instruct"),
    "qwen2-vl-7b": replace(_QWEN2_7B, hub="Qwen/Qwen2-VL-7B-Instruct"),
    "qwen2.5-vl-3b": replace(_QWEN2_5_3B, hub="Qwen/Qwen2.5-VL-3B-Instruct"),
    "qwen2.5-vl-7b": replace(_QWEN2_7B, hub="Qwen/Qwen2.5-VL-7B-Instruct"),
    "qwen3-vl-4b": replace(_QWEN3_4B, hub="Qwen/Qwen3-VL-4B-Instruct"),
    "qwen3-vl-8b": replace(_QWEN3_8B, hub="Qwen/Qwen3-VL-8B-Instruct"),
    "qwen3-vl-30b-a3b": replace(_QWEN3_30B_A3B, hub="Qwen/Qwen3-VL-30B-A3B-Instruct"),
}
"""The papers' models and others that are served, as their published configs describe them.

No paper's formula knows queries wider than the hidden states, as the 4B and the 30B model of Qwen3 have.
"""


def dimensions(model: str | os.PathLike) -> Dimensions:
    """Of a model by its name in `MODELS`, its hub id or its folder. Weights are never read.

    Raises ValueError for a name that is none of these, with the nearest one that is; OSError where a config cannot be
    read.
    """
    from vidcompress.method import did_you_mean

    name = os.fspath(model)
    for known, found in MODELS.items():
        if name in (known, found.hub):
            return found
    if not os.path.isdir(name) and "/" not in name:
        raise ValueError(
            f"unknown model {name!r}{did_you_mean(name, MODELS)}; give a folder, a hub id (owner/name) or one of: "
            f"{', '.join(MODELS)}"
        )
    from transformers import AutoConfig

    from vidcompress.models import register_configs

    register_configs()
    return Dimensions.of(AutoConfig.from_pretrained(name))


# -- FLOPs -------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Formula:
    """How one paper counts the operations of one decoder layer.

    Attributes:
        paper: where it stands.
        counts: what it counts, in a few words.
        layer: (dimensions, tokens n, decoded tokens R) -> operations.
        decodes: whether R matters.
    """

    paper: str
    counts: str
    layer: Callable[[Dimensions, int, int], int]
    decodes: bool = False


def _infomerge(of: Dimensions, n: int, decoded: int) -> int:
    """n (2d^2 + 2 d d_kv) + 2 n^2 d + 3 n d m, with d_kv the width of all keys of a token."""
    d, m, d_kv = of.hidden, of.intermediate, of.kv_heads * of.head_dim
    return n * (2 * d * d + 2 * d * d_kv) + 2 * n * n * d + 3 * n * d * m


def _hieravid(of: Dimensions, n: int, decoded: int) -> int:
    """4 n d^2 + 2 n^2 d + 2 n d m."""
    d, m = of.hidden, of.intermediate
    return 4 * n * d * d + 2 * n * n * d + 2 * n * d * m


def _unified(of: Dimensions, n: int, decoded: int) -> int:
    """The same prefill, and 4 d^2 + 2 d m + 2 d (n + i) for the i-th of R decoded tokens, summed up."""
    d, m = of.hidden, of.intermediate
    return _hieravid(of, n, decoded) + decoded * (4 * d * d + 2 * d * m + 2 * d * n) + d * decoded * (decoded + 1)


FORMULAS: dict[str, Formula] = {
    "infomerge": Formula(
        "InfoMerge, appendix A.2",
        "multiply-accumulates of the prefill, with grouped-query attention and the three matrices of SwiGLU",
        _infomerge,
    ),
    "unified": Formula(
        "Unified Spatiotemporal Token Compression, eq. S3",
        "multiply-accumulates of prefill and decoding, with keys as wide as queries and two matrices in the MLP",
        _unified,
        decodes=True,
    ),
    "hieravid": Formula(
        "HieraVid, eq. 12",
        "multiply-accumulates of the prefill, with keys as wide as queries and two matrices in the MLP",
        _hieravid,
    ),
}
"""The papers' formulas by name. What they call FLOPs are multiply-accumulates; their tables leave text tokens out."""


def flops(formula: str, of: Dimensions, lengths: Sequence[int], decode_tokens: int = DECODED) -> list[int]:
    """Operations of every decoder layer.

    Args:
        formula: a name in `FORMULAS`.
        of: the decoder.
        lengths: tokens of the prompt that every layer runs over.
        decode_tokens: written after the prompt; only the formula "unified" counts them.

    Raises ValueError for an unknown formula, lengths of another depth and negative counts.
    """
    from vidcompress.method import did_you_mean

    if formula not in FORMULAS:
        raise ValueError(f"unknown formula {formula!r}{did_you_mean(formula, FORMULAS)}; one of: {', '.join(FORMULAS)}")
    if decode_tokens < 0:
        raise ValueError(f"decode_tokens must be at least 0, got {decode_tokens}")
    return [FORMULAS[formula].layer(of, n, decode_tokens) for n in _checked(of, lengths)]


# -- KV memory ---------------------------------------------------------------------------------------------------------
def kv_cache_bytes(of: Dimensions, lengths: Sequence[int], dtype_bytes: int = 2) -> list[int]:
    """Bytes of keys and values that every decoder layer stores of one prompt.

    Args:
        of: the decoder.
        lengths: tokens that every layer stores.
        dtype_bytes: of one number; 2 for bfloat16.

    Raises ValueError for lengths of another depth and negative counts.
    """
    if dtype_bytes < 1:
        raise ValueError(f"dtype_bytes must be at least 1, got {dtype_bytes}")
    return [2 * of.kv_heads * of.head_dim * dtype_bytes * n for n in _checked(of, lengths)]


def measured_kv_bytes(cache: Any) -> list[int]:
    """Bytes of the keys and values that a transformers cache holds, by layer, all rows of the batch together.

    A StaticCache counts with all it allocated, an empty layer with nothing. Raises TypeError for a cache whose layers
    store something else than one tensor of keys and one of values (quantised, linear attention).
    """
    if not hasattr(cache, "layers"):
        raise TypeError(f"a transformers cache with `layers` is needed, got {type(cache).__name__}")
    total = []
    for number, layer in enumerate(cache.layers):
        if not hasattr(layer, "keys") or hasattr(layer, "_quantized_keys") or hasattr(layer, "conv_states"):
            raise TypeError(f"layer {number} of this cache is a {type(layer).__name__}, not plain keys and values")
        stored = [tensor for tensor in (layer.keys, layer.values) if tensor is not None]
        total.append(sum(tensor.element_size() * tensor.numel() for tensor in stored))
    return total


def _checked(of: Dimensions, lengths: Sequence[int]) -> Sequence[int]:
    if len(lengths) != of.layers:
        raise ValueError(f"one count a decoder layer is needed: {of.layers}, got {len(lengths)}")
    if min(lengths) < 0:
        raise ValueError(f"token counts must be at least 0, got {min(lengths)}")
    return lengths


# -- both, of one video with and without compression -------------------------------------------------------------------
@dataclass(frozen=True)
class Estimate:
    """What one video costs, with one compression or with none.

    Attributes:
        compression: its name; "none" without.
        exact: whether the counts are what will be kept, or only the most that can be.
        grid: (t, h, w) of the video.
        sites: tokens kept at every site, in order, by the site's name; empty without compression.
        video_tokens: that every decoder layer runs over.
        kv_bytes: of keys and values by layer, in bfloat16, text included; with a method that acts between decoding
            steps, once it has.
        flops: operations by layer, by the formula's name, text included, and those of a first look.
        looked_layers: that a first look runs over the whole prompt before it is reduced.
        assistant_flops: operations of a look that another model takes, in its decoder, by the formula's name.
    """

    compression: str
    exact: bool
    grid: Grid
    sites: dict[str, int]
    video_tokens: list[int]
    kv_bytes: list[int]
    flops: dict[str, list[int]]
    looked_layers: int = 0
    assistant_flops: dict[str, int] = field(default_factory=dict)

    @property
    def mean_tokens(self) -> float:
        """Video tokens, averaged over the layers."""
        return sum(self.video_tokens) / len(self.video_tokens)

    def to_dict(self, per_layer: bool = False) -> dict[str, Any]:
        """JSON-serialisable: totals, and `per_layer` their parts too."""
        facts = {"compression": self.compression, "exact": self.exact, "grid": list(self.grid), "sites": self.sites}
        facts |= {"video_tokens_mean": self.mean_tokens, "kv_bytes": sum(self.kv_bytes)}
        facts |= {"looked_layers": self.looked_layers}
        facts |= {"flops": {name: sum(layers) for name, layers in self.flops.items()}}
        facts |= {"assistant_flops": self.assistant_flops}
        if per_layer:
            layers = {"video_tokens": self.video_tokens, "kv_bytes": self.kv_bytes, "flops": self.flops}
            facts["per_layer"] = layers
        return facts


def estimate(
    of: Dimensions,
    grid: Grid,
    compression: Method | Pipeline | None = None,
    *,
    formulas: Sequence[str] = tuple(FORMULAS),
    text_tokens: int = 0,
    decode_tokens: int = DECODED,
) -> Estimate:
    """The cost of a (t, h, w) video and `text_tokens` around it.

    Raises ValueError for an unknown formula, a grid with an empty side, negative counts, and a method that acts at a
    layer which this decoder does not have.
    """
    if min(grid) < 1:
        raise ValueError(f"grid {grid} has an empty side; frames, rows and columns must be at least 1")
    if text_tokens < 0:
        raise ValueError(f"text_tokens must be at least 0, got {text_tokens}")
    total, looked = math.prod(grid), 0
    lengths, sites, exact, name = [total] * of.layers, {}, True, "none"
    left, looker = lengths, None
    if compression is not None:
        from vidcompress.method import Pipeline

        pipeline = Pipeline.of(compression)
        lengths, left = pipeline.lengths(grid, of.layers), pipeline.stored(grid, of.layers)
        sites = {str(site): count for site, count in pipeline.counts(grid, of.layers).items()}
        exact, name = all(method.exact for method in pipeline), pipeline.name
        if lengths[0] < total:
            looked = max(pipeline.looks(of.layers), default=0)
            looker = next((method for method in pipeline if getattr(method, "assistant", None)), None)
    whole, prompt, stored = ([n + text_tokens for n in tokens] for tokens in ([total] * of.layers, lengths, left))
    by_formula = {}
    for formula in formulas:
        look, prefill, idle = (flops(formula, of, tokens, 0) for tokens in (whole, prompt, stored))
        decoding = flops(formula, of, stored, decode_tokens)
        by_formula[formula] = [look[i] * (i < looked) + prefill[i] + decoding[i] - idle[i] for i in range(of.layers)]
    helped = {} if looker is None else _look_of_assistant(looker, formulas, total + text_tokens)
    return Estimate(name, exact, grid, sites, lengths, kv_cache_bytes(of, stored), by_formula, looked, helped)


def _look_of_assistant(method: Any, formulas: Sequence[str], prompt: int) -> dict[str, int]:
    """Operations by formula of an assistant's decoder over `prompt` tokens, up to the last layer it looks at."""
    of = dimensions(method.assistant)
    last = max(method.layers_of(of.layers))
    return {formula: sum(flops(formula, of, [prompt] * of.layers, 0)[:last]) for formula in formulas}
