"""What a model has to answer whose cached video tokens are given up between decoding steps, without the engine.

One row without padding, no hook, no cache class: keys and values are a list of tensors a layer, attention is written
out, and tokens are dropped from the lists by the caller's columns. Prompts are shortened by `oracle.shorten`. The only
thing shared with the library is what methods decide.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import oracle
import torch
from oracle import Answer, Inputs, Prompt, Said, Video
from tiny import SPECIAL
from torch import Tensor

from vidcompress.method import Method, Pipeline
from vidcompress.tokens import CachedTokens


@dataclass
class Layer:
    """What a decoder layer has stored: keys and values [G, n, D], and the caller's columns [n] they belong to."""

    keys: Tensor
    values: Tensor
    columns: Tensor


@dataclass
class Talk:
    """A conversation with a plain model, in which videos fade from the cache.

    Attributes:
        pipeline: by which.
        prompt: the shortened prompt it began with.
        said: what it was shortened from; `videos` also holds those of later turns.
        layers: what is stored; empty before anything was said.
        length: columns in the caller's terms.
        evicted: (length, layer, video, places that stay), of every eviction.
    """

    model: Any
    pipeline: Pipeline
    prompt: Prompt
    said: Said
    layers: list[Layer] = field(default_factory=list)
    length: int = 0
    evicted: list[tuple[int, int, int, list[int]]] = field(default_factory=list)

    @torch.no_grad()
    def begin(self) -> Tensor:
        """[V] logits behind the prompt."""
        decoder = self.model.model.language_model
        hidden, positions, columns = self.prompt.embeds[0], self.prompt.positions[..., :-1], self.prompt.columns
        for i in range(len(decoder.layers)):
            if i in self.prompt.stages:
                stage = self.prompt.stages[i]
                hidden, positions, columns = stage.map @ hidden, stage.positions[..., :-1], stage.columns
            self.layers.append(Layer(*(torch.empty(0) for _ in range(2)), columns[:0]))
            hidden, _ = self.through(i, hidden, positions, columns)
            if i < len(self.prompt.added):
                hidden = hidden + self.prompt.added[i]
        self.length = self.said.embeds.shape[1]
        return self.model.lm_head(decoder.norm(hidden[-1]))

    @torch.no_grad()
    def say(self, embeds: Tensor) -> Tensor:
        """[V] logits behind some more tokens [n, C]; behind a single one, tokens are given up."""
        columns = self.length + torch.arange(len(embeds))
        hidden, paid = embeds, []
        for i in range(len(self.layers)):
            stages = [stage for first, stage in sorted(self.prompt.stages.items()) if first <= i]
            after = (stages[-1] if stages else self.prompt).positions[..., -1:]
            positions = after + (columns - self.said.embeds.shape[1])
            hidden, weights = self.through(i, hidden, positions, columns)
            paid.append(weights)
        self.length += len(embeds)
        if len(embeds) == 1:
            self.give_up(paid)
        return self.model.lm_head(self.model.model.language_model.norm(hidden[-1]))

    def words(self, tokens: Sequence[int]) -> Tensor:
        """[n, C]"""
        return self.model.get_input_embeddings()(torch.tensor(list(tokens), dtype=torch.long))

    def through(self, i: int, hidden: Tensor, positions: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        """What leaves layer i [n, C], and what the last token paid to everything stored, its like included [stored]."""
        decoder = self.model.model.language_model
        layer, stored = decoder.layers[i], self.layers[i]
        attention, normed = layer.self_attn, layer.input_layernorm(hidden)
        query, key, value = (
            getattr(attention, f"{name}_proj")(normed).unflatten(-1, (-1, attention.head_dim)) for name in "qkv"
        )
        if hasattr(attention, "q_norm"):
            query, key = attention.q_norm(query), attention.k_norm(key)
        cos, sin = (table[0, :, None] for table in decoder.rotary_emb(hidden[None], positions))
        query, key = (x * cos + torch.cat(x.chunk(2, -1)[::-1], -1) * sin * sign(x) for x in (query, key))
        stored.keys = torch.cat([stored.keys, key.transpose(0, 1)], -2) if len(stored.columns) else key.transpose(0, 1)
        new = value.transpose(0, 1)
        stored.values = torch.cat([stored.values, new], -2) if len(stored.columns) else new
        stored.columns = torch.cat([stored.columns, columns])
        times = query.shape[1] // stored.keys.shape[0]
        keys, values = (x.repeat_interleave(times, 0) for x in (stored.keys, stored.values))
        scores = query.transpose(0, 1) @ keys.transpose(1, 2) / attention.head_dim**0.5
        weights = scores.masked_fill(stored.columns > columns[:, None], -torch.inf).softmax(-1)
        hidden = hidden + attention.o_proj((weights @ values).transpose(0, 1).flatten(1))
        left = layer.mlp(layer.post_attention_layernorm(hidden)[None])
        return hidden + (left[0] if isinstance(left, tuple) else left)[0], weights[:, -1].mean(0)

    def give_up(self, paid: Sequence[Tensor]) -> None:
        """Drops what the methods give up, of every layer from theirs on."""
        before = [(layer.columns, weights) for layer, weights in zip(self.layers, paid)]
        for site, method in self.pipeline.evictions(len(self.layers)).items():
            for number, video in enumerate(self.said.videos):
                if video.columns[0] >= self.length:
                    continue
                self._give_up(site, method, number, video, before)

    def _give_up(
        self, site: Any, method: Method, number: int, video: Video, paid: Sequence[tuple[Tensor, Tensor]]
    ) -> None:
        own = torch.isin(video.columns, self.layers[site.layer].columns)
        index, entered = own.nonzero().squeeze(1), int(torch.isin(video.columns, self.prompt.columns).sum())
        if video.columns[0] >= self.said.embeds.shape[1]:
            entered = len(video.columns)
        if method.count(site, video.grid, entered, len(index)) >= len(index):
            return
        signals = {}
        for name, layer in (("last_query_attention", site.layer), ("last_query_attention.previous", site.layer - 1)):
            if name in method.needs:
                columns, weights = paid[layer]
                signals[name] = weights[torch.searchsorted(columns, video.columns[index])]
        seen = CachedTokens(video.grid, index, signals, video.notes.get(method.name, {}), entered)
        kept = index[method.evict(seen, site)]
        self.evicted.append((self.length, site.layer, number, kept.tolist()))
        for layer in self.layers[site.layer :]:
            left = kept[torch.isin(video.columns[kept], layer.columns)]
            newlines = torch.isin(video.newlines, layer.columns).nonzero().squeeze(1)
            if len(newlines) > 1:  # one that ends a line stays with a token of its line
                line = len(video.columns) // len(video.newlines)
                newlines = newlines[torch.isin(newlines, left // line)]
            of_video = torch.isin(layer.columns, torch.cat([video.columns, video.newlines]))
            stays = ~of_video | torch.isin(layer.columns, torch.cat([video.columns[left], video.newlines[newlines]]))
            layer.keys, layer.values, layer.columns = layer.keys[:, stays], layer.values[:, stays], layer.columns[stays]


def sign(x: Tensor) -> Tensor:
    """-1 for the first half of the channels, which the rotated second half is taken from; 1 for the other."""
    half = x.shape[-1] // 2
    return torch.cat([-torch.ones(half), torch.ones(half)])


def talk(model: Any, inputs: Inputs, method: Method | Pipeline, read: Any = None) -> Talk:
    """A conversation that is about to begin with these inputs, one row."""
    pipeline = Pipeline.of(method)
    said = (read or oracle.read_llava)(model, inputs, None)
    prompt = oracle.shorten(model, inputs, pipeline, read=lambda *_: said)
    return Talk(model, pipeline, prompt, said)


def greedy(logits: Tensor) -> int:
    """The word that is chosen; placeholders never are."""
    return int(logits.index_fill(0, torch.tensor(SPECIAL), -torch.inf).argmax())


def answer(
    model: Any, inputs: Inputs, method: Method | Pipeline, steps: int = 6, read: Any = None
) -> tuple[Answer, Talk]:
    """Greedy decoding of one row."""
    conversation = talk(model, inputs, method, read)
    return go_on(conversation, conversation.begin(), steps), conversation


def go_on(conversation: Talk, logits: Tensor, steps: int) -> Answer:
    """Greedy decoding from these logits on; the last word is not said, as in generate()."""
    found = [logits]
    for _ in range(steps - 1):
        found.append(conversation.say(conversation.words([greedy(found[-1])])))
    return Answer(torch.tensor([greedy(x) for x in found]), torch.stack(found).float())
