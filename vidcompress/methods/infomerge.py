"""InfoMerge: information-aware token compression; static regions by temporal fingerprints, budgets by content.

FastVID's pipeline with three additions: positions that do not change within a segment are not picked again and again
(TFD); segments that are unlike the rest or rich in themselves get more tokens (CABA); a picked static token carries the
mean of its position over the segment. A reconstruction: docs/decisions.md, D14, says from what.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from vidcompress import ops
from vidcompress.method import Method, floor, setting
from vidcompress.tokens import Reduction, Site, VideoTokens

Segments = list[tuple[int, int]]


@dataclass(kw_only=True)
class InfoMerge(Method):
    needs = frozenset({"frame_features", "saliency.head"})

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
        attention = tokens.signal("saliency.head").view(t, p).double()
        picked, replaced = self._select_salient(attention, segments, static, torch.tensor(picks))  # [T, P] each
        # 5. Density-peak anchors, static positions once a segment (eq. 12, 31-33), and merging into them (eq. 34).
        index = torch.arange(t * p, device=x.device).view(t, p)
        anchor = torch.zeros_like(picked)
        parts = []
        for k, (start, end) in enumerate(segments):
            seen = x[start:end].float()
            seen = torch.where(replaced[start:end, :, None], seen.mean(0), seen)  # [L, P, C]
            own = [f - start for f in range(start, end) if anchors[f]]
            free = ~picked[start:end]
            score = ops.density_peaks(seen[own], free[own], self.neighbours, self.density_ties)
            chosen = anchor[start:end] = _select_anchors(score, own, anchors[start:end], static[k])
            local = index[: end - start]
            centres = [local[f][chosen[f]] for f in own]
            merged = ops.anchor_merge(seen.flatten(0, 1), local[free], centres, self.beta_merge)
            parts.append((merged[0] + start * p, merged[1] + start * p, merged[2]))
        # 6. Everything that was kept, in temporal order.
        kept = Reduction.merging(index[picked | anchor], t * p, parts)
        notes = {"segments": segments, "weights": weights, "salient": picks, "anchors": anchors}
        return replace(_segment_means(replaced, segments, index).then(kept), notes=notes)

    def _static_positions(self, x: Tensor, segments: Segments) -> Tensor:
        """[K, P] bool; none in a segment of one frame, where nothing can repeat."""
        static = torch.zeros(len(segments), x.shape[1], dtype=torch.bool, device=x.device)
        change = ops.cosine_fingerprint if self.fingerprint == "second_order" else ops.adjacent_difference
        for k, (start, end) in enumerate(segments):
            if self.tfd and end - start > 1:
                static[k] = ops.top_tokens(-change(x[start:end])[None], floor(self.static_ratio * x.shape[1]))[0]
        return static

    def _segment_weights(self, x: Tensor, segments: Segments) -> Tensor:
        """[K] fp64: length times sigmoid of temperature times score; the score mixes uniqueness and richness."""
        length = torch.tensor([end - start for start, end in segments], dtype=torch.float64, device=x.device)
        mean = torch.stack([x[start:end].sum((0, 1), dtype=torch.float64) for start, end in segments])
        mean = mean / (length * x.shape[1])[:, None]  # [K, C]
        share = length / length.sum() if self.global_mean == "token" else torch.full_like(length, 1 / len(segments))
        unique = 1 - cosine_similarity(mean, share @ mean, dim=-1, eps=1e-30)
        score = self.uniqueness_weight * ops.standardise(unique, self.eps)
        if self.richness_weight:
            rich = torch.stack([ops.spectral_entropy(x[start:end].flatten(0, 1)) for start, end in segments])
            score = score + self.richness_weight * ops.standardise(rich, self.eps)
        return length * torch.sigmoid(self.temperature * score)

    def _select_salient(
        self, attention: Tensor, segments: Segments, static: Tensor, count: Tensor
    ) -> tuple[Tensor, Tensor]:
        """([T, P] picked, [T, P] replaced by the segment's mean): in time order, all segments side by side."""
        picked = torch.zeros_like(attention, dtype=torch.bool)
        replaced, history = torch.zeros_like(picked), torch.zeros_like(static)
        lengths = [end - start for start, end in segments]
        order = sorted(range(len(segments)), key=lambda k: -lengths[k])  # the longest first: the others drop out
        first = torch.tensor([segments[k][0] for k in order], device=attention.device)
        static, count = static[order], count.to(attention.device)
        for step in range(max(lengths)):
            n = sum(length > step for length in lengths)
            frame = first[:n] + step
            now = ops.top_tokens(self._penalised(attention[frame], history[:n]), count[frame])
            history[:n] |= now & static[:n]
            picked[frame], replaced[frame] = now, history[:n]
        return picked, replaced

    def _penalised(self, attention: Tensor, again: Tensor) -> Tensor:
        if self.penalty == "exp":
            return attention * torch.exp(-self.penalty_strength * again)
        if self.penalty == "subtract":
            return attention - self.penalty_strength * again
        return attention / (1 + self.penalty_strength * again)


def _select_anchors(score: Tensor, frames: list[int], counts: list[int], static: Tensor) -> Tensor:
    """[L, P] bool. A static position that was an anchor before comes after all others, in score order."""
    p = score.shape[1]
    chosen = torch.zeros(len(counts), p, dtype=torch.bool, device=score.device)
    rank = score.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1) + 2 * p * score.isneginf()
    for place, f in zip(rank, frames, strict=True):
        used = chosen[:f].any(0) & static
        chosen[f] = ops.top_tokens(-(place + p * used)[None], counts[f])[0]
    return chosen


def _segment_means(replaced: Tensor, segments: Segments, index: Tensor) -> Reduction:
    """The map that puts its segment's mean in place of every replaced token."""
    parts = []
    for start, end in segments:
        f, position = replaced[start:end].nonzero(as_tuple=True)
        over = index[start:end, position].T  # [replaced, L]
        weight = torch.full(over.shape, 1 / (end - start), dtype=torch.float32, device=index.device)
        parts.append((index[start:end][f, position].repeat_interleave(end - start), over.flatten(), weight.flatten()))
    return Reduction.merging(index.flatten(), index.numel(), parts)
