"""FastVID: dynamic density pruning (Shen et al., NeurIPS 2025, arXiv:2503.11187), the LLaVA-OneVision rule.

A video is cut into segments of similar frames. In every frame the most attended tokens stay as they are; the others of
a segment are merged into density-peak anchors in every fourth frame.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from vidcompress.method import Method, floor, setting
from vidcompress.ops import anchor_budgets, anchor_merge, density_peaks, segment_frames, top_tokens
from vidcompress.tokens import Grid, Reduction, Site, VideoTokens


@dataclass(kw_only=True)
class FastVID(Method):
    needs = frozenset({"frame_features", "saliency.head"})
    budget_rule = "frame_floor"

    dyseg_c: int = setting(8, "least number of segments", low=1)
    dyseg_tau: float = setting(0.9, "frames less similar than this are cut apart (cosine)")
    context_share: float = setting(0.4, "d: share of a frame's tokens that are merged context", low=0, high=1)
    anchor_interval: int = setting(4, "p: every p-th frame of a segment, counted from its last, has anchors", low=1)
    beta: float = setting(0.6, "least weight of an anchor's own token when others are merged into it", low=0, high=1)
    neighbours: int = setting(4, "k of the density estimate, the token itself included", low=1)
    remainder: Literal["exact", "official"] = setting(
        "exact", "what does not divide evenly among a segment's anchors is kept, or lost as in the official code"
    )
    dispatch: Literal["official", "length"] = setting(
        "official", "a frame merges within itself if its anchor count equals d's share, or if its segment is one frame"
    )
    density_ties: Literal["index", "strict"] = setting("index", "which of two equally dense tokens counts as denser")
    siglip_head: str | None = setting("auto", "SigLIP checkpoint of the pooling head: folder, file, hub id, auto, none")

    @property
    def exact(self) -> bool:
        return self.remainder == "exact"

    def reduce(self, tokens: VideoTokens, site: Site) -> Reduction:
        t, h, w = tokens.grid
        x, p = tokens.frames, h * w  # [T, P, C]
        # 1. Segments of similar frames (DySeg).
        segments = segment_frames(tokens.signal("frame_features"), self.dyseg_c, self.dyseg_tau)
        # 2. Budgets: salient tokens of every frame, anchors of every anchor frame.
        salient_count, anchor_count = self._budgets(tokens.grid, segments)
        # 3. The most attended tokens of every frame stay unchanged (ATS).
        attention = tokens.signal("saliency.head").view(t, p)
        salient = top_tokens(attention, torch.tensor(salient_count))  # [T, P]
        # 4. Density peaks of the anchor frames (DTM).
        own = [f for f, m in enumerate(anchor_count) if m]
        frames = torch.tensor(own, device=x.device, dtype=torch.long)
        counts = torch.tensor([anchor_count[f] for f in own], device=x.device)
        score = density_peaks(x[frames], ~salient[frames], self.neighbours, self.density_ties)
        anchor = torch.zeros_like(salient)
        anchor[frames] = top_tokens(score, counts)
        # 5. The rest of a segment joins the most similar anchor of each of its anchor frames.
        index = torch.arange(t * p, device=x.device).view(t, p)
        triplets = []
        for start, end in segments:
            together = []
            for f in range(start, end):
                if not anchor_count[f]:
                    continue
                if self._within_frame(anchor_count[f], end - start, p):
                    triplets.append(
                        anchor_merge(tokens.features, index[f][~salient[f]], [index[f][anchor[f]]], self.beta)
                    )
                else:
                    together.append(index[f][anchor[f]])
            if together:
                members = index[start:end][~salient[start:end]]
                triplets.append(anchor_merge(tokens.features, members, together, self.beta))
        keep = index[salient | anchor]
        notes = {"segments": segments, "salient": salient_count, "anchors": anchor_count}
        return Reduction.merging(keep, t * p, triplets, notes)

    def _budgets(self, grid: Grid, segments: list[tuple[int, int]]) -> tuple[list[int], list[int]]:
        """Salient tokens and anchors of every frame."""
        t, p = grid[0], grid[1] * grid[2]
        per_frame, context = self._per_frame(p)
        if self.remainder == "exact":
            lengths = [end - start for start, end in segments]
            return anchor_budgets(segments, p, t * per_frame, per_frame - context, lengths, self.anchor_interval)
        anchors = [0] * t
        for start, end in segments:
            own = [f for f in range(start, end) if (end - 1 - f) % self.anchor_interval == 0]
            for f in own:
                anchors[f] = min(context * (end - start) // len(own), p - per_frame + context)
        return [per_frame - context] * t, anchors

    def _per_frame(self, positions: int) -> tuple[int, int]:
        """Tokens kept of a frame on average, and how many of them are merged context."""
        kept = max(1, floor(self.retention_ratio * positions))
        return kept, floor(kept * self.context_share)

    def _within_frame(self, anchors: int, length: int, positions: int) -> bool:
        """Whether a frame's anchors take only its own tokens."""
        return length == 1 or (self.dispatch == "official" and anchors == self._per_frame(positions)[1])
