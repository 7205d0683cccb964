"""What a compressed model has to answer, recomputed without the engine: no hook, no cache, one row without padding.

Everything is taken from a plain (uncompressed) copy of the model. The prompt is shortened here, before the decoder and
at the input of its layers, each decision on a pass of its own through all layers under an explicit causal mask, with
attention as a full softmax matrix. Every decoding step runs all layers anew. Decisions are made once, turn by turn, and
never see what was said later. The only thing shared with the library is `Method.decide`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from tiny import SPECIAL
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from vidcompress import Method, Reduction, Site, VideoTokens
from vidcompress.method import Pipeline

Inputs = Mapping[str, Tensor]
Turns = Sequence[tuple[int, "Method | Pipeline"]]
"""Earlier turns: how many columns of the prompt had been said by then, and by what they were compressed."""

TOLERANCE: dict[str, float] = {"atol": 2e-4, "rtol": 1e-3}
"""For logits in fp32 that were summed in another order; the tiny models' logits are of size 1 to 10."""


@dataclass(frozen=True)
class Said:
    """A whole prompt as a plain model reads it, one row.

    Attributes:
        embeds: [1, L, C], features in place.
        positions: [1, L + 1] rotary positions (M-RoPE: [3, 1, L + 1]), the last one of the token that comes next.
        videos: in order, nothing decided.
        added: what each of the first decoder layers adds to its output, [L, C].
    """

    embeds: Tensor
    positions: Tensor
    videos: list[Video]
    added: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class Stage:
    """The prompt from some decoder layer on: [n, m] dense map of the m tokens before, rotary positions [.., 1, n + 1]
    (the last one of the token that comes next), and the column [n] of the caller's prompt that each token came from.
    """

    map: Tensor
    positions: Tensor
    columns: Tensor


@dataclass(frozen=True)
class Prompt:
    """A shortened prompt: embeds [1, n, C], rotary positions [.., 1, n + 1], the column [n] of the caller's prompt that
    each token came from, by layer where it is shortened further, and what the first layers add.
    """

    embeds: Tensor
    positions: Tensor
    columns: Tensor
    stages: Mapping[int, Stage] = field(default_factory=dict)
    added: tuple[Tensor, ...] = ()

    def __len__(self) -> int:
        return self.columns.numel()

    def at(self, layer: int) -> Tensor:
        """[n] caller's columns that a decoder layer runs over."""
        return next((s.columns for first, s in sorted(self.stages.items())[::-1] if first <= layer), self.columns)

    @property
    def left(self) -> Tensor:
        """[n] caller's columns of the tokens that leave the last layer."""
        return self.at(1 << 30)

    def lengths(self, depth: int) -> list[int]:
        """Tokens that every decoder layer runs over."""
        return [self.at(layer).numel() for layer in range(depth)]


@dataclass(frozen=True)
class Answer:
    """Greedy decoding: tokens [steps], and the logits [steps, V] they were chosen by."""

    tokens: Tensor
    logits: Tensor


