"""PruneVid, complete (Huang et al., arXiv:2412.16117): merging over time and space, then pruning inside the LLM."""

from __future__ import annotations

from dataclasses import dataclass

from vidcompress.method import TwoHalves, setting
from vidcompress.methods.prunevid_inner import PruneVidInner
from vidcompress.methods.prunevid_outer import PruneVidOuter


@dataclass(kw_only=True)
class PruneVid(TwoHalves, PruneVidOuter, PruneVidInner):
    outer, inner = PruneVidOuter, PruneVidInner
    needs = PruneVidOuter.needs | PruneVidInner.needs

    retention_ratio: float = setting(0.10, "fraction of the video tokens that enters the LLM", above=0, high=1)
    keep_ratio: float = setting(0.4, "alpha: fraction of these that is kept at layer K", above=0, high=1)
