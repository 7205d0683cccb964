"""Tiny random LLaVA-OneVision models, inputs and methods for the tests: no download, some milliseconds each.

Ids below `IMAGE` are words. A video of F frames takes `video_length(F)` placeholders in a prompt, the last of them for
the newline that LLaVA-OneVision appends.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    PreTrainedConfig,
    Qwen2Config,
    SiglipVisionConfig,
)

import vidcompress
from vidcompress import Handle, Method, Reduction, Site, VideoTokens
from vidcompress.method import Pipeline

VOCABULARY = 200
PAD, EOS = 0, 1
IMAGE, VIDEO = 190, 191
SPECIAL = [IMAGE, VIDEO]
"""Pass it as `suppress_tokens`: a random model would otherwise write placeholders itself."""

PATCH_SIZE = 14
IMAGE_SIZE = 56  # 4 x 4 patches, 2 x 2 tokens a frame
HIDDEN = 64

Text = Sequence[int | str]
"""A prompt: word ids, "V" where a video goes and "I" where an image goes."""

FRAMES = 6  # of a video, unless a test says otherwise
ONE: Text = [5, 6, "V", 7, 8, 9]
TWO: Text = [5, "V", 17, 18, "V", 9, 10, 11]
LATE: Text = [30, 31, 32, 33, 34, "V", 35]


def llava(
    attn: str = "sdpa",
    layers: int = 6,
    *,
    image_size: int = IMAGE_SIZE,
    vision_feature_layer: int | list[int] = -1,
    seed: int = 0,
    text_class: type[PreTrainedConfig] = Qwen2Config,
    **text: Any,
) -> LlavaOnevisionForConditionalGeneration:
    """A model with random weights, the same for the same arguments, in eval mode.

    Args:
        attn: attention implementation of tower and decoder.
        layers: of the text decoder; the tower has 3.
        image_size: a multiple of `PATCH_SIZE`.
        text_class: config class of the text decoder.
        text: settings that override those of the text config.
    """
    text_config: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "intermediate_size": 96,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "bos_token_id": 2,
        "eos_token_id": EOS,
        "pad_token_id": PAD,
    }
    vision_config = SiglipVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=image_size,
        patch_size=PATCH_SIZE,
        vision_use_head=False,
    )
    config = LlavaOnevisionConfig(
        text_config=text_class(**text_config | text).to_dict(),
        vision_config=vision_config.to_dict(),
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_feature_layer=vision_feature_layer,
        vision_feature_select_strategy="full",
        image_grid_pinpoints=[[image_size, image_size], [image_size, 2 * image_size]],
        tie_word_embeddings=False,
    )
    model = LlavaOnevisionForConditionalGeneration(config)
    model.set_attn_implementation(attn)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = PAD
    return randomise(model, seed).eval()


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Weights large enough that every token matters to the output; norms keep their ones."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            scale = 1.0 if "embed_tokens" in name else 0.15
        elif "bias" in name or "newline" in name:
            scale = 0.1
        else:
            continue
        parameter.data = torch.randn(parameter.shape, generator=generator) * scale
    return model


def video_grid(frames: int, image_size: int = IMAGE_SIZE) -> tuple[int, int, int]:
    """(frames, rows, columns) of a video's tokens: pooled to half the patches a side, rounded up."""
    side = -(-(image_size // PATCH_SIZE) // 2)
    return frames, side, side


def video_length(frames: int, image_size: int = IMAGE_SIZE) -> int:
    """Placeholders of a video: its tokens and one newline."""
    t, h, w = video_grid(frames, image_size)
    return t * h * w + 1


def image_length(image_size: int = IMAGE_SIZE) -> int:
    """Placeholders of a square image: the overview, and one tile with a newline after every row."""
    side = image_size // PATCH_SIZE
    return side * side + side * (side + 1)


def llava_inputs(
    texts: Sequence[Text], frames: int = FRAMES, seed: int = 0, *, image_size: int = IMAGE_SIZE
) -> dict[str, Tensor]:
    """Arguments for `model(**inputs)` and `model.generate(**inputs)`: rows padded on the left, random pixels.

    A video shows two scenes with some noise, so that methods find segments and change within them. Every "V" gets the
    next of the `pixel_values_videos` [videos, frames, 3, S, S], every "I" the next of the `pixel_values`
    [images, 2, 3, S, S]; either is left out if no row asks for it.
    """
    places = {"V": [VIDEO] * video_length(frames, image_size), "I": [IMAGE] * image_length(image_size)}
    rows = [[i for x in text for i in (places[x] if isinstance(x, str) else [x])] for text in texts]
    videos, images = (sum(list(text).count(mark) for text in texts) for mark in "VI")
    inputs = left_padded(rows)
    generator = torch.Generator().manual_seed(seed)
    if videos:
        size = (3, image_size, image_size)
        scenes = torch.randn(videos, 2, *size, generator=generator)
        noise = torch.randn(videos, frames, *size, generator=generator)
        inputs["pixel_values_videos"] = scenes[:, torch.arange(frames) * 2 // frames] + 0.2 * noise
    if images:
        inputs["pixel_values"] = torch.randn(images, 2, 3, image_size, image_size, generator=generator)
        inputs["image_sizes"] = torch.full((images, 2), image_size)
    return inputs


def without_mask(inputs: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in inputs.items() if key != "attention_mask"}


def left_padded(rows: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    """`input_ids` and `attention_mask` [B, L] of rows of different lengths."""
    longest = max(map(len, rows))
    return {
        "input_ids": torch.tensor([[PAD] * (longest - len(row)) + list(row) for row in rows]),
        "attention_mask": torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows]),
    }


def anatomy(model: nn.Module) -> dict[str, Any]:
    """Attributes and hooks of every module: what has to be the same after something was undone.

    Transformers puts hooks of its own on a model when it first runs, so compare models that ran.
    """
    kinds = [key for key in vars(nn.Module()) if "hooks" in key]
    return {
        name: (
            sorted(vars(module)),
            {kind: [_name(hook) for hook in getattr(module, kind).values()] for kind in kinds},
        )
        for name, module in model.named_modules()
    }


def _name(hook: Any) -> Any:
    """What a hook is, whichever object it is bound to."""
    if isinstance(hook, functools.partial):
        return _name(hook.func), hook.args, sorted(hook.keywords)
    return getattr(hook, "__qualname__", hook)


def generate(model: Any, inputs: Mapping[str, Any], steps: int = 8, **kwargs: Any) -> Any:
    """`model.generate`, greedy unless told otherwise, never choosing a placeholder; with `.sequences` and `.logits`."""
    defaults = {"do_sample": False, "suppress_tokens": SPECIAL, "return_dict_in_generate": True, "output_logits": True}
    return model.generate(**inputs, **defaults | kwargs, max_new_tokens=steps)


def new_tokens(output: Any, inputs: Mapping[str, Any]) -> Tensor:
    """[B, steps] of what `generate` returned."""
    return output.sequences[:, inputs["input_ids"].shape[1] :]


def step_logits(output: Any) -> Tensor:
    """[B, steps, V] of what `generate` returned."""
    return torch.stack(output.logits, 1)


@contextmanager
def without_head() -> Iterator[None]:
    """Silences the warning that no SigLIP head fits the tiny towers."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*takes its saliency from SigLIP's pooling head", UserWarning)
        yield


def compress(model: nn.Module, method: Method | Pipeline | str, **settings: Any) -> Handle:
    """`vidcompress.apply` without that warning."""
    with without_head():
        return vidcompress.apply(model, method, **settings)


@dataclass(kw_only=True)
class Prune(Method):
    """Keeps the tokens of the largest norm: which ones depends on the video, how many does not."""

    def reduce(self, tokens: VideoTokens, site: Site) -> Reduction:
        order = tokens.features.float().norm(dim=-1).argsort(descending=True, stable=True)
        return Reduction(order[: self.budget(tokens.grid)].sort().values, len(tokens))


@dataclass(kw_only=True)
class Mix(Method):
    """Merges across frames with unequal weights; every third survivor hands its own token on."""

    def reduce(self, tokens: VideoTokens, site: Site) -> Reduction:
        n, k = len(tokens), self.budget(tokens.grid)
        frame = n // tokens.grid[0]
        keep = torch.arange(k) * n // k
        slot = torch.arange(k)[torch.arange(k) % 3 != 0]
        own = keep[slot]
        parts = [(own, (own + frames * frame) % n, weight) for frames, weight in ((0, 0.5), (1, 0.3), (2, 0.2))]
        return Reduction.merging(keep, n, [(own, source, torch.full(own.shape, w)) for own, source, w in parts])


@dataclass(kw_only=True)
class AtMost(Method):
    """Keeps tokens of positive sum, as many as the budget allows: how many depends on the video."""

    @property
    def exact(self) -> bool:
        return False

    def reduce(self, tokens: VideoTokens, site: Site) -> Reduction:
        return Reduction((tokens.features.sum(-1) > 0).nonzero().squeeze(1)[: self.budget(tokens.grid)], len(tokens))


@dataclass(kw_only=True)
class Inner(Method):
    """Base of toys that act at the input of decoder layers, each time keeping the same fraction of what is left."""

    retention_ratio: float = 0.6
    layers: tuple[int, ...] = (2,)

    def sites(self, depth: int = 28) -> list[Site]:
        return [Site.decoder(layer, stage) for stage, layer in enumerate(self.layers)]

    def top(self, tokens: VideoTokens, site: Site, score: Tensor) -> Reduction:
        """Keeps the tokens of the highest score [M]."""
        order = score.float().argsort(descending=True, stable=True)
        count = self.count(site, tokens.grid, tokens.entered, len(tokens))
        return Reduction(order[:count].sort().values, len(tokens), notes={"kept": [*self.kept(tokens), count]})

    def kept(self, tokens: VideoTokens) -> list[int]:
        """What it kept at its sites before: the notes of one are handed to the next."""
        return tokens.notes.get("kept", [])


@dataclass(kw_only=True)
class InnerPrune(Inner):
    """Keeps the tokens of the largest norm, and checks what it is told of its earlier sites."""

    def reduce(self, tokens: VideoTokens, site: Site) -> Reduction:
        kept = self.kept(tokens)
        assert len(kept) == site.stage and kept[-1:] in ([], [len(tokens)])
        return self.top(tokens, site, tokens.features.norm(dim=-1))


@dataclass(kw_only=True)
class InnerMix(Inner):
    """Merges every token that goes into its neighbour that stays, with unequal weights."""

    def reduce(self, tokens: VideoTokens, site: Site) -> Reduction:
        n, k = len(tokens), self.count(site, tokens.grid, tokens.entered, len(tokens))
        keep = torch.arange(k) * n // k
        own = keep[torch.arange(k) % 3 != 0]
        parts = [(own, own, torch.full(own.shape, 0.7)), (own, (own + 1) % n, torch.full(own.shape, 0.4))]
        return Reduction.merging(keep, n, parts)


@dataclass(kw_only=True)
class Attentive(Inner):
    """Keeps the tokens that a signal of the decoder singles out, and remembers what it was shown."""

    signal: str = "text_attention"
    seen: list[VideoTokens] = field(default_factory=list)

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        return frozenset({self.signal})

    def reduce(self, tokens: VideoTokens, site: Site) -> Reduction:
        self.seen.append(tokens)
        value = tokens.signal(self.signal)
        if self.signal == "text_attention.heads":
            value = value.sum(0).amax(0)
        elif self.signal == "text_hidden":
            value = (tokens.features @ value.T).amax(1)
        elif self.signal == "last_text_hidden":
            value = tokens.features @ value
        return self.top(tokens, site, value)


METHODS: dict[str, Callable[..., Method]] = {
    "prune": functools.partial(Prune, retention_ratio=0.34),
    "merge": functools.partial(Mix, retention_ratio=0.34),
    # Few segments, and enough tokens a frame for both kinds of survivors: salient ones and anchors.
    "infomerge": functools.partial(vidcompress.load, "infomerge", retention_ratio=0.5, dyseg_c=2),
    "fastvid": functools.partial(vidcompress.load, "fastvid", retention_ratio=0.5, dyseg_c=2, context_share=0.5),
}
"""From toys to the real thing: factories that take further settings."""


PIPELINES: dict[str, list[Callable[..., Method]]] = {
    "one": [functools.partial(InnerMix, layers=(2,))],
    "two": [functools.partial(InnerPrune, layers=(1, 4))],
    "three": [
        functools.partial(Attentive, layers=(1,)),
        functools.partial(InnerMix, layers=(3,)),
        functools.partial(Attentive, layers=(4,), signal="last_query_attention.previous"),
    ],
    "outer and one": [METHODS["merge"], functools.partial(Attentive, layers=(0,), signal="last_query_attention")],
    "outer and two": [METHODS["prune"], functools.partial(InnerMix, layers=(2, 5))],
    "outer and three": [
        functools.partial(Mix, retention_ratio=0.7),
        functools.partial(Attentive, layers=(1,), signal="text_attention.heads"),
        functools.partial(InnerPrune, layers=(2, 4)),
    ],
}
"""Methods at the input of one, two and three of 6 decoder layers, with and without one before them."""

REAL: dict[str, list[Callable[..., Method]]] = {
    "fastv": [functools.partial(vidcompress.load, "fastv")],
    "pyramiddrop": [functools.partial(vidcompress.load, "pyramiddrop")],
    "text_aware_merge": [functools.partial(vidcompress.load, "text_aware_merge")],
    "unified": [functools.partial(vidcompress.load, "unified", retention_ratio=0.5)],
    "hieravid": [functools.partial(vidcompress.load, "hieravid", retention_ratio=0.4)],
    "infomerge and text_aware_merge": [METHODS["infomerge"], functools.partial(vidcompress.load, "text_aware_merge")],
}

POLICIES = ["keep", "renumber", "keep first", "renumber first"]


def pipeline(name: str, positions: str = "keep") -> Pipeline:
    """One of `PIPELINES` or `REAL`; "... first" alternates between the two policies from method to method."""
    first, mixed = positions.removesuffix(" first"), positions.endswith("first")
    other = {"keep": "renumber", "renumber": "keep"}[first]
    factories = (PIPELINES | REAL)[name]
    return Pipeline([f(positions=other if mixed and i % 2 else first) for i, f in enumerate(factories)])


def pair(method: Method | Pipeline, **model: Any) -> tuple[Any, Any, Handle]:
    """A plain model, an equal one that is compressed, and its handle."""
    plain, compressed = llava(**model), llava(**model)
    return plain, compressed, compress(compressed, method)
