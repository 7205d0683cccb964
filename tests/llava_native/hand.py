"""What a compressed model of the `llava` package has to answer, recomputed without hooks, cache, batch or padding.

The embeddings are those that the package's own `prepare_inputs_labels_for_multimodal` builds, and the layers are the
package's, called one by one under an explicit causal mask; signals come from full softmax matrices. The only thing
shared with the library is `Method.decide`.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from native import HERE, SIZE, Prompt
from torch import Tensor

from vidcompress import Method, Reduction, VideoTokens
from vidcompress.method import Pipeline

Grid = tuple[int, int, int]


@dataclass(frozen=True)
class Stage:
    """The prompt from some layer on: [n, m] map of the m tokens before, positions [n + 1] (the last one of the token
    that comes next), and the column [n] of the whole prompt that each token came from.
    """

    map: Tensor
    positions: Tensor
    columns: Tensor


@dataclass
class Video:
    """One video: columns of its tokens and of its newlines, what the tower says of it, and what was decided so far.

    `line` is how many tokens each newline ends; `index` are the places in the grid of what is left.
    """

    columns: Tensor
    newlines: Tensor
    line: int
    grid: Grid
    signals: Mapping[str, Tensor]
    index: Tensor
    entered: int
    notes: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    decided: dict[int, Reduction] = field(default_factory=dict)

    @property
    def left(self) -> Tensor:
        """Columns that are left: tokens, and the newlines of lines that still have one."""
        ends = torch.isin(torch.arange(len(self.newlines)), self.index // max(1, self.line))
        return torch.cat([self.columns[self.index], self.newlines[ends]])


@dataclass
class Hand:
    """One prompt on its way.

    Attributes:
        embeds: [1, L, C], features in place.
        text: columns of the text after the last video.
        stages: by layer, -1 before the first, where something was removed or merged.
    """

    model: Any
    embeds: Tensor
    videos: list[Video]
    text: Tensor
    stages: dict[int, Stage] = field(default_factory=dict)

    @property
    def length(self) -> int:
        """Tokens of the whole prompt."""
        return self.embeds.shape[1]

    @property
    def lengths(self) -> list[int]:
        """Tokens that every layer runs over."""
        return [len(self.at(layer)[0]) for layer in range(len(self.model.model.layers))]

    @property
    def kept(self) -> dict[tuple[int, int], Tensor]:
        """What was kept at every (video, layer): the reductions' own indices."""
        return {(v, layer): r.keep for v, video in enumerate(self.videos) for layer, r in video.decided.items()}

    def at(self, layer: int) -> tuple[Tensor, Tensor]:
        """([n] columns, [n + 1] positions) that a layer runs over."""
        whole = torch.arange(self.length + 1)
        found = [stage for first, stage in sorted(self.stages.items()) if first <= layer]
        return (found[-1].columns, found[-1].positions) if found else (whole[:-1], whole)

    # -- the decoder -------------------------------------------------------------------------------------------------
    def run(self, new: Sequence[int] = ()) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
        """What enters every layer, (hidden [1, n, C], positions [1, n]), and [1, n, C] after the last norm."""
        decoder = self.model.model
        words = decoder.embed_tokens(torch.tensor([list(new)], dtype=torch.long))
        hidden, entered = torch.cat([self.embeds, words], 1), []
        for i in range(-1, len(decoder.layers)):
            if i in self.stages:
                before = self.stages[i].map.shape[1]
                hidden = torch.cat([self.stages[i].map @ hidden[:, :before], hidden[:, before:]], 1)
            if i >= 0:
                positions = self.at(i)[1]
                positions = torch.cat([positions[:-1], positions[-1] + torch.arange(len(new))])[None]
                entered.append((hidden, positions))
                rotary = decoder.rotary_emb(hidden, positions)
                hidden = decoder.layers[i](hidden, attention_mask=causal(hidden), position_embeddings=rotary)[0]
        return entered, decoder.norm(hidden)

    def attention(self, layer: int, entered: list[tuple[Tensor, Tensor]]) -> Tensor:
        """[H, n, n] softmax matrix of a layer."""
        hidden, positions = entered[layer]
        module = copy.deepcopy(self.model.model.layers[layer].self_attn)
        module.config._attn_implementation = "eager"
        states = self.model.model.layers[layer].input_layernorm(hidden)
        rotary = self.model.model.rotary_emb(states, positions)
        return module(states, position_embeddings=rotary, attention_mask=causal(states))[1][0]

    # -- decisions ---------------------------------------------------------------------------------------------------
    def shorten(self, pipeline: Pipeline) -> None:
        """Asks about every video at every site, each time on a pass of its own."""
        for site, method in pipeline.stages(len(self.model.model.layers)).items():
            entered, _ = self.run()
            columns, positions = self.at(site.layer)
            dense = torch.eye(len(columns))
            hidden = entered[site.layer][0][0] if site.is_inner else self.embeds[0]
            gone = torch.zeros(self.length, dtype=torch.bool)
            decided = []
            for video in self.videos:
                mine = video.columns[video.index]
                place = torch.searchsorted(columns, mine)
                signals = {n: s if n == "frame_features" else s[video.index] for n, s in video.signals.items()}
                if "first_look" in method.needs:
                    signals["first_look"] = self.first_look(method, entered, mine)
                if site.is_inner:
                    signals |= self.signals(site.layer, entered, mine)
                tokens = VideoTokens(
                    hidden[place],
                    video.grid,
                    video.index if site.is_inner else None,
                    {name: signals[name] for name in method.needs & signals.keys()},
                    video.notes.get(method.name, {}),
                    video.entered,
                )
                decided.append((video, place, method.decide(tokens, site)))
            for video, place, reduction in decided:
                dense[place] = 0
                dense[place[reduction.keep][:, None], place] = matrix(reduction)
                gone[video.left] = True
                self.note(video, method, site.layer, reduction)
            gone[torch.cat([video.left for video in self.videos])] = False
            if any(not r.is_identity for _, _, r in decided):
                stays = ~gone[columns]
                positions = torch.cat([positions[:-1][stays], positions[-1:]])
                if method.positions == "renumber":
                    positions = positions[0] + torch.arange(len(positions))
                self.stages[site.layer] = Stage(dense[stays], positions, columns[stays])

    def note(self, video: Video, method: Method, layer: int, reduction: Reduction) -> None:
        """Goes on with what a decision left."""
        video.index = video.index[reduction.keep]
        video.entered = len(reduction) if layer < 0 else video.entered
        video.notes[method.name] = {**video.notes.get(method.name, {}), **reduction.notes}
        video.decided[layer] = reduction

    def first_look(self, method: Method, entered: list[tuple[Tensor, Tensor]], video: Tensor) -> Tensor:
        """[M] the share of each of the tokens at columns `video` in what the last one pays to all of them."""
        layers = method.looks(len(entered))
        rows = [self.attention(layer, entered)[:, -1, torch.searchsorted(self.at(layer)[0], video)] for layer in layers]
        return torch.stack([(row / row.sum(1, keepdim=True)).mean(0) for row in rows]).mean(0)

    def signals(self, layer: int, entered: list[tuple[Tensor, Tensor]], video: Tensor) -> dict[str, Tensor]:
        """What a layer says of the tokens at columns `video`."""

        def paid(layer: int, queries: Tensor) -> Tensor:
            columns = self.at(layer)[0]
            weights = self.attention(layer, entered)[:, torch.searchsorted(columns, queries)]
            return weights[..., torch.searchsorted(columns, video)]

        hidden = entered[layer][0][0]
        last = torch.tensor([self.length - 1])
        found = {
            "text_attention": paid(layer, self.text).mean(0).amax(0),
            "text_attention.heads": paid(layer, self.text),
            "last_query_attention": paid(layer, last).mean((0, 1)),
            "text_hidden": hidden[torch.searchsorted(self.at(layer)[0], self.text)],
            "last_text_hidden": hidden[-1],
        }
        return found | ({"last_query_attention.previous": paid(layer - 1, last).mean((0, 1))} if layer else {})


