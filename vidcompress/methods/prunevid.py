"""PruneVid, complete (Huang et al., arXiv:2412.16117): merging over time and space, then pruning inside the LLM."""

from __future__ import annotations

from dataclasses import dataclass

from vidcompress.method import DEPTH, Method, setting
from vidcompress.methods.prunevid_inner import PruneVidInner
from vidcompress.methods.prunevid_outer import PruneVidOuter
from vidcompress.tokens import Grid, Reduction, Site, VideoTokens


@dataclass(kw_only=True)
class PruneVid(PruneVidOuter, PruneVidInner):
    needs = PruneVidOuter.needs | PruneVidInner.needs

    retention_ratio: float = setting(0.10, "fraction of the video tokens that enters the LLM", above=0, high=1)
    keep_ratio: float = setting(0.4, "alpha: fraction of these that is kept at layer K", above=0, high=1)

    @property
    def inner_ratio(self) -> float:
        return self.keep_ratio

    def sites(self, depth: int = DEPTH) -> list[Site]:
        return [Site.projector(), *PruneVidInner.sites(self, depth)]

    def count(self, site: Site, grid: Grid, entered: int, before: int) -> int:
        return self._half(site).count(self, site, grid, entered, before)

    def reduce(self, tokens: VideoTokens, site: Site) -> Reduction:
        return self._half(site).reduce(self, tokens, site)

    def _half(self, site: Site) -> type[Method]:
        return PruneVidInner if site.is_inner else PruneVidOuter
