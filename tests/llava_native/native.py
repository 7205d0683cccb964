"""Tiny random models of the `llava` package, and prompts for them: no download.

The package insists on 729 patches a frame and fixes the config of its SigLIP, so the tower here is small in width and
depth only. A frame takes 13 x 13 or 14 x 14 tokens.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from llava.model.language_model.llava_qwen import LlavaQwenConfig, LlavaQwenForCausalLM
from llava.model.multimodal_encoder import siglip_encoder
from torch import Tensor, nn

import vidcompress
from vidcompress.method import Pipeline

VOCABULARY = 200
PAD, EOS, IMAGE, VIDEO = 0, 1, 190, 191  # the last two serve transformers' own model of the same weights only
HERE = -200
"""What the package wants in the ids where an image or a video goes."""

DEPTH = 6
SIZE = 384
FRAMES = 4  # of a video, unless a test says otherwise
POOLS = ("average", "bilinear", "max")
NEWLINES = ("grid", "frame", "one_token", "no_token")
TOWER = "google/siglip-tiny"  # an existing folder would be taken for a CLIP

Text = Sequence["int | str"]
"""A prompt: word ids, "V" where a video goes and "I" where an image goes."""

ONE: Text = [5, 6, "V", 7, 8, 9]
TWO: Text = [5, "V", 17, 18, "V", 9, 10, 11]
LATE: Text = [30, 31, 32, 33, 34, 35, 36, "V", 37, 38]
WORDS: Text = [12, 13, 14]

COMPRESSIONS: dict[str, list[dict[str, Any]]] = {
    "infomerge": [{"method": "infomerge", "retention_ratio": 0.3, "dyseg_c": 2}],
    "fastvid": [{"method": "fastvid", "retention_ratio": 0.3, "dyseg_c": 2}],
    "fastvid official": [{"method": "fastvid", "retention_ratio": 0.3, "dyseg_c": 2, "official": True}],
    "uniform_tokens": [{"method": "uniform_tokens", "retention_ratio": 0.05}],
    "unified_pool": [{"method": "unified_pool", "retention_ratio": 0.2}],
    "dytok": [{"method": "dytok", "retention_ratio": 0.2}],
    "fastv": [{"method": "fastv", "retention_ratio": 0.3}],
    "pyramiddrop": [{"method": "pyramiddrop"}],
    "text_aware_merge": [{"method": "text_aware_merge", "retention_ratio": 0.3}],
    "hieravid": [{"method": "hieravid", "retention_ratio": 0.3}],
    "unified": [{"method": "unified", "retention_ratio": 0.3}],
    "infomerge and text_aware_merge": [
        {"method": "infomerge", "retention_ratio": 0.3, "dyseg_c": 2},
        {"method": "text_aware_merge"},
    ],
}
"""Before the LLM, inside it, and at both places; few segments, because the videos are short."""

TOLERANCE: dict[str, float] = {"atol": 2e-4, "rtol": 1e-3}
"""For logits in fp32 that were summed in another order; the tiny models' logits are of size 1 to 10."""


class TinySiglip(siglip_encoder.SigLipVisionConfig):
    """Of a tower of 4 layers, the last of which the package drops."""

    def __init__(self, **fields: Any) -> None:
        small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4}
        super().__init__(**small | fields)


@contextmanager
def tower(config: type = TinySiglip) -> Iterator[None]:
    """Models that are built meanwhile get a tower of this config, not a downloaded one."""

    def build(cls: Any, *args: Any, **kwargs: Any) -> Any:
        return cls(config())

    with (
        mock.patch.object(siglip_encoder, "SigLipVisionConfig", config),
        mock.patch.object(siglip_encoder.SigLipVisionModel, "from_pretrained", classmethod(build)),
    ):
        yield


def config(pool: str = "average", newline: str = "grid", **fields: Any) -> LlavaQwenConfig:
    """A model's config, with the fields that published checkpoints have."""
    tiny: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": DEPTH,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 8192,
        "bos_token_id": 2,
        "eos_token_id": EOS,
        "pad_token_id": PAD,
        "mm_vision_tower": TOWER,
        "mm_vision_select_layer": -2,
        "mm_hidden_size": 32,
        "mm_projector_type": "mlp2x_gelu",
        "mm_resampler_type": None,
        "mm_patch_merge_type": "spatial_unpad",
        "mm_spatial_pool_mode": pool,
        "mm_spatial_pool_stride": 2,
        "mm_newline_position": newline,
        "mm_use_im_patch_token": False,
        "image_aspect_ratio": "anyres_max_9",
        "image_grid_pinpoints": [[SIZE, SIZE], [SIZE, 2 * SIZE]],
        "image_token_index": IMAGE,
        "use_mm_proj": True,
        "add_faster_video": False,
        "tokenizer_padding_side": "right",
        "tokenizer_model_max_length": 8192,
        "tie_word_embeddings": False,
    }
    return LlavaQwenConfig(**tiny | fields)


def build(pool: str = "average", newline: str = "grid", attn: str = "sdpa", **fields: Any) -> LlavaQwenForCausalLM:
    """A new model with random weights, the same for the same arguments, in eval mode."""
    settings = config(pool, newline, **fields)
    settings._attn_implementation = attn
    with tower():
        model = LlavaQwenForCausalLM(settings).eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = PAD
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            scale = 1.0 if "embed_tokens" in name else 0.15
        elif "bias" in name or "newline" in name:
            scale = 0.1
        else:
            continue
        parameter.data = torch.randn(parameter.shape, generator=generator) * scale
    return model