def causal(hidden: Tensor) -> Tensor:
    """[1, 1, n, n] additive mask of hidden [1, n, C]."""
    n = hidden.shape[1]
    return torch.full((1, 1, n, n), torch.finfo(hidden.dtype).min).triu(1)


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


# -- the prompt as the package builds it -------------------------------------------------------------------------------
def read(model: Any, prompt: Prompt) -> Hand:
    """One row without padding, nothing decided."""
    ids = prompt.ids
    images, kinds = prompt.pixels.get("images"), prompt.kinds
    if images is None:
        return Hand(model, model.model.embed_tokens(ids), [], torch.empty(0, dtype=torch.long))
    prepare = type(model).prepare_inputs_labels_for_multimodal
    sizes = prompt.pixels["image_sizes"]
    embeds = prepare(model, ids, None, None, None, None, images, kinds, sizes)[4]
    column, videos, places = 0, [], iter(zip(images, kinds, strict=True))
    is_text = torch.ones(embeds.shape[1], dtype=torch.bool)
    for token in ids[0].tolist():
        if token != HERE:
            column += 1
            continue
        pixels, kind = next(places)
        if kind == "video":
            grid, newline, line = layout(model.config, len(pixels))
            here = column + torch.arange(len(newline))
            signals = tower_signals(model, pixels)
            whole = torch.arange(int((~newline).sum()))
            features = embeds[0, here[~newline]].unflatten(0, (len(pixels), -1)).mean(1)
            signals["frame_features"] = features
            videos.append(Video(here[~newline], here[newline], line, grid, signals, whole, len(whole)))
            is_text[: here[-1] + 1] = False
            column += len(newline)
        else:
            # one tile: its patches and a newline; otherwise an overview, and a tile with a newline after every row
            length = 27 * 27 + (1 if pixels.ndim == 3 else 27 * 28)
            is_text[column : column + length] = False
            column += length
    assert column == embeds.shape[1]
    text = is_text.nonzero().squeeze(1)
    return Hand(model, embeds, videos, text if len(text) else torch.tensor([column - 1]))


