"""LLaVA-PruMerge: keep what attention singles out, and add to it what it is most like (Shang et al., ICCV 2025).

For videos every frame by itself, at a fixed ratio or with as many tokens as its attention has outliers (`adaptive`).
One token more stands for all that goes: it takes the place of the last of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from vidcompress import ops
from vidcompress.method import Method, setting
from vidcompress.tokens import Reduction, Site, VideoTokens


@dataclass(kw_only=True)
class PruMerge(Method):
    needs = frozenset({"saliency.received", "tower_keys"})

    adaptive: bool = setting(False, "keep the outliers of each frame's attention; retention_ratio is then the most")
    neighbours: int = setting(32, "k: how many tokens of most alike keys are added to a kept one", low=0)
    official: bool = setting(False, "outliers are counted, and steps taken, with the rounding of the code")

    @property
    def exact(self) -> bool:
        return not self.adaptive

    def shares(self, tokens: VideoTokens, parts: int) -> list[int]:
        """Tokens kept of every frame."""
        return ops.even_shares(self.budget(tokens.grid), parts)

    def reduce(self, tokens: VideoTokens, site: Site) -> Reduction:
        t, h, w = tokens.grid
        p = h * w
        attention = tokens.signal("saliency.received").double().view(t, p)
        keys = tokens.signal("tower_keys").view(t, p, -1)
        index = torch.arange(t * p, device=attention.device).view(t, p)
        # 1. Choose tokens by attention. One of a frame's is to stand for the rest, if it has two and there is a rest.
        counts = self.shares(tokens, t)
        chosen = self.choose(attention, [count - (1 < count < p) for count in counts])
        kept, triplets = chosen.clone(), []
        for f, (own, count) in enumerate(zip(chosen, counts, strict=True)):
            # 2. To each the tokens of most alike keys are added, as much of each as it is attended to.
            place = own.nonzero().squeeze(1)
            near = _most_alike(keys[f], place, min(self.neighbours, p - 1))  # [K, k]
            source = torch.cat([place, near.flatten()])
            weight = torch.cat([torch.ones_like(attention[f, place]), attention[f, near].flatten()])
            survivor = torch.cat([place, place.repeat_interleave(near.shape[1])])
            triplets.append((index[f, survivor], index[f, source], weight.float()))
            # 3. One more is the sum of all others, again as much of each as it is attended to.
            if len(place) < min(count, p):
                rest = (~own).nonzero().squeeze(1)
                kept[f, rest[-1]] = True
                triplets.append((index[f, rest[-1:]].expand_as(rest), index[f, rest], attention[f, rest].float()))
        return Reduction.merging(index[kept], t * p, triplets, {"chosen": chosen.sum(1)})

    def choose(self, attention: Tensor, most: list[int]) -> Tensor:
        """[T, P] bool: the most attended tokens of every frame.

        Args:
            attention: [T, P] fp64.
            most: how many every frame keeps; if `adaptive` at most.
        """
        counts = torch.tensor(most)
        if self.adaptive:
            counts = torch.tensor(self.outliers(attention)).minimum(counts)
        return ops.top_tokens(attention, counts)

    def outliers(self, attention: Tensor) -> list[int]:
        """How many tokens of every frame are attended to far more than most: above Q3 + 1.5 (Q3 - Q1)."""
        q1, q3 = attention.quantile(torch.tensor([0.25, 0.75]).to(attention), dim=1)
        counts = (attention > (q3 + 1.5 * (q3 - q1))[:, None]).sum(1).tolist()
        p = attention.shape[1]
        return [int(p * (count / p)) for count in counts] if self.official else counts


def _most_alike(keys: Tensor, place: Tensor, count: int) -> Tensor:
    """[K, count] places of the keys [P, D] that are most like those at `place`, themselves excluded."""
    keys = normalize(keys.double(), dim=-1, eps=1e-300)
    # Rounded, so that equal keys tie however the product was summed; then the lowest index wins.
    cosine = (keys[place] @ keys.T).round(decimals=12)
    cosine.scatter_(1, place[:, None], -torch.inf)
    return cosine.argsort(dim=1, descending=True, stable=True)[:, :count]
