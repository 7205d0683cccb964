"""ToMe, token merging: in rounds, the tokens most like one of their neighbours merge with it (Bolya et al., ICLR 2023).

A round takes every second token of a frame, finds the one most like it among the others, and merges the closest pairs;
a merged token is the mean of all that is in it. ToMe does so inside a vision transformer, on keys; this acts on the
projector's tokens. Frames keep equally many; where fewer tokens than frames are to be kept, the rounds go on over what
is left of the frames. `official` keeps the code's order from round to round, which makes other tokens neighbours.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vidcompress import ops
from vidcompress.method import Method, setting
from vidcompress.tokens import Reduction, Site, VideoTokens


@dataclass(kw_only=True)
class ToMe(Method):
    per_round: int | None = setting(
        None, "r: tokens of a frame that go in a round; null: up to half, all that can", low=1
    )
    official: bool = setting(
        False, "the code's order after a round: tokens that stayed by likeness, then those between"
    )

    def reduce(self, tokens: VideoTokens, site: Site) -> Reduction:
        t, h, w = tokens.grid
        n, p, budget = len(tokens), h * w, self.budget(tokens.grid)
        # 1. Each frame by itself, to its share of the budget.
        shares = ops.apportion(max(budget, t), [1] * t, [p] * t)
        parts = [self._merge(frame.float(), share) for frame, share in zip(tokens.frames, shares, strict=True)]
        keep = torch.cat([f * p + places for f, (_, places, _) in enumerate(parts)])
        joined = torch.cat([f * p + owner for f, (_, _, owner) in enumerate(parts)])  # [N] the survivor a token is in
        # 2. What is left of the frames, where one token a frame is too much.
        if budget < t:
            size = joined.bincount(minlength=n)[keep]
            _, places, owner = self._merge(torch.cat([x for x, _, _ in parts]), budget, size)
            joined, keep = keep[owner].repeat_interleave(p), keep[places]
        # 3. A survivor is the mean of all that is in it.
        weight = 1 / joined.bincount(minlength=n)[joined].float()
        several = (weight < 1).nonzero()[:, 0]
        return Reduction.merging(keep.sort().values, n, [(joined[several], several, weight[several])])

    def _merge(self, x: Tensor, target: int, size: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Rounds until `target` of the tokens [n, C] fp32 are left, which stand for `size` [n] tokens each.

        Returns:
            What is left [k, C], their places [k], and the place of that which every token is in [n].
        """
        places = owner = torch.arange(len(x), device=x.device)
        size = torch.ones_like(x[:, :1]) if size is None else size[:, None].float()
        while len(x) > target:
            count = min(len(x) // 2, len(x) - target, self.per_round or len(x))
            gone, into, stay = ops.bipartite_match(x, count)
            total = (x[1::2] * size[1::2]).index_add_(0, into // 2, x[gone] * size[gone])
            grown = size[1::2].index_add(0, into // 2, size[gone])
            moved = torch.arange(len(owner), device=x.device).index_copy_(0, places[gone], places[into])
            x, size = torch.cat([x[stay], total / grown]), torch.cat([size[stay], grown])
            owner, places = moved[owner], torch.cat([places[stay], places[1::2]])
            if not self.official:
                order = places.argsort()
                x, size, places = x[order], size[order], places[order]
        return x, places, owner
