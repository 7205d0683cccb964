"""VisionZip: the most attended tokens stay, the others are merged into evenly spaced ones (Yang et al., CVPR 2025).

The form for videos: every frame by itself, by the attention that its tokens receive in the last layer of the tower and
the keys of that layer. On Qwen's models, as in the code for them, the video is taken as a whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from vidcompress import ops
from vidcompress.method import Method, floor, setting
from vidcompress.tokens import Reduction, Site, VideoTokens


@dataclass(kw_only=True)
class VisionZip(Method):
    needs = frozenset({"saliency.received", "tower_keys"})

    dominant_share: float = setting(
        0.84375, "share of the budget that is dominant tokens, the rest is contextual", low=0, high=1
    )
    scope: Literal["auto", "frame", "video"] = setting(
        "auto", "tokens compete within their frame, or within the whole video; auto: on Qwen's models the video"
    )
    official: bool = setting(False, "a frame's dominant tokens change places as in the code for LLaVA-Video's grid")

    def on(self, model_type: str) -> VisionZip:
        takes_all = self.scope == "auto" and model_type.startswith("qwen")
        return replace(self, scope="video") if takes_all else self

    def shares(self, tokens: VideoTokens, parts: int) -> list[int]:
        """Tokens kept of every frame, or of the whole video."""
        return ops.even_shares(self.budget(tokens.grid), parts)

    def reduce(self, tokens: VideoTokens, site: Site) -> Reduction:
        n, parts = len(tokens), 1 if self.scope == "video" else tokens.grid[0]
        received, keys = tokens.signal("saliency.received"), tokens.signal("tower_keys")
        index = torch.arange(n, device=received.device).view(parts, -1)
        counts = self.shares(tokens, parts)
        # 1. Dominant: the tokens that receive most attention stay as they are.
        dominant_counts = [floor(count * self.dominant_share) for count in counts]
        dominant = ops.top_tokens(received.view(parts, -1), torch.tensor(dominant_counts))
        # 2. Contextual: of the others, tokens at even steps are targets, and the rest join the one of most alike keys.
        kept, triplets = dominant.flatten().clone(), []
        for part, chosen, count, most in zip(index, dominant, counts, dominant_counts, strict=True):
            target, joined, member = _contextual(part[~chosen], keys, count - most)
            # 3. A target with members becomes the sum of itself and their mean.
            size = joined.bincount(minlength=n)
            grown = size.nonzero().squeeze(1)
            triplets += [(grown, grown, torch.ones_like(grown, dtype=torch.float32))]
            triplets += [(joined, member, 1 / size[joined].float())]
            kept[target] = True
        if self.official:
            triplets += _changed_places(index, dominant, received)
        contextual_counts = [count - most for count, most in zip(counts, dominant_counts, strict=True)]
        notes = {"dominant": dominant_counts, "contextual": contextual_counts}
        return Reduction.merging(kept.nonzero().squeeze(1), n, triplets, notes)


def _contextual(rest: Tensor, keys: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """`count` targets among the tokens `rest`; which target each of the others joins; and these others."""
    if not count:
        return rest[:0], rest[:0], rest[:0]
    step = max(1, len(rest) // count)
    is_target = torch.zeros_like(rest, dtype=torch.bool)
    is_target[: step * count : step] = True
    target, member = rest[is_target], rest[~is_target]
    return target, target[ops.nearest(keys[member], keys[target], "cosine")], member


def _changed_places(index: Tensor, dominant: Tensor, received: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """The code takes a frame's dominant tokens by place, and their places by attention."""
    for part, chosen in zip(index, dominant, strict=True):
        own = part[chosen]
        places = own[received[own].argsort(descending=True, stable=True)]
        yield places, own, torch.ones_like(own, dtype=torch.float32)