@functools.cache
def plain(pool: str = "average", newline: str = "grid", attn: str = "sdpa") -> LlavaQwenForCausalLM:
    """`build`, once for all tests: a model that is compressed inside `with` blocks only."""
    return build(pool, newline, attn)


def compression(name: str, **settings: Any) -> Pipeline:
    """One of `COMPRESSIONS` as models of the package have it, further settings for each of its methods."""
    return Pipeline([vidcompress.load(each | settings) for each in COMPRESSIONS[name]]).on("llava_qwen")


@contextmanager
def without_head() -> Iterator[None]:
    """Silences the warning that no SigLIP head fits the tiny towers."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*takes its saliency from SigLIP's pooling head", UserWarning)
        yield


def compress(model: nn.Module, method: Any, **settings: Any) -> vidcompress.Handle:
    """`vidcompress.apply` without that warning."""
    with without_head():
        return vidcompress.apply(model, method, **settings)


# -- prompts -----------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Prompt:
    """What the package takes.

    Attributes:
        ids: [B, L], `HERE` where an image or a video goes.
        mask: [B, L], or None.
        images: a video [F, 3, S, S], an image [3, S, S] or its tiles [T, 3, S, S] each, in the order of the rows.
        kinds: "video" or "image" for each.
    """

    ids: Tensor
    mask: Tensor | None = None
    images: list[Tensor] = field(default_factory=list)
    kinds: list[str] = field(default_factory=list)

    @property
    def pixels(self) -> dict[str, Any]:
        """The arguments beside the ids and their mask."""
        if not self.images:
            return {}
        sizes = [[image.shape[-1], image.shape[-2]] for image in self.images]
        return {"images": self.images, "modalities": self.kinds, "image_sizes": sizes}

    @property
    def given(self) -> dict[str, Any]:
        """All arguments but the ids, which forward() and generate() call differently."""
        return self.pixels | ({} if self.mask is None else {"attention_mask": self.mask})

    def row(self, b: int) -> Prompt:
        """Row b alone, without padding. A row without any still has its dummy in a batch, and none alone."""
        marks = (self.ids == HERE).sum(1)
        first = int(marks[:b].clamp(min=1).sum()) if len(self.ids) > 1 else 0
        items = slice(first, first + int(marks[b]))
        ids = self.ids[b] if self.mask is None else self.ids[b, self.mask[b].bool()]
        return Prompt(ids[None], None, self.images[items], self.kinds[items])


def prompt(texts: Sequence[Text], side: str = "right", frames: int = FRAMES, tiles: int = 1, seed: int = 0) -> Prompt:
    """A batch of prompts padded on one side. A video shows two scenes with some noise, as in the other tests.

    A row without image and video gets a dummy, as the package wants it, if another row has one. An image of two tiles
    is an overview and one tile of the same size.
    """
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, 3, SIZE, SIZE, generator=generator)

    images, kinds = [], []
    for text in texts:
        marks = [x for x in text if isinstance(x, str)]
        if not marks and any(isinstance(x, str) for other in texts for x in other):
            images.append(torch.zeros(3, SIZE, SIZE))
            kinds.append("image")
        for mark in marks:
            scene = torch.arange(frames) * 2 // frames
            image = random() if tiles == 1 else random(tiles)
            images.append(random(2)[scene] + 0.2 * random(frames) if mark == "V" else image)
            kinds.append("video" if mark == "V" else "image")
    rows = [[HERE if isinstance(x, str) else x for x in text] for text in texts]
    longest = max(map(len, rows))
    padded, masks = [], []
    for row in rows:
        padding = [PAD] * (longest - len(row))
        real = [1] * len(row)
        padded.append(padding + row if side == "left" else row + padding)
        masks.append([0] * len(padding) + real if side == "left" else real + [0] * len(padding))
    return Prompt(torch.tensor(padded), torch.tensor(masks) if len(rows) > 1 else None, images, kinds)


@torch.no_grad()
def logits(model: Any, given: Prompt) -> Tensor:
    """[B, L, V] of a forward over the prompt."""
    return model(given.ids, **given.given).logits


def generate(model: Any, given: Prompt, steps: int = 3, **kwargs: Any) -> Any:
    """`model.generate`, greedy unless told otherwise: `.sequences`, `.logits` and `.past_key_values`."""
    defaults = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    return model.generate(given.ids, **given.given, **defaults | kwargs, max_new_tokens=steps)


def stored(cache: Any) -> list[int]:
    """Keys that every layer's cache holds."""
    return [keys.shape[-2] for keys in cache.key_cache]


def anatomy(model: nn.Module) -> dict[str, Any]:
    """Attributes and hooks of every module, and attributes of the classes."""
    kinds = [key for key in vars(nn.Module()) if "hooks" in key]
    modules: Mapping[str, Any] = {
        name: (sorted(vars(module)), {kind: list(getattr(module, kind).values()) for kind in kinds})
        for name, module in model.named_modules()
    }
    return modules | {str(cls): dict(vars(cls)) for cls in type(model).__mro__}
