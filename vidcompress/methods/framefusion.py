"""FrameFusion (Fu et al., ICCV 2025, arXiv:2501.01986): merge what repeats while it pays, then prune once.

At the input of layer after layer every token that is like the one before it in place joins it; this ends when few are.
At the next layer the tokens that the prompt's last token attends to least go, so many that the mean over all layers of
what is kept is `retention_ratio`, the code's `cost`. Counts depend on the video, so that `count` is the most they can
be. The code acts behind the attention of a layer, this at the input of the next one. Where merging alone would spend
the budget, there the code stops with an error, this prunes at once.

About twice FastVID's time: likenesses to the token before, in fp64, once for all tokens and again for what is left.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vidcompress import ops
from vidcompress.method import DEPTH, Method, floor, setting
from vidcompress.tokens import Grid, Reduction, Site, VideoTokens

CHUNK = 1024
"""Tokens compared at once."""


@dataclass(kw_only=True)
class FrameFusion(Method):
    needs = frozenset({"last_query_attention.previous"})
    costly = "likenesses of all neighbouring frames, again in every layer that still merges"

    retention_ratio: float = setting(0.3, "cost: mean over all layers of the fraction kept", above=0, high=1)
    similarity: float = setting(0.6, "S: a token joins the one before it if their cosine is at least this")
    least_merged: float = setting(0.1, "merging ends where it takes less than this share of the tokens", low=0, high=1)
    layer: int = setting(0, "where merging begins, counted from 0", low=0)

    @property
    def exact(self) -> bool:
        return False

    def sites(self, depth: int = DEPTH) -> list[Site]:
        if self.layer >= depth:
            raise ValueError(f"framefusion: layer must be below {depth}, the decoder's depth; got {self.layer}")
        return [Site.decoder(layer, stage, depth) for stage, layer in enumerate(range(self.layer, depth))]

    def count(self, site: Site, grid: Grid, entered: int, before: int) -> int:
        # Either every layer so far merged at least its least share, or what is left spends the budget evenly.
        most = max((1 - self.least_merged) ** site.stage, self.retention_ratio)
        return min(before, max(1, math.ceil(most * entered - 1e-9)))

    @property
    def loose(self) -> bool:
        return True

    def rests(self, site: Site, notes: Mapping[str, Any]) -> bool:
        return notes.get("phase") == "done"

    def reduce(self, tokens: VideoTokens, site: Site) -> Reduction:
        n, phase = len(tokens), tokens.notes.get("phase", "merge")
        # 1. What this layer and those behind it may keep together, and which share of the tokens is in excess.
        spent, layers = tokens.notes.get("spent", site.layer * tokens.entered), site.depth - site.layer
        rest = self.retention_ratio * site.depth * tokens.entered - spent
        excess = max(1 - rest / (layers * n), 0.0)
        if phase == "merge":
            # 2. Tokens join the one before them in place: all that are like it, or no more than are in excess.
            order, cosine = _likeness(tokens)
            marked = cosine >= self.similarity
            merged = int(marked.sum())
            if merged >= excess * n:
                merged, phase = floor(excess * n), "done"
                marked = ops.top_tokens(cosine[None], merged)[0]
            elif merged < self.least_merged * n:
                phase = "prune"
            if phase == "done" or site.layer == 0 or n - merged + layers - 1 <= rest:
                return _merged(order, marked, {"phase": phase, "spent": spent + n - merged})
        # 3. Once, what the last token attends to least goes.
        attention = tokens.signal("last_query_attention.previous")
        count = min(n, max(1, round(n * (1 - excess))))
        return Reduction.pruning(ops.top_tokens(attention[None], count)[0], {"phase": "done"})


def _likeness(tokens: VideoTokens) -> tuple[Tensor, Tensor]:
    """([M] tokens by place, then time; [M] fp64 cosine of each to the one before it, -inf for the first of a place)."""
    t, h, w = tokens.grid
    x, index = tokens.features, torch.arange(len(tokens), device=tokens.features.device)
    if len(x) == t * h * w:  # nothing is gone yet: the tokens need not be brought into that order
        change = ops.frame_change(tokens.frames)
        cosine = torch.cat([change.new_full((1, h * w), -torch.inf), 1 - change])
        return index.view(t, -1).T.flatten(), cosine.T.flatten()
    place = (index if tokens.index is None else tokens.index) % (h * w)
    order = place.argsort(stable=True)
    pairs = zip(order[:-1].split(CHUNK), order[1:].split(CHUNK), strict=True)
    parts = [1 - ops.frame_change(torch.stack([x[before], x[after]]))[0] for before, after in pairs]
    cosine = torch.cat([x.new_full((1,), -torch.inf, dtype=torch.float64), *parts])
    cosine[1:][place[order].diff() > 0] = -torch.inf
    return order, cosine


def _merged(order: Tensor, marked: Tensor, notes: dict[str, Any]) -> Reduction:
    """Runs of marked tokens join the token before them, which becomes the plain mean."""
    n = len(order)
    leader = order[(torch.arange(n, device=order.device) * ~marked).cummax(0).values]  # [M]
    weight = 1 / leader.bincount(minlength=n)[leader].float()
    run = weight < 1
    return Reduction.merging(order[~marked].sort().values, n, [(leader[run], order[run], weight[run])], notes)
