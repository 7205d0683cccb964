"""HoliTom, complete (Shao et al., NeurIPS 2025, arXiv:2505.21334): merging over time and space, then inside the LLM."""

from __future__ import annotations

from dataclasses import dataclass

from vidcompress.method import TwoHalves, setting
from vidcompress.methods.holitom_inner import HoliTomInner
from vidcompress.methods.holitom_outer import HoliTomOuter


@dataclass(kw_only=True)
class HoliTom(TwoHalves, HoliTomOuter, HoliTomInner):
    outer, inner = HoliTomOuter, HoliTomInner
    needs = HoliTomOuter.needs | HoliTomInner.needs

    retention_ratio: float = setting(0.10, "fraction of the video tokens that enters the LLM", above=0, high=1)
    keep_ratio: float = setting(0.5, "1 - r: fraction of these that is kept at layer K", above=0, high=1)