def layout(config: Any, frames: int) -> tuple[Grid, Tensor, int]:
    """(t, h, w) of a video's tokens, which of its places [..] hold a newline, and how many tokens one of them ends."""
    patches = SIZE // 14
    side = -(-patches // 2) if config.mm_spatial_pool_mode == "bilinear" else patches // 2
    row, frame = [False] * side, [False] * side**2
    places, line = {
        "grid": ([*row, True] * side * frames, side),
        "frame": ([*frame, True] * frames, side**2),
        "one_token": ([*frame * frames, True], side**2 * frames),
        "no_token": (frame * frames, 0),
    }[config.mm_newline_position]
    return (frames, side, side), torch.tensor(places), line


def tower_signals(model: Any, pixels: Tensor) -> dict[str, Tensor]:
    """Saliency of a video without a pooling head: the mean attention that patches receive in the last layer, whose keys
    are averaged over its heads.
    """
    tower = model.get_vision_tower().vision_tower
    output = tower(pixels, output_attentions=True, output_hidden_states=True)
    received = type(model).get_2dPool(model, output.attentions[-1].mean((1, 2))[..., None]).flatten()
    layer = tower.vision_model.encoder.layers[-1]
    keys = layer.self_attn.k_proj(layer.layer_norm1(output.hidden_states[-2]))
    keys = torch.stack(keys.chunk(layer.self_attn.num_heads, -1)).mean(0)
    keys = type(model).get_2dPool(model, keys).flatten(0, 1)
    return {"saliency.head": received, "saliency.received": received, "tower_keys": keys}


# -- answers -----------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Answer:
    """Greedy decoding: tokens [steps], the logits [steps, V] they were chosen by, and the prompt's own [n, V]."""

    tokens: Tensor
    logits: Tensor
    prefill: Tensor
    hand: Hand


@torch.no_grad()
def answer(model: Any, prompt: Prompt, method: Method | Pipeline, steps: int = 3) -> Answer:
    """Of one row without padding."""
    hand = read(model, prompt)
    if hand.videos:
        hand.shorten(Pipeline.of(method))
    tokens: list[int] = []
    logits = []
    for _ in range(steps):
        logits.append(model.lm_head(hand.run(tokens)[1][0]).float())
        tokens.append(int(logits[-1][-1].argmax()))
    return Answer(torch.tensor(tokens), torch.stack([each[-1] for each in logits]), logits[0], hand)


@torch.no_grad()
def score(model: Any, hand: Hand, tokens: Sequence[int]) -> float:
    """Mean log-probability of the tokens that follow a shortened prompt."""
    logits = model.lm_head(hand.run(tokens)[1][0]).float()[-len(tokens) - 1 : -1]
    return float(logits.log_softmax(-1)[torch.arange(len(tokens)), torch.tensor(tokens)].mean())
