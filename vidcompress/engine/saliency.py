"""Saliency and frame features, taken from the vision tower while it encodes (docs/decisions.md, D6).

`received` is the column mean of the last used layer's attention, `head` the probe attention of SigLIP's pooling head.
Neither asks the tower for its attention matrices: queries and keys are caught on their way, so that the tower keeps its
FlashAttention and no N x N matrix of all heads exists.
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from vidcompress.engine.context import ThreadState
from vidcompress.engine.siglip_head import SiglipHead
from vidcompress.ops import column_mean_attention
from vidcompress.precision import full_precision

_lock = threading.Lock()  # of this module, not of an object: models with hooks are copied and pickled


class TowerSignals:
    """Hooks on the layers of a tower. They do nothing outside `recording`, so images pass untouched.

    Args:
        layers: encoder layers with `self_attn.q_proj`, `.k_proj`, `.num_heads` and `.scale`.
        needs: which of `frame_features`, `saliency.head`, `saliency.received` to take.
        head: the pooling head; without it `saliency.head` is `received` and there are no frame features.
        pool: [F, patches] -> [F, P], as the features are pooled.
    """

    def __init__(
        self, layers: Any, needs: frozenset[str], head: SiglipHead | None, pool: Callable[[Tensor], Tensor]
    ) -> None:
        self.layers, self.needs, self.head, self.pool = layers, needs, head, pool
        uses_head = head is not None and bool(needs & {"frame_features", "saliency.head"})
        self.uses_received = "saliency.received" in needs or ("saliency.head" in needs and head is None)
        self._local = ThreadState()
        self._users, self._retired = 0, False
        self._hooks = []
        for i, layer in enumerate(layers):
            watched = {"output": layer} if uses_head else {}
            if self.uses_received:
                watched |= {"query": layer.self_attn.q_proj, "key": layer.self_attn.k_proj}
            for name, module in watched.items():
                self._hooks.append(module.register_forward_hook(functools.partial(self._saw, i, name)))

    def remove(self) -> None:
        """Takes the hooks off, once no thread records any more."""
        with _lock:
            self._retired = True
            self._take_off()

    def acquire(self) -> bool:
        """Keeps the hooks on for one recording to come; False if they were removed."""
        with _lock:
            self._users += not self._retired
            return not self._retired

    def _take_off(self) -> None:
        if self._retired and not self._users:
            for hook in self._hooks:
                hook.remove()
            self._hooks.clear()

    @contextmanager
    def recording(self, layer: int, timed: bool) -> Iterator[dict[str, Any]]:
        """While the body runs the tower, catch what is needed of layer `layer`; the yielded dict is filled at its end.

        Besides the signals [F, ...] it then holds `seconds`, the time they took, if `timed`. `acquire` comes before it.
        """
        found: dict[str, Any] = {}
        self._local.layer, self._local.caught = layer, {}
        try:
            yield found
            start = time.perf_counter() if timed else 0.0
            found |= self._compute(self.layers[layer], self._local.caught)
            if timed:
                for device in {value.device for value in found.values()}:
                    synchronise(device)
                found["seconds"] = time.perf_counter() - start
        finally:
            self._local.layer = self._local.caught = None
            with _lock:
                self._users -= 1
                self._take_off()

    @torch.no_grad()
    def _compute(self, layer: Any, caught: dict[str, Tensor]) -> dict[str, Tensor]:
        signals = {}
        if self.uses_received:
            attention = layer.self_attn
            query, key = (caught[k].unflatten(-1, (attention.num_heads, -1)).transpose(1, 2) for k in ("query", "key"))
            with full_precision(query.device):
                received = self.pool(column_mean_attention(query, key, attention.scale))
            signals = {"saliency.received": received, "saliency.head": received}
        if "output" in caught:
            assert self.head is not None
            features, probe = self.head(caught["output"])
            with full_precision(probe.device):
                signals |= {"frame_features": features, "saliency.head": self.pool(probe)}
        return {name: value for name, value in signals.items() if name in self.needs}

    def _saw(self, layer: int, name: str, module: nn.Module, args: Any, output: Any) -> None:
        if self._local.layer == layer:
            self._local.caught[name] = (output[0] if isinstance(output, tuple) else output).detach()


def synchronise(device: torch.device) -> None:
    """Waits for a CUDA device, so that a clock read next is honest."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
