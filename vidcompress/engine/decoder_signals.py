"""What the text says about the video tokens, taken from the input of a decoder layer.

A layer's own norm and projections are called on that input before the layer runs, and the attention of a few queries
is worked out from them. The layer itself keeps its FlashAttention, and no matrix of all tokens against all exists.
Modules are called, weights never read, so that it works where accelerate keeps the weights elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vidcompress import ops
from vidcompress.engine.saliency import rotate
from vidcompress.engine.sequence import Sequence
from vidcompress.precision import full_precision

DECODER_SIGNALS = frozenset(
    {
        "text_attention",
        "text_attention.heads",
        "last_query_attention",
        "last_query_attention.previous",
        "text_hidden",
        "last_text_hidden",
        "first_look",
    }
)
"""Signals that any decoder gives; `.previous` is of the layer before, as FastV takes it, and `first_look` is from a run
of its own over the whole prompt."""


@dataclass
class LayerView:
    """One decoder layer about to run.

    Attributes:
        layer: with `input_layernorm` and `self_attn.{q_proj, k_proj, head_dim, scaling}` (and `q_norm`, `k_norm`).
        number: which layer it is.
        tokens: its input; `embeds` are the hidden states.
        rotary: (cos, sin), each [B or 1, L, D], that it gets.
        cache: the KV cache, or None.
        previous: the same of the layer before, if a method asks for it.
    """

    layer: Any
    number: int
    tokens: Sequence
    rotary: tuple[Tensor, Tensor]
    cache: Any = None
    previous: LayerView | None = None
    _keys: dict[int, Tensor] = field(default_factory=dict)

    @torch.no_grad()
    def signals(self, needs: frozenset[str], row: int, places: Tensor, text: Tensor, last: Tensor) -> dict[str, Tensor]:
        """The signals `needs` of one video.

        Args:
            row: batch row.
            places: [M] columns of its tokens.
            text: [Q] columns of the text tokens.
            last: [1] column of the prompt's last token.
        """
        hidden = self.tokens.embeds.detach()[row]
        found = {}
        if "text_hidden" in needs:
            found["text_hidden"] = hidden[text]
        if "last_text_hidden" in needs:
            found["last_text_hidden"] = hidden[last[0]]
        if "text_attention" in needs:
            found["text_attention"] = self.attention(row, text, places)
        if "text_attention.heads" in needs:
            found["text_attention.heads"] = self.attention(row, text, places, "none")
        if "last_query_attention" in needs:
            found["last_query_attention"] = self.attention(row, last, places)
        if "last_query_attention.previous" in needs and self.previous is not None:  # nothing is before layer 0
            found["last_query_attention.previous"] = self.previous.attention(row, last, places)
        return found

    def attention(self, row: int, queries: Tensor, places: Tensor, reduce: Any = "max") -> Tensor:
        """What the tokens at columns `queries` pay to those at `places`, as `ops.text_attention` reduces it."""
        before = int(self.tokens.past_mask[row].sum())
        return self._paid(row, queries, before + _rank(self.tokens.mask[row])[places], reduce)

    @torch.no_grad()
    def attention_to_cached(self, row: int, columns: Tensor) -> Tensor:
        """[M] what the row's last token pays to those at `columns` [M] of the cache: the mean over heads."""
        last = torch.tensor([self.tokens.length - 1], device=self.tokens.mask.device)
        past = self.tokens.past_mask[row]
        return self._paid(row, last, _rank(past)[columns.to(past.device)], "max")

    def _paid(self, row: int, queries: Tensor, keys: Tensor, reduce: Any) -> Tensor:
        """What the tokens at columns `queries` pay to the real tokens `keys`, those in the cache counted first."""
        mask, past = self.tokens.mask[row], self.tokens.past_mask[row]
        query = self._project("q_proj", row, queries)
        if row not in self._keys:
            key = self._project("k_proj", row, mask.nonzero().squeeze(1))
            cached = cached_keys(self.cache, self.number, len(past))
            if cached is not None:
                key = torch.cat([cached[row].to(key.device)[:, past.to(key.device)], key], 1)
            self._keys[row] = key
        rows = int(past.sum()) + _rank(mask)[queries]
        with full_precision(query.device):
            rows, columns = (places.to(query.device) for places in (rows, keys))
            return ops.text_attention(query, self._keys[row], self.layer.self_attn.scaling, rows, columns, reduce)

    @torch.no_grad()
    def look(self, row: int, places: Tensor, last: Tensor) -> Tensor:
        """[M] what the token at column `last` [1] pays to those at `places` [M], as if there were no others: the mean
        over heads."""
        query, key = self._project("q_proj", row, last), self._project("k_proj", row, places)
        with full_precision(query.device):
            columns = torch.arange(key.shape[1], device=key.device)
            return ops.text_attention(query, key, self.layer.self_attn.scaling, columns[-1:], columns)

    def _project(self, name: str, row: int, columns: Tensor) -> Tensor:
        """[heads, columns, D] queries or keys after the rotary embedding."""
        attention = self.layer.self_attn
        hidden = self.layer.input_layernorm(self.tokens.embeds.detach()[row, columns][None])
        states = getattr(attention, name)(hidden).unflatten(-1, (-1, attention.head_dim))
        norm = getattr(attention, f"{name[0]}_norm", None)
        if norm is not None:
            states = norm(states)
        states = states[0].transpose(0, 1)
        batch = self.tokens.mask.shape[0]
        cos, sin = (t.expand(batch, -1, -1)[row][columns.to(t.device)].to(states.device) for t in self.rotary)
        return rotate(states, cos, sin)


def _rank(mask: Tensor) -> Tensor:
    """Place of a column among the real tokens of a row [n] bool."""
    return mask.long().cumsum(0) - 1


def cached_keys(cache: Any, layer: int, stored: int) -> Tensor | None:
    """The first `stored` keys [B, G, stored, D] of a layer's cache; None if it is empty.

    Raises ValueError for a cache that does not keep its keys as they are (a quantised one).
    """
    if cache is None or not stored:
        return None
    keys = getattr(cache.layers[layer], "keys", None)
    if not torch.is_tensor(keys) or keys.dim() != 4 or keys.shape[2] < stored:
        raise ValueError(
            f"{type(cache).__name__} does not keep the keys of layer {layer} as they are, and this method weighs a new "
            "video by attention that includes earlier turns; use a DynamicCache or StaticCache"
        )
    return keys[:, :, :stored]
