"""DivPrune: keep the tokens that are least like each other, over the whole video (Alvar et al., CVPR 2025).

Max-min diversity by cosine distance, greedily: first the token farthest from its nearest other, then always the one
whose nearest kept token is farthest. The code builds all N x N distances. Here no more than a few columns exist at a
time, and the picks are those of fp64; but a pick still depends on a distance to every kept token, which is r * N * N
products of C channels where nothing can be ruled out. On unrelated pictures (`vidcompress bench`, 32 x 196 tokens
of 3584 channels, one thread) about half of them have to be taken, and this costs six to eight times what FastVID does.
It is slowest, up to 20 seconds, where the whole video is nearly still, because fp64 then decides everything.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from vidcompress import ops
from vidcompress.method import Method, setting
from vidcompress.tokens import Grid, Reduction, Site, VideoTokens


@dataclass(kw_only=True)
class DivPrune(Method):
    costly = "half of its r N N distances have to be taken"
    official: bool = setting(False, "the code's count: round(r * N), a half to the even number, where others floor")

    def budget(self, grid: Grid) -> int:
        if not self.official:
            return super().budget(grid)
        total = math.prod(grid)
        return min(total, max(1, round(self.retention_ratio * total)))

    def reduce(self, tokens: VideoTokens, site: Site) -> Reduction:
        _, h, w = tokens.grid
        order = ops.farthest_points(tokens.features, self.budget(tokens.grid), h * w)
        return Reduction(order.sort().values, len(tokens), notes={"order": order})
