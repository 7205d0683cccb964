"""Unified spatiotemporal compression, complete: the retention pool before the LLM, text-aware merging inside it."""

from __future__ import annotations

from dataclasses import dataclass

from vidcompress.method import TwoHalves, setting
from vidcompress.methods.text_aware_merge import TextAwareMerge
from vidcompress.methods.unified_pool import UnifiedPool


@dataclass(kw_only=True)
class Unified(TwoHalves, UnifiedPool, TextAwareMerge):
    outer, inner = UnifiedPool, TextAwareMerge
    needs = UnifiedPool.needs | TextAwareMerge.needs

    retention_ratio: float = setting(0.10, "fraction of the video tokens that enters the LLM", above=0, high=1)
    keep_ratio: float = setting(0.5, "R: fraction of these that is kept at layer K", above=0, high=1)
