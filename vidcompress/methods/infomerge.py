"""InfoMerge: information-aware token compression; static regions by temporal fingerprints, budgets by content.

FastVID's pipeline and three additions: positions that do not change within a segment are not picked again and again
(TFD); segments unlike the rest or rich in themselves get more tokens (CABA), by a spectral entropy for which it takes
fourteen times FastVID's time on a CPU; a static token carries its position's mean. A reconstruction (D14).
"""

from __future__ import annotations

import math
from bisect import bisect_left
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from vidcompress import ops
from vidcompress.method import Method, floor, setting
from vidcompress.ops.table import table
from vidcompress.tokens import Reduction, Site, VideoTokens

Segments = list[tuple[int, int]]

GROUP_FRAMES = 32  # segments that begin within so many are worked on together, in fp32 copies


@dataclass(kw_only=True)
class InfoMerge(Method):
    needs = frozenset({"frame_features", "saliency.head"})
    costly = "the spectral entropy of every segment"

    dyseg_c: int = setting(8, "c: least number of segments", low=1)
    dyseg_tau: float = setting(0.9, "tau: frames less similar than this are cut apart (cosine)")
    context_share: float = setting(0.4, "d: share of the budget that is merged context (eq. 19)", low=0, high=1)
    anchor_interval: int = setting(4, "every so many frames of a segment, counted from its last, has anchors", low=1)
    beta_merge: float = setting(0.6, "least weight of an anchor's own token (eq. 34)", low=0, high=1)
    neighbours: int = setting(4, "k of the density estimate (eq. 31), the token itself included", low=1)
    static_ratio: float = setting(0.10, "rho: share of a segment's positions called static", low=0, high=1)
    temperature: float = setting(1.2, "slope of the sigmoid that turns scores into budgets (eq. 28)", low=0)
    penalty_strength: float = setting(12.0, "lambda: suppression of static positions picked before (eq. 10)", low=0)
    uniqueness_weight: float = setting(0.9, "alpha: weight of a segment's uniqueness", low=0)
    richness_weight: float = setting(0.1, "beta: weight of a segment's spectral entropy", low=0)
    global_mean: Literal["segment", "token"] = setting("segment", "the video's mean: of segment means, or of tokens")
    penalty: Literal["exp", "subtract", "divide"] = setting("exp", "a * exp(-lambda), a - lambda or a / (1 + lambda)")
    tfd: bool = setting(True, "find static positions at all (Table 4's ablation)")
    fingerprint: Literal["second_order", "first_order"] = setting("second_order", "TFD, or Table 5's adjacent change")
    eps: float = setting(1e-6, "a score whose standard deviation is below this counts as constant", low=0)
    density_ties: Literal["index", "strict"] = setting("index", "which of two equally dense tokens counts as denser")
    siglip_head: str | None = setting("auto", "SigLIP checkpoint of the pooling head: folder, file, hub id, auto, none")

    def reduce(self, tokens: VideoTokens, site: Site) -> Reduction:
        t, h, w = tokens.grid
        x, p = tokens.frames, h * w  # [T, P, C]
        # 1. Segments (eq. 22-23).
        segments = ops.segment_frames(tokens.signal("frame_features"), self.dyseg_c, self.dyseg_tau)
        # 2. Static positions of every segment: the smallest fingerprint differences (eq. 1-2).
        static = self._static_positions(x, segments)  # [K, P]
        # 3. Content-aware budgets (eq. 3-9, 18-21, 24-28).
        weights, budget = self._segment_weights(x, segments), self.budget(tokens.grid)
        salient = floor((1 - self.context_share) * budget / t)
        picks, anchors = ops.anchor_budgets(segments, p, budget, salient, weights.tolist(), self.anchor_interval)
        # 4. Selection by attention with penalty; a picked static position takes its segment's mean (eq. 10-11, 29-30).
        attention, count = tokens.signal("saliency.head").view(t, p), torch.tensor(picks)
        picked, replaced = ops.select_in_turn(attention, self._penalty(), segments, static, count)  # [T, P] each
        # 5. Density-peak anchors, static positions once a segment (eq. 12, 31-33), and merging into them (eq. 34).
        anchor, free, parts = torch.zeros_like(picked), ~picked, []
        for _, several in groupby(segments, lambda span: span[0] // GROUP_FRAMES):
            start, end = (group := [*several])[0][0], group[-1][1]
            spans = [(a - start, b - start) for a, b in group]
            k, counts, left = segments.index(group[0]), anchors[start:end], [p - n for n in picks[start:end]]
            seen = ops.with_means(x[start:end], replaced[start:end], spans)  # [L, P, C]
            own = [f for f, count in enumerate(counts) if count]
            frames, rows = table(own, x.device), [(bisect_left(own, a), bisect_left(own, b)) for a, b in spans]
            score = ops.density_peaks(seen[frames], free[start:end][frames], self.neighbours, self.density_ties)
            many = torch.tensor([counts[f] for f in own])
            chosen, _ = ops.select_in_turn(score, None, rows, static[k : k + len(group)], many)
            peaks = anchor[start:end].index_copy_(0, frames, chosen)
            reach = [span for span in spans for _ in range(*span)]
            merged = ops.anchor_merge(seen, free[start:end], peaks, counts, reach, self.beta_merge, member_counts=left)
            parts.append((merged[0] + start * p, merged[1] + start * p, merged[2]) if start else merged)
        # 6. Everything that was kept, in temporal order; what stands for a position's mean is said of the tokens.
        keep = ops.places(picked | anchor, [a + b for a, b in zip(picks, anchors, strict=True)])
        unmerged = ops.places(picked, picks)
        one = torch.ones(len(unmerged), dtype=torch.float32, device=x.device)
        notes = {"segments": segments, "weights": weights, "salient": picks, "anchors": anchors}
        kept = Reduction.merging(keep, t * p, [(unmerged, unmerged, one), *parts], notes)
        return kept.through_means(len(unmerged), replaced, segments)

    def _static_positions(self, x: Tensor, segments: Segments) -> Tensor:
        """[K, P] bool; none in a segment of one frame, where nothing can repeat."""
        if not self.tfd:
            return torch.zeros(len(segments), x.shape[1], dtype=torch.bool, device=x.device)
        if self.fingerprint == "second_order":
            differs = ops.cosine_fingerprints(x, segments)
        else:
            differs = torch.stack([ops.adjacent_difference(x[start:end]) for start, end in segments])
        count = floor(self.static_ratio * x.shape[1])
        return ops.top_tokens(differs, torch.tensor([count * (b - a > 1) for a, b in segments]), lowest=True)

    def _segment_weights(self, x: Tensor, segments: Segments) -> Tensor:
        """[K] fp64: length times sigmoid of temperature times score; the score mixes uniqueness and richness."""
        total = x.sum(1, dtype=torch.float64).flatten()  # [T * C]
        rich = ops.spectral_entropies(x, segments) if self.richness_weight else total[:0]
        # The host does the rest, which it has to wait for.
        total, rich = torch.cat([total, rich]).cpu().split([len(total), len(rich)])
        frames = total.view(len(x), -1).split([end - start for start, end in segments])
        length = torch.tensor([len(own) for own in frames], dtype=torch.float64)
        mean = torch.stack([own.sum(0) for own in frames]) / (length * x.shape[1])[:, None]  # [K, C]
        share = length / length.sum() if self.global_mean == "token" else torch.full_like(length, 1 / len(segments))
        unique = 1 - cosine_similarity(mean, share @ mean, dim=-1, eps=1e-30)
        score = self.uniqueness_weight * ops.standardise(unique, self.eps)
        if len(rich):
            score = score + self.richness_weight * ops.standardise(rich, self.eps)
        return length * torch.sigmoid(self.temperature * score)

    def _penalty(self) -> tuple[float, float]:
        """What attention to a static position picked before is multiplied by, and what is taken from it."""
        if self.penalty == "exp":
            return math.exp(-self.penalty_strength), 0.0
        return (1.0, self.penalty_strength) if self.penalty == "subtract" else (1 / (1 + self.penalty_strength), 0.0)
