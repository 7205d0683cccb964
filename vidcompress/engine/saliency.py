"""Saliency and frame features, taken from the vision tower while it encodes (docs/decisions.md, D6).

`received` is the column mean of the last used layer's attention, `head` the probe attention of SigLIP's pooling head.
Neither asks the tower for its attention matrices: queries and keys are caught on their way, so that the tower keeps its
FlashAttention and no N x N matrix of all heads exists.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from vidcompress.engine.context import ThreadState
from vidcompress.engine.siglip_head import SiglipHead
from vidcompress.ops import column_mean_attention


class TowerSignals:
    """Hooks on the last used layer of a tower. They do nothing outside `recording`, so images pass untouched.

    Args:
        layer: encoder layer with `self_attn.q_proj`, `.k_proj`, `.num_heads` and `.scale`.
        needs: which of `frame_features`, `saliency.head`, `saliency.received` to take.
        head: the pooling head; without it `saliency.head` is `received` and there are no frame features.
        pool: [F, patches] -> [F, P], as the features are pooled.
    """

    def __init__(
        self, layer: Any, needs: frozenset[str], head: SiglipHead | None, pool: Callable[[Tensor], Tensor]
    ) -> None:
        self.layer, self.head, self.pool = layer, head, pool
        self.needs = needs
        self.uses_head = head is not None and bool(needs & {"frame_features", "saliency.head"})
        self.uses_received = "saliency.received" in needs or ("saliency.head" in needs and head is None)
        self._local = ThreadState()
        self._hooks = []
        if self.uses_received:
            self._hooks.append(layer.self_attn.q_proj.register_forward_hook(self._saw_query))
            self._hooks.append(layer.self_attn.k_proj.register_forward_hook(self._saw_key))
        if self.uses_head:
            self._hooks.append(layer.register_forward_hook(self._saw_output))

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    @contextmanager
    def recording(self) -> Iterator[dict[str, Any]]:
        """While the body runs the tower, catch what is needed; the yielded dict is filled when it ends.

        Besides the signals [F, ...] it then holds `seconds`, the time they took.
        """
        found: dict[str, Any] = {}
        self._local.caught = {}
        try:
            yield found
            start = time.perf_counter()
            found |= self._compute(self._local.caught)
            for value in found.values():
                synchronise(value.device)
                break
            found["seconds"] = time.perf_counter() - start
        finally:
            self._local.caught = None

    @torch.no_grad()
    def _compute(self, caught: dict[str, Tensor]) -> dict[str, Tensor]:
        signals = {}
        if self.uses_received:
            attention = self.layer.self_attn
            query, key = (caught[k].unflatten(-1, (attention.num_heads, -1)).transpose(1, 2) for k in ("query", "key"))
            received = self.pool(column_mean_attention(query, key, attention.scale))
            signals["saliency.received"] = received
        if self.uses_head:
            assert self.head is not None
            features, attention = self.head(caught["output"])
            signals |= {"frame_features": features, "saliency.head": self.pool(attention)}
        elif "saliency.head" in self.needs:
            signals["saliency.head"] = received
        return {name: value for name, value in signals.items() if name in self.needs}

    def _catch(self, name: str, value: Any) -> None:
        if self._local.caught is not None:
            self._local.caught[name] = (value[0] if isinstance(value, tuple) else value).detach()

    def _saw_query(self, module: nn.Module, args: Any, output: Any) -> None:
        self._catch("query", output)

    def _saw_key(self, module: nn.Module, args: Any, output: Any) -> None:
        self._catch("key", output)

    def _saw_output(self, module: nn.Module, args: Any, output: Any) -> None:
        self._catch("output", output)


def synchronise(device: torch.device) -> None:
    """Waits for a CUDA device, so that a clock read next is honest."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