@dataclass
class Video:
    """One video of a prompt: the caller's columns of its tokens and of its newlines, each of which ends as many tokens,
    what the tower says of it, and the decisions made so far, by layer (-1 for the projector).
    """

    columns: Tensor
    grid: tuple[int, int, int]
    signals: Mapping[str, Tensor]
    decided: dict[int, Reduction] = field(default_factory=dict)
    notes: dict[str, dict[str, Any]] = field(default_factory=dict)
    newlines: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))

    def index(self, layer: int) -> Tensor:
        """[M] places in the grid of the tokens that are left behind the site at `layer`."""
        index = torch.arange(len(self.columns))
        for site in sorted(self.decided):
            if site <= layer:
                index = index[self.decided[site].keep]
        return index

    def left(self, layer: int) -> Tensor:
        """Columns of the tokens that are left behind the site at `layer`, and of the newlines of their lines."""
        index = self.index(layer)
        line = len(self.columns) // max(1, len(self.newlines))
        with_token = torch.isin(torch.arange(len(self.newlines)), index // line)
        return torch.cat([self.columns[index], self.newlines[with_token]])


@dataclass
class Turn:
    """Columns `begin` to `end` of the prompt, and what becomes of its videos."""

    begin: int
    end: int
    stages: Mapping[Site, Method]
    videos: list[Video]

    def left(self, layer: int) -> Tensor:
        """[n] its columns that are left behind the site at `layer`."""
        stays = torch.ones(self.end, dtype=torch.bool)
        stays[: self.begin] = False
        for video in self.videos:
            stays[video.columns] = stays[video.newlines] = False
            stays[video.left(layer)] = True
        return stays.nonzero().squeeze(1)

    def positions(self, said: Tensor, layer: int, closed: Tensor | int) -> Tensor:
        """[.., 1, n + 1] positions of these, and of what comes next, at `layer`.

        Args:
            said: [.., 1, L + 1] the caller's.
            closed: gaps that renumbering closed in the turns before.
        """
        columns = torch.arange(self.begin, self.end + 1)
        positions = said[..., columns] - closed
        for site, method in self.stages.items():
            decided = [v.decided[site.layer] for v in self.videos if site.layer in v.decided]
            if site.layer <= layer and not all(r.is_identity for r in decided):
                stays = torch.isin(columns, self.left(site.layer)) | (columns == self.end)
                columns, positions = columns[stays], positions[..., stays]
                if method.positions == "renumber":
                    positions = positions[..., :1] + torch.arange(len(columns))
        return positions


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


# -- shortening --------------------------------------------------------------------------------------------------------
def shorten(
    model: Any,
    inputs: Inputs,
    method: Method | Pipeline,
    signals: Sequence[Mapping[str, Tensor]] | None = None,
    turns: Turns = (),
    read: Callable[..., Said] | None = None,
) -> Prompt:
    """The prompt as the decoder should see it. Differentiable in the model's weights.

    Args:
        signals: what the vision tower gives, one mapping for every video; by default `tower_signals` of the model.
        turns: what was said, and compressed, before.
        read: how this kind of model reads the whole prompt; `read_llava` by default.
    """
    said = (read or read_llava)(model, inputs, signals)
    done: list[Turn] = []
    for end, by in (*turns, (said.embeds.shape[1], method)):
        begin = done[-1].end if done else 0
        mine = [v for v in said.videos if begin <= v.columns[0] < end]
        stages = Pipeline.of(by).stages(len(model.model.language_model.layers))
        done.append(Turn(begin, end, stages, mine))
        if mine:
            decide(model, said, inputs["input_ids"][0], done)
    return assemble(said, done)


def read_llava(model: Any, inputs: Inputs, signals: Sequence[Mapping[str, Tensor]] | None = None) -> Said:
    """A prompt of LLaVA-OneVision or LLaVA-Video."""
    embeds = embedded(model, inputs)
    return Said(embeds, torch.arange(embeds.shape[1] + 1)[None], find_videos(model, inputs, signals))


def embedded(model: Any, inputs: Inputs) -> Tensor:
    """[1, L, C] the whole prompt, features in place."""
    ids, config = inputs["input_ids"], model.config
    embeds = model.get_input_embeddings()(ids)
    if "pixel_values" in inputs:
        encoded = model.model.get_image_features(inputs["pixel_values"], inputs["image_sizes"], return_dict=True)
        embeds = embeds.masked_scatter((ids == config.image_token_id)[..., None], torch.cat(encoded.pooler_output))
    if "pixel_values_videos" in inputs:
        features = video_features(model, inputs["pixel_values_videos"])
        embeds = embeds.masked_scatter((ids == config.video_token_id)[..., None], features.flatten(0, 1))
    return embeds


def find_videos(model: Any, inputs: Inputs, signals: Sequence[Mapping[str, Tensor]] | None) -> list[Video]:
    """The videos of a prompt, in order, nothing decided."""
    if "pixel_values_videos" not in inputs:
        return []
    pixels = inputs["pixel_values_videos"]
    signals = tower_signals(model, pixels) if signals is None else signals
    places = (inputs["input_ids"][0] == model.config.video_token_id).nonzero().view(len(pixels), -1)
    grid, newline = layout(model, pixels)
    return [Video(place[~newline], grid, seen, newlines=place[newline]) for place, seen in zip(places, signals)]


def layout(model: Any, pixels: Tensor) -> tuple[tuple[int, int, int], Tensor]:
    """(t, h, w) of a video's tokens, and which of its places [..] hold a newline."""
    config, frames = model.config, pixels.shape[1]
    patches = pixels.shape[-1] // config.vision_config.patch_size
    side = patches // 2
    if getattr(config, "mm_spatial_pool_mode", "bilinear") == "bilinear":
        side = -(-patches // 2)
    row, frame = [False] * side, [False] * side**2
    places = {
        "grid": [*row, True] * side * frames,
        "frame": [*frame, True] * frames,
        "one_token": [*frame * frames, True],
        "no_token": frame * frames,
    }[getattr(config, "mm_newline_position", "one_token")]
    return (frames, side, side), torch.tensor(places)


@torch.no_grad()
def decide(model: Any, said: Said, ids: Tensor, turns: list[Turn]) -> None:
    """What becomes of the videos of the last turn, site by site."""
    turn = turns[-1]
    last_video = max(int(v.columns[-1]) for v in turn.videos)
    column = torch.arange(turn.end)
    text = column[(column > last_video) & ~torch.isin(ids[: turn.end], torch.tensor(SPECIAL))]
    last = column[-1:]
    text = text if len(text) else last
    for site, method in turn.stages.items():
        prompt = assemble(said, turns)
        layers = entering(model, prompt)
        hidden, columns = (prompt.embeds[0], prompt.columns) if site.layer < 0 else layers[site.layer][::2]
        decided = {}
        for v, video in enumerate(turn.videos):
            index = video.index(site.layer)
            place = torch.searchsorted(columns, video.columns[index])
            signals = {name: s if name == "frame_features" else s[index] for name, s in video.signals.items()}
            if "first_look" in method.needs:
                signals |= {"first_look": first_look(model, layers, method, video.columns, last)}
            if site.is_inner:
                signals |= decoder_signals(model, layers, site.layer, video.columns[index], text, last)
            decided[v] = method.decide(
                VideoTokens(
                    hidden[place],
                    video.grid,
                    index if site.is_inner else None,
                    {name: signals[name] for name in method.needs & signals.keys()},
                    video.notes.get(method.name, {}),
                    len(video.index(-1)),
                ),
                site,
            )
        for v, reduction in decided.items():
            turn.videos[v].decided[site.layer] = reduction
            turn.videos[v].notes.setdefault(method.name, {}).update(reduction.notes)


def assemble(said: Said, turns: Sequence[Turn]) -> Prompt:
    """What was said so far, shortened by all decisions made so far."""
    columns = torch.arange(turns[-1].end)
    whole, stages = columns, {}
    for layer in sorted({-1} | {layer for turn in turns for video in turn.videos for layer in video.decided}):
        dense = torch.eye(len(columns))
        for video in (v for turn in turns for v in turn.videos if layer in v.decided):
            place = torch.searchsorted(columns, video.columns[video.index(layer - 1)])
            dense[place] = 0
            rows = place[video.decided[layer].keep]
            dense[rows[:, None], place] = matrix(video.decided[layer])
        left, positions, closed = [], [], 0
        for turn in turns:
            left.append(turn.left(layer))
            here = turn.positions(said.positions, layer, closed)
            positions.append(here[..., :-1])
            following = here[..., -1:]
            closed = said.positions[..., turn.end, None] - following
        stays = torch.isin(columns, torch.cat(left))
        dense, columns = dense[stays], columns[stays]
        stages[layer] = Stage(dense, torch.cat([*positions, following], -1), columns)
    first = stages.pop(-1)
    added = tuple(first.map @ features[whole] for features in said.added)
    return Prompt(first.map @ said.embeds[:, whole], first.positions, first.columns, stages, added)


def video_features(model: Any, pixels: Tensor) -> Tensor:
    """[videos, tokens and newlines, C]"""
    features = model.model.get_video_features(pixels, return_dict=True).pooler_output
    if features.shape[1] < len(layout(model, pixels)[1]):  # before transformers 5.18 the forward appends the last one
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


# -- signals -----------------------------------------------------------------------------------------------------------
@torch.no_grad()
def tower_signals(model: Any, pixels: Tensor, layer: int = -1) -> list[dict[str, Tensor]]:
    """What a method sees of every video if there is no pooling head, from the full attention of an eager tower.

    Args:
        layer: of the tower, as an index into its layers.
    """
    videos, frames = pixels.shape[:2]
    tower = copy.deepcopy(model.model.vision_tower)
    tower.set_attn_implementation("eager")
    output = tower(pixels.flatten(0, 1), output_attentions=True, output_hidden_states=True)
    attention = output.attentions[layer]  # [F, heads, patches, patches]
    received = model.model.apply_pooling(attention.mean((1, 2))[..., None]).view(videos, -1)
    keys = model.model.apply_pooling(tower_keys(tower.encoder.layers[layer], output.hidden_states[:-1][layer]))
    keys = keys.reshape(videos, -1, keys.shape[-1])
    _, newline = layout(model, pixels)
    means = video_features(model, pixels)[:, ~newline].unflatten(1, (frames, -1)).mean(2)
    return [
        {
            "frame_features": means[v],
            "saliency.head": received[v],
            "saliency.received": received[v],
            "tower_keys": keys[v],
        }
        for v in range(videos)
    ]


def tower_keys(layer: Any, entering: Tensor) -> Tensor:
    """[F, patches, D] mean over heads of the keys that a layer of SigLIP or CLIP makes of what enters it."""
    projection = layer.self_attn.k_proj
    keys = layer.layer_norm1(entering) @ projection.weight.T + projection.bias
    return torch.stack(keys.chunk(layer.self_attn.num_heads, -1)).mean(0)


def decoder_signals(
    model: Any, layers: Sequence[tuple[Tensor, Tensor, Tensor]], layer: int, video: Tensor, text: Tensor, last: Tensor
) -> dict[str, Tensor]:
    """Every signal of a decoder layer about the tokens at the caller's columns `video`.

    Args:
        layers: what enters every layer, as `entering` says it.
        text, last: columns of the text and of the last token.
    """

    def paid(layer: int, queries: Tensor) -> Tensor:
        """[H, Q, M]"""
        columns = layers[layer][2]
        weights = attention(model, layer, *layers[layer][:2])
        return weights[:, torch.searchsorted(columns, queries)][..., torch.searchsorted(columns, video)]

    hidden, _, columns = layers[layer]
    found = {
        "text_attention": paid(layer, text).mean(0).amax(0),
        "text_attention.heads": paid(layer, text),
        "last_query_attention": paid(layer, last).mean((0, 1)),
        "text_hidden": hidden[torch.searchsorted(columns, text)],
        "last_text_hidden": hidden[-1],
    }
    if layer:
        found["last_query_attention.previous"] = paid(layer - 1, last).mean((0, 1))
    return found


def first_look(
    model: Any, layers: Sequence[tuple[Tensor, Tensor, Tensor]], method: Method, video: Tensor, last: Tensor
) -> Tensor:
    """[M] what the last token pays to the video alone: the share of what it pays, mean over heads and layers."""
    shares = []
    for layer in method.looks(len(layers)):
        hidden, positions, columns = layers[layer]
        row = attention(model, layer, hidden, positions)[:, torch.searchsorted(columns, last)[0]]  # [H, n]
        paid = row[:, torch.searchsorted(columns, video)]
        shares.append((paid / paid.sum(1, keepdim=True)).mean(0))
    return torch.stack(shares).mean(0)


def attention(model: Any, layer: int, hidden: Tensor, positions: Tensor) -> Tensor:
    """[H, n, n] softmax matrix of a layer that gets hidden [n, C] at positions [.., 1, n]."""
    decoder = model.model.language_model
    module = copy.deepcopy(decoder.layers[layer].self_attn)
    module.config._attn_implementation = "eager"
    states = decoder.layers[layer].input_layernorm(hidden[None])
    rotary = decoder.rotary_emb(states, positions)
    return module(states, position_embeddings=rotary, attention_mask=causal(states))[1][0]


# -- the decoder -------------------------------------------------------------------------------------------------------
def causal(hidden: Tensor) -> Tensor:
    """[1, 1, n, n] additive mask of hidden [1, n, C]."""
    n = hidden.shape[1]
    return torch.full((1, 1, n, n), torch.finfo(hidden.dtype).min).triu(1)


def run(model: Any, prompt: Prompt, new: Sequence[int] = ()) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
    """What enters every layer, (hidden [1, n, C], positions [.., 1, n]), and what leaves the last [1, n, C]."""
    words = model.get_input_embeddings()(torch.tensor([list(new)], dtype=torch.long))
    hidden = torch.cat([prompt.embeds, words], 1)
    said, entered = prompt.positions, []
    for i in range(len(model.model.language_model.layers)):
        if i in prompt.stages:
            stage = prompt.stages[i]
            before = stage.map.shape[1]
            hidden = torch.cat([stage.map @ hidden[:, :before], hidden[:, before:]], 1)
            said = stage.positions
        n = hidden.shape[1] - len(new)
        positions = torch.cat([said[..., :n], said[..., n:] + torch.arange(len(new))], -1)
        entered.append((hidden, positions))
        hidden = through(model, i, hidden, positions)
        if i < len(prompt.added):  # an inner stage does not begin before
            hidden = hidden + nn.functional.pad(prompt.added[i], (0, 0, 0, len(new)))
    return entered, hidden


def through(model: Any, layer: int, hidden: Tensor, positions: Tensor) -> Tensor:
    """[1, n, C] what leaves one layer that gets hidden [1, n, C] at positions [.., 1, n]."""
    decoder = model.model.language_model
    rotary = decoder.rotary_emb(hidden, positions)
    return decoder.layers[layer](hidden, attention_mask=causal(hidden), position_embeddings=rotary, position_ids=None)


def entering(model: Any, prompt: Prompt) -> list[tuple[Tensor, Tensor, Tensor]]:
    """What enters every layer: hidden [n, C], positions [.., 1, n], and the caller's columns [n]."""
    return [(hidden[0], positions, prompt.at(i)) for i, (hidden, positions) in enumerate(run(model, prompt)[0])]


def hidden_states(model: Any, prompt: Prompt, new: Sequence[int] = ()) -> Tensor:
    """[n + new, C] after the last norm, for the prompt followed by the tokens `new`."""
    return model.model.language_model.norm(run(model, prompt, new)[1])[0]


@torch.no_grad()
def answer(model: Any, inputs: Inputs, method: Method | Pipeline, steps: int = 8, **shorten_kwargs: Any) -> Answer:
    """Greedy decoding of one row, placeholders never chosen."""
    prompt = shorten(model, inputs, method, **shorten_kwargs)
    tokens: list[int] = []
    logits = []
    for _ in range(steps):
        logits.append(model.lm_head(hidden_states(model, prompt, tokens)[-1]).float())
        tokens.append(int(logits[-1].index_fill(0, torch.tensor(SPECIAL), -torch.inf).argmax()))
    return Answer(torch.tensor(tokens), torch.stack(logits))


def loss(model: Any, inputs: Inputs, labels: Tensor, method: Method | Pipeline, **shorten_kwargs: Any) -> Tensor:
    """Mean cross-entropy over the labels [1, L] that are not -100, each predicted from the token before it."""
    prompt = shorten(model, inputs, method, **shorten_kwargs)
    logits = model.lm_head(hidden_states(model, prompt))
    following = nn.functional.pad(labels[0], (0, 1), value=-100)[prompt.left + 1]
    return cross_entropy(logits, following, ignore_index=-100)


def assert_same_gradients(plain: Any, model: Any) -> None:
    """After backward() of both losses. Relative to each parameter's largest gradient: fp32 sums in another order."""
    for wanted, parameter in zip(plain.parameters(), model.parameters()):
        assert (wanted.grad is None) == (parameter.grad is None)
        if wanted.grad is not None:
            scale = float(wanted.grad.abs().max())
            torch.testing.assert_close(parameter.grad, wanted.grad, atol=1e-3 * scale + 1e-7, rtol=1e-2)
