"""DyCoke, complete (Tao et al., CVPR 2025, arXiv:2411.15024): temporal merging, then pruning of the KV cache."""

from __future__ import annotations

from dataclasses import dataclass

from vidcompress.method import TwoHalves, setting
from vidcompress.methods.dycoke_decoding import DyCokeDecoding
from vidcompress.methods.dycoke_outer import DyCokeOuter


@dataclass(kw_only=True)
class DyCoke(TwoHalves, DyCokeOuter, DyCokeDecoding):
    outer, inner = DyCokeOuter, DyCokeDecoding
    needs = DyCokeOuter.needs | DyCokeDecoding.needs

    retention_ratio: float = setting(
        0.475, "fraction of the video tokens that enters the LLM; the whole frames alone are 1/4", low=0.25, high=1
    )
    keep_ratio: float = setting(0.3, "1 - P: fraction of these that stays in the caches of layer L on", above=0, high=1)
