"""Unified spatiotemporal compression, complete: the retention pool before the LLM, text-aware merging inside it."""

from __future__ import annotations

from dataclasses import dataclass

from vidcompress.method import DEPTH, Method, setting
from vidcompress.methods.text_aware_merge import TextAwareMerge
from vidcompress.methods.unified_pool import UnifiedPool
from vidcompress.tokens import Grid, Reduction, Site, VideoTokens


@dataclass(kw_only=True)
class Unified(UnifiedPool, TextAwareMerge):
    needs = UnifiedPool.needs | TextAwareMerge.needs

    retention_ratio: float = setting(0.10, "fraction of the video tokens that enters the LLM", above=0, high=1)
    keep_ratio: float = setting(0.5, "R: fraction of these that is kept at layer K", above=0, high=1)

    @property
    def inner_ratio(self) -> float:
        return self.keep_ratio

    def sites(self, depth: int = DEPTH) -> list[Site]:
        return [Site.projector(), *TextAwareMerge.sites(self, depth)]

    def count(self, site: Site, grid: Grid, entered: int, before: int) -> int:
        return self._half(site).count(self, site, grid, entered, before)

    def reduce(self, tokens: VideoTokens, site: Site) -> Reduction:
        return self._half(site).reduce(self, tokens, site)

    def _half(self, site: Site) -> type[Method]:
        return TextAwareMerge if site.is_inner else UnifiedPool
