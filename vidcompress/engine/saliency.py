"""Saliency, keys and frame features, taken from the vision tower while it encodes (docs/decisions.md, D6).

The tower is never asked for its attention matrices: queries and keys are caught on their way, so that it keeps its
FlashAttention and no N x N matrix of all heads exists.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from vidcompress.engine.context import ThreadState
from vidcompress.engine.siglip_head import SiglipHead
from vidcompress.ops import column_mean_attention
from vidcompress.precision import full_precision


class TowerSignals:
    """Hooks on the layers of a tower. They do nothing outside `recording`, so images pass untouched.

    They stay on, whatever method is in force, until `remove`: torch modules cannot be given or relieved of hooks while
    another thread calls them. A subclass says which modules of a layer to watch, and what follows from what was caught.

    Args:
        layers: encoder layers.
    """

    def __init__(self, layers: Any) -> None:
        self.layers = layers
        self._local = ThreadState()
        self._hooks = []
        for i, layer in enumerate(layers):
            for name, module in self.watched(layer).items():
                saw = functools.partial(self._saw, i, name)
                self._hooks.append(module.register_forward_hook(saw, with_kwargs=True))

    def watched(self, layer: Any) -> Mapping[str, nn.Module]:
        """Modules of a layer that may be of interest, by a name."""
        raise NotImplementedError

    def wanted(self, needs: frozenset[str], head: SiglipHead | None) -> frozenset[str]:
        """Which of these modules the signals `needs` follow from; none if the tower has nothing to do with them."""
        raise NotImplementedError

    def caught(self, name: str, kwargs: Mapping[str, Any], output: Any) -> Any:
        """What to remember of a watched module's call. The default is its output."""
        return (output[0] if isinstance(output, tuple) else output).detach()

    def compute(
        self, layer: Any, caught: Mapping[str, Any], needs: frozenset[str], head: SiglipHead | None
    ) -> dict[str, Tensor]:
        """The signals [F, ...] that follow from what was caught of `layer`."""
        raise NotImplementedError

    def remove(self) -> None:
        """Takes the hooks off."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    @contextmanager
    def recording(
        self, layer: int, needs: frozenset[str], head: SiglipHead | None, timed: bool
    ) -> Iterator[dict[str, Any]]:
        """While the body runs the tower, catch what is needed of layer `layer`; the yielded dict is filled at its end.

        Besides the signals [F, ...] it then holds `seconds`, the time they took, if `timed`.

        Args:
            layer: index of the layer to look at.
            needs: which of `frame_features`, `saliency.head`, `saliency.received`, `tower_keys` to take.
            head: pooling head of a SigLIP, if there is one.
        """
        found: dict[str, Any] = {}
        self._local.layer, self._local.wanted, self._local.caught = layer, self.wanted(needs, head), {}
        try:
            yield found
            start = time.perf_counter() if timed else 0.0
            with torch.no_grad():
                signals = self.compute(self.layers[layer], self._local.caught, needs, head)
            found |= {name: value for name, value in signals.items() if name in needs}
            if timed:
                for device in {value.device for value in found.values()}:
                    synchronise(device)
                found["seconds"] = time.perf_counter() - start
        finally:
            self._local.layer = self._local.wanted = self._local.caught = None

    @torch.compiler.disable
    def _saw(self, layer: int, name: str, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        if self._local.layer == layer and name in self._local.wanted:
            self._local.caught[name] = self.caught(name, kwargs, output)


class SiglipSignals(TowerSignals):
    """Of a SigLIP tower: `received` is the column mean of a layer's attention, `head` the pooling head's probe.

    Without a head `saliency.head` is `received`, and there are no frame features. `tower_keys` are the means over the
    heads of the same layer's keys.

    Args:
        layers: encoder layers with `self_attn.q_proj`, `.k_proj`, `.num_heads` and `.scale`.
        pool: [F, patches] -> [F, P], as the features are pooled.
    """

    def __init__(self, layers: Any, pool: Callable[[Tensor], Tensor]) -> None:
        self.pool = pool
        super().__init__(layers)

    def watched(self, layer: Any) -> Mapping[str, nn.Module]:
        return {"output": layer, "query": layer.self_attn.q_proj, "key": layer.self_attn.k_proj}

    def wanted(self, needs: frozenset[str], head: SiglipHead | None) -> frozenset[str]:
        uses_head = head is not None and bool(needs & {"frame_features", "saliency.head"})
        uses_received = "saliency.received" in needs or ("saliency.head" in needs and head is None)
        uses_keys = uses_received or "tower_keys" in needs
        return frozenset(["output"] * uses_head + ["query"] * uses_received + ["key"] * uses_keys)

    def compute(
        self, layer: Any, caught: Mapping[str, Any], needs: frozenset[str], head: SiglipHead | None
    ) -> dict[str, Tensor]:
        signals, attention = {}, layer.self_attn
        heads = {name: caught[name].unflatten(-1, (attention.num_heads, -1)) for name in caught if name != "output"}
        if "query" in heads:
            query, key = (heads[name].transpose(1, 2) for name in ("query", "key"))  # [F, H, patches, D]
            with full_precision(query.device):
                received = self.pool(column_mean_attention(query, key, attention.scale))
            signals = {"saliency.received": received, "saliency.head": received}
        if "tower_keys" in needs:
            keys = heads["key"].float().mean(2).transpose(1, 2)  # [F, D, patches]
            with full_precision(keys.device):
                pooled = self.pool(keys.flatten(0, 1))  # each channel by itself, as if it were a score
            signals["tower_keys"] = pooled.unflatten(0, keys.shape[:2]).transpose(1, 2)
        if "output" in caught:
            assert head is not None
            features, probe = head(caught["output"])
            with full_precision(probe.device):
                signals |= {"frame_features": features, "saliency.head": self.pool(probe)}
        return signals


class MergedPatchSignals(TowerSignals):
    """Of the vision transformers of Qwen, whose patches are merged, m x m at a time, into one token.

    `received` is the column mean of a layer's attention within each frame, the mean over a token's patches. `head` is
    FastVID's rule for towers without a pooling head: the attention that the mean of a frame's queries pays to the mean
    of each token's keys. `tower_keys` are the means of the same layer's keys over the heads and a token's patches, as
    they are before rotation: what a token shows, not where.

    Args:
        layers: blocks with `attn.qkv`, `attn.num_heads` and `attn.scaling`, called with `cu_seqlens` (one sequence a
            frame) and `position_embeddings`.
        patches: m * m, how many patches in a row become a token.
    """

    def __init__(self, layers: Any, patches: int) -> None:
        self.patches = patches
        super().__init__(layers)

    def watched(self, layer: Any) -> Mapping[str, nn.Module]:
        return {"qkv": layer.attn.qkv, "call": layer.attn}

    def wanted(self, needs: frozenset[str], head: SiglipHead | None) -> frozenset[str]:
        uses_attention = bool(needs & {"saliency.head", "saliency.received"})
        uses_keys = uses_attention or "tower_keys" in needs  # frame features are the means of the frames' tokens
        return frozenset(["call"] * uses_attention + ["qkv"] * uses_keys)

    def caught(self, name: str, kwargs: Mapping[str, Any], output: Any) -> Any:
        if name == "call":
            return kwargs["cu_seqlens"], kwargs["position_embeddings"]
        return super().caught(name, kwargs, output)

    def compute(
        self, layer: Any, caught: Mapping[str, Any], needs: frozenset[str], head: SiglipHead | None
    ) -> dict[str, Tensor]:
        query, key, _ = caught["qkv"].unflatten(-1, (3, layer.attn.num_heads, -1)).unbind(-3)  # [patches, H, D]
        signals = {}
        if "tower_keys" in needs:
            signals["tower_keys"] = key.float().mean(1).unflatten(0, (-1, self.patches)).mean(1)
        if "call" in caught:
            signals |= self._saliency(layer, query, key, caught["call"], needs)
        return signals

    def _saliency(
        self, layer: Any, query: Tensor, key: Tensor, call: tuple[Tensor, tuple[Tensor, Tensor]], needs: frozenset[str]
    ) -> dict[str, Tensor]:
        """`saliency.received` and `saliency.head` [M], from [patches, H, D] before rotation."""
        ends, (cos, sin) = call
        query, key = (rotate(x.float(), cos.float()[:, None], sin.float()[:, None]).to(x.dtype) for x in (query, key))
        parts: dict[str, list[Tensor]] = {"saliency.received": [], "saliency.head": []}
        first = 0
        lengths = ends.diff()
        for length, frames in zip(*(x.tolist() for x in lengths.unique_consecutive(return_counts=True)), strict=True):
            here = slice(first, first := first + length * frames)
            q, k = (x[here].unflatten(0, (frames, length)).transpose(1, 2) for x in (query, key))  # [F, H, n, D]
            with full_precision(q.device):
                if "saliency.received" in needs:
                    received = column_mean_attention(q, k, layer.attn.scaling)
                    parts["saliency.received"].append(received.unflatten(1, (-1, self.patches)).mean(2).flatten())
                if "saliency.head" in needs:
                    parts["saliency.head"].append(pseudo_query(q, k, layer.attn.scaling, self.patches).flatten())
        return {name: torch.cat(values) for name, values in parts.items() if values}


def pseudo_query(query: Tensor, key: Tensor, scale: float, patches: int) -> Tensor:
    """FastVID's rule for towers without a pooling head: what the mean of a frame's queries pays to each token's keys.

    Args:
        query, key: [F, H, n, D] of every frame's patches, after rotation.
        scale: of the attention's logits.
        patches: how many patches in a row become a token, whose keys are averaged.

    Returns:
        [F, P] in fp32, P = n / patches, each row summing to 1; the mean over the heads.
    """
    mean, merged = query.float().mean(2), key.float().unflatten(2, (-1, patches)).mean(3)
    return ((merged @ mean[..., None])[..., 0] * scale).softmax(-1).mean(1)


def mean_tokens(features: Tensor, frames: int) -> Tensor:
    """[frames, C] fp32 means of each frame's tokens, of [M, C]: FastVID's frame features without a pooling head."""
    return features.detach().unflatten(0, (frames, -1)).float().mean(1)


def rotate(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of [..., D] by tables that broadcast to it, halves rotated into each other."""
    half = states.shape[-1] // 2
    return states * cos + torch.cat([-states[..., half:], states[..., :half]], -1) * sin


def synchronise(device: torch.device) -> None:
    """Waits for a CUDA device, so that a clock read next is honest."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
