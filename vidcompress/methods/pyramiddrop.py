"""PyramidDrop: drop tokens in stages; at each, keep those that the last token of the prompt attends to."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Literal

from vidcompress import ops
from vidcompress.method import DEPTH, Method, decay_for, floor, setting
from vidcompress.tokens import Grid, Reduction, Site, VideoTokens


@dataclass(kw_only=True)
class PyramidDrop(Method):
    needs = frozenset({"last_query_attention"})

    retention_ratio: float = setting(
        0.46875, "mean fraction kept over four quarters of all layers; the first keeps all", low=0.25, high=1
    )
    positions: Literal["keep", "renumber"] = setting("renumber", "survivors are numbered anew after every stage")
    layers: tuple[int, ...] | None = setting(None, "where it drops, ascending; null: after each quarter of them", low=0)
    ratios: tuple[float, ...] | None = setting(
        None, "kept at each, of what entered the LLM; null: q, q^2, q^3 that give retention_ratio", above=0, high=1
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        layers, ratios = self.layers or (), self.ratios or ()
        if any(b <= a for a, b in itertools.pairwise(layers)):
            raise ValueError(f"pyramiddrop: layers must be ascending, got {list(layers)}")
        if any(b > a for a, b in itertools.pairwise(ratios)):
            raise ValueError(f"pyramiddrop: ratios are of the tokens that entered, so descending; got {list(ratios)}")
        wanted = len(layers) or 3
        if wanted != len(self._ratios()):
            raise ValueError(f"pyramiddrop: {wanted} layers need as many ratios, got {len(self._ratios())}; give both")
        if ratios and not layers:  # then it is what they make it
            self.retention_ratio = (1 + sum(ratios)) / 4

    def sites(self, depth: int = DEPTH) -> list[Site]:
        if depth < 4 and self.layers is None:
            raise ValueError(f"pyramiddrop has four stages of decoder layers, this decoder has {depth}; give `layers`")
        layers = [depth // 4, depth // 2, 3 * depth // 4] if self.layers is None else self.layers
        return [Site.decoder(layer, stage) for stage, layer in enumerate(layers)]

    def count(self, site: Site, grid: Grid, entered: int, before: int) -> int:
        return min(before, max(1, floor(self._ratios()[site.stage] * entered)))

    def reduce(self, tokens: VideoTokens, site: Site) -> Reduction:
        attention = tokens.signal("last_query_attention")  # of this layer's own projections, the mean over its heads
        return Reduction.pruning(ops.top_tokens(attention[None], self.wanted(tokens, site))[0])

    def _ratios(self) -> tuple[float, ...]:
        q = decay_for(self.retention_ratio)
        return (q, q**2, q**3) if self.ratios is None else self.ratios
