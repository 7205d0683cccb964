"""What a compressed model has to answer, recomputed without the engine: no hook, no cache, one row without padding.

Everything is taken from a plain (uncompressed) copy of the model. The prompt is shortened here, and every decoding step
runs all layers anew under an explicit causal mask. The only thing shared with the library is `Method.decide`.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tiny import SPECIAL, video_grid
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from vidcompress import Method, Reduction, Site, VideoTokens

Inputs = Mapping[str, Tensor]

TOLERANCE: dict[str, float] = {"atol": 2e-4, "rtol": 1e-3}
"""For logits in fp32 that were summed in another order; the tiny models' logits are of size 1 to 10."""


@dataclass(frozen=True)
class Prompt:
    """A shortened prompt: embeds [1, n, C], rotary positions [1, n], and the column [n] of the caller's prompt that
    each token came from.
    """

    embeds: Tensor
    positions: Tensor
    columns: Tensor

    def __len__(self) -> int:
        return self.columns.numel()


@dataclass(frozen=True)
class Answer:
    """Greedy decoding: tokens [steps], and the logits [steps, V] they were chosen by."""

    tokens: Tensor
    logits: Tensor


def row(inputs: Inputs, b: int) -> dict[str, Tensor]:
    """Row b alone: without its padding, with its own videos and images."""
    ids = inputs["input_ids"]
    mask = inputs.get("attention_mask", torch.ones_like(ids)).bool()
    alone = {"input_ids": ids[b, mask[b]][None], "attention_mask": torch.ones(1, int(mask[b].sum()), dtype=torch.long)}
    for token, keys in zip(SPECIAL, (("pixel_values", "image_sizes"), ("pixel_values_videos",))):
        if keys[0] in inputs:
            places = (ids == token).sum(1)
            each = places.sum() // len(inputs[keys[0]])  # all videos are of one length, and so are all images
            first, count = int(places[:b].sum() // each), int(places[b] // each)
            alone |= {key: inputs[key][first : first + count] for key in keys if count}
    return alone


def shorten(
    model: Any, inputs: Inputs, method: Method, signals: Sequence[Mapping[str, Tensor]] | None = None
) -> Prompt:
    """The prompt as the decoder should see it. Differentiable in the model's weights.

    Args:
        signals: what `method.needs`, one mapping for every video; by default `tower_signals` of the model.
    """
    ids = inputs["input_ids"]
    config = model.config
    embeds = model.get_input_embeddings()(ids)
    stays = torch.ones(ids.shape[1], dtype=torch.bool)
    if "pixel_values" in inputs:
        encoded = model.model.get_image_features(inputs["pixel_values"], inputs["image_sizes"], return_dict=True)
        embeds = embeds.masked_scatter((ids == config.image_token_id)[..., None], torch.cat(encoded.pooler_output))
    if "pixel_values_videos" in inputs:
        pixels = inputs["pixel_values_videos"]
        grid = video_grid(pixels.shape[1], pixels.shape[-1])
        features = video_features(model, pixels)
        if signals is None:
            signals = tower_signals(model, pixels) if method.needs else [{}] * len(pixels)
        places = (ids[0] == config.video_token_id).nonzero().squeeze(1).view(len(pixels), -1)
        for video, place in enumerate(places):
            tokens, newline = features[video, :-1], features[video, -1:]
            wanted = {name: signals[video][name] for name in method.needs}
            reduction = method.decide(VideoTokens(tokens.detach(), grid, None, wanted), Site.projector())
            stays[place[:-1]] = False
            stays[place[reduction.keep]] = True
            embeds = embeds.index_copy(1, place[reduction.keep], (matrix(reduction) @ tokens)[None])
            embeds = embeds.index_copy(1, place[-1:], newline[None])
    columns = stays.nonzero().squeeze(1)
    positions = torch.arange(len(columns)) if method.positions == "renumber" else columns
    return Prompt(embeds[:, columns], positions[None], columns)


def video_features(model: Any, pixels: Tensor) -> Tensor:
    """[videos, tokens + 1, C], the newline last."""
    features = model.model.get_video_features(pixels, return_dict=True).pooler_output
    t, h, w = video_grid(pixels.shape[1], pixels.shape[-1])
    if features.shape[1] == t * h * w:  # before transformers 5.18 the forward appends the newline
        newline = model.model.image_newline.expand(len(pixels), 1, -1)
        features = torch.cat([features, newline], 1)
    return features


def matrix(reduction: Reduction) -> Tensor:
    """The reduction as a dense [K, N] matrix."""
    dense = torch.zeros(len(reduction), reduction.num_source)
    merged = [] if reduction.slot is None else reduction.slot.tolist()
    for slot, source in enumerate(reduction.keep.tolist()):
        if slot not in merged:
            dense[slot, source] = 1
    if merged:
        dense.index_put_((reduction.slot, reduction.source), reduction.weight.float(), accumulate=True)
    return dense


@torch.no_grad()
def tower_signals(model: Any, pixels: Tensor, layer: int = -1) -> list[dict[str, Tensor]]:
    """What a method sees of every video if there is no pooling head, from the full attention of an eager tower.

    Args:
        layer: of the tower, as an index into its layers.
    """
    videos, frames = pixels.shape[:2]
    tower = copy.deepcopy(model.model.vision_tower)
    tower.set_attn_implementation("eager")
    attention = tower(pixels.flatten(0, 1), output_attentions=True).attentions[layer]  # [F, heads, patches, patches]
    received = model.model.apply_pooling(attention.mean((1, 2))[..., None]).view(videos, -1)
    means = video_features(model, pixels)[:, :-1].unflatten(1, (frames, -1)).mean(2)
    return [
        {"frame_features": means[v], "saliency.head": received[v], "saliency.received": received[v]}
        for v in range(videos)
    ]


def hidden_states(model: Any, prompt: Prompt, new: Sequence[int] = ()) -> Tensor:
    """[n + new, C] after the last norm, for the prompt followed by the tokens `new`."""
    decoder = model.model.language_model
    hidden, positions = prompt.embeds, prompt.positions
    if new:
        following = prompt.positions[0, -1] + 1 + torch.arange(len(new))
        hidden = torch.cat([hidden, model.get_input_embeddings()(torch.tensor([list(new)]))], 1)
        positions = torch.cat([positions, following[None]], 1)
    n = hidden.shape[1]
    mask = torch.full((1, 1, n, n), torch.finfo(hidden.dtype).min).triu(1)
    rotary = decoder.rotary_emb(hidden, positions)
    for layer in decoder.layers:
        hidden = layer(hidden, attention_mask=mask, position_embeddings=rotary, position_ids=None)
    return decoder.norm(hidden)[0]


@torch.no_grad()
def answer(model: Any, inputs: Inputs, method: Method, steps: int = 8, **shorten_kwargs: Any) -> Answer:
    """Greedy decoding of one row, placeholders never chosen."""
    prompt = shorten(model, inputs, method, **shorten_kwargs)
    tokens: list[int] = []
    logits = []
    for _ in range(steps):
        logits.append(model.lm_head(hidden_states(model, prompt, tokens)[-1]).float())
        tokens.append(int(logits[-1].index_fill(0, torch.tensor(SPECIAL), -torch.inf).argmax()))
    return Answer(torch.tensor(tokens), torch.stack(logits))


def loss(model: Any, inputs: Inputs, labels: Tensor, method: Method) -> Tensor:
    """Mean cross-entropy over the labels [1, L] that are not -100, each predicted from the token before it."""
    prompt = shorten(model, inputs, method)
    logits = model.lm_head(hidden_states(model, prompt))
    following = nn.functional.pad(labels[0], (0, 1), value=-100)[prompt.columns + 1]
    return cross_entropy(logits, following, ignore_index=-100)
