"""FastVID: dynamic density pruning (Shen et al., NeurIPS 2025, arXiv:2503.11187), the LLaVA-OneVision rule.

A video is cut into segments of similar frames. In every frame the most attended tokens stay as they are; the others of
a segment are merged into density-peak anchors in every fourth frame. `official` reproduces the official code of the
backbone instead (`variant`; docs/decisions.md, D25-D26), whatever `remainder` and `dispatch` say. OneVision's and
Qwen's lose tokens, so that `budget` is the most they keep; where the code stops, this goes on: a segment can do without
anchors, or without salient tokens, and LLaVA-Video's anchors that a frame cannot hold are placed by D8.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from vidcompress.method import Method, floor, setting
from vidcompress.ops import anchor_budgets, anchor_merge, apportion, density_peaks, places, segment_frames, top_tokens
from vidcompress.ops.table import table
from vidcompress.tokens import Reduction, Site, VideoTokens

Variant = Literal["onevision", "llava_video", "qwen2_5_vl"]
VARIANTS: dict[str, Variant] = {"llava_onevision": "onevision"}
VARIANTS |= dict.fromkeys(("llava_video", "llava_qwen"), "llava_video")
VARIANTS |= dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe"), "qwen2_5_vl")
"""The variant for a model, by its `model_type`."""


ANCHOR_FRAMES = 64  # whose tokens are copied at once


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
    official: bool = setting(False, "reproduce the official code of the backbone, its lost tokens included")
    variant: Literal["auto", Variant] = setting("auto", "whose code `official` reproduces; auto: the model's own")
    dyseg_ignore: float = setting(0.95, "official Qwen code only: of a run of frames this similar, the last counts")
    density_ties: Literal["index", "strict"] = setting("index", "which of two equally dense tokens counts as denser")
    siglip_head: str | None = setting("auto", "SigLIP checkpoint of the pooling head: folder, file, hub id, auto, none")

    @property
    def exact(self) -> bool:
        return self.variant == "llava_video" if self.official else self.remainder == "exact"

    def on(self, model_type: str) -> FastVID:
        if not self.official or self.variant != "auto":
            return self
        if model_type not in VARIANTS:
            known = ", ".join(VARIANTS)
            raise ValueError(f"fastvid: no official code for {model_type!r} (only for {known}); set `variant`")
        return replace(self, variant=VARIANTS[model_type])

    def reduce(self, tokens: VideoTokens, site: Site) -> Reduction:
        if self.official and self.variant == "auto":
            raise ValueError("fastvid: official=True with variant='auto': set `variant`, or apply it to a model")
        t, h, w = tokens.grid
        x, p = tokens.frames, h * w  # [T, P, C]
        # 1. Segments of similar frames (DySeg).
        seen = tokens.signal("frame_features")
        segments = segment_frames(seen, self.dyseg_c, self.dyseg_tau)
        # 2. Budgets: salient tokens of every frame, anchors of every anchor frame.
        salient_count, anchor_count = self._budgets(p, segments, seen)
        # 3. The most attended tokens of every frame stay unchanged (ATS).
        attention = tokens.signal("saliency.head").view(t, p)
        salient = top_tokens(attention, torch.tensor(salient_count))  # [T, P]
        others = ~salient
        # 4. Density peaks of the anchor frames (DTM).
        own = [f for f, count in enumerate(anchor_count) if count]
        frames, counts = table(own, x.device), [anchor_count[f] for f in own]
        parts = [
            density_peaks(x[f], others[f], self.neighbours, self.density_ties) for f in frames.split(ANCHOR_FRAMES)
        ]
        score = parts[0] if len(parts) == 1 else torch.cat(parts)
        anchor = torch.zeros_like(salient).index_copy_(0, frames, top_tokens(score, torch.tensor(counts)))
        # 5. The rest of a segment joins the most similar anchor of each of its anchor frames.
        theirs = self.official and self.variant != "onevision"
        reach = self._reach(p, segments, anchor_count)
        left = [p - count for count in salient_count]
        merged = anchor_merge(x, others, anchor, anchor_count, reach, self.beta, not theirs, left)
        kept = places(salient | anchor, [a + b for a, b in zip(salient_count, anchor_count, strict=True)])
        notes = {"segments": segments, "salient": salient_count, "anchors": anchor_count}
        return Reduction.merging(kept, t * p, [merged], notes)

    def _budgets(self, p: int, segments: list[tuple[int, int]], seen: Tensor) -> tuple[list[int], list[int]]:
        """Salient tokens and anchors of every frame."""
        t, (per_frame, context) = len(seen), self._per_frame(p)
        if self.remainder == "exact" and not self.official:
            lengths = [end - start for start, end in segments]
            return anchor_budgets(segments, p, t * per_frame, per_frame - context, lengths, self.anchor_interval)
        salient, anchors = [per_frame - context] * t, [0] * t
        for start, end in segments:
            if self.official and self.variant != "onevision":
                salient[start:end], anchors[start:end] = self._segment_budgets(p, seen[start:end])
                continue
            own = range(start, end)[:: -self.anchor_interval]
            for f in own:
                anchors[f] = min(context * (end - start) // len(own), p - per_frame + context)
        return salient, anchors

    def _segment_budgets(self, p: int, seen: Tensor) -> tuple[list[int], list[int]]:
        """Those of one segment, shared out among its frames (D25); on Qwen among the last frames of its runs (D26)."""
        qwen, length = self.variant == "qwen2_5_vl", len(seen)
        frames = [end - 1 for _, end in segment_frames(seen, 1, self.dyseg_ignore)] if qwen else list(range(length))
        own = frames[:: -self.anchor_interval]
        total = length * self._per_frame(p)[0]
        context = max(floor(total * self.context_share), int(qwen))
        salient, anchors = [0] * length, [0] * length
        for f, share in zip(own, apportion(context, [1] * len(own), [context] * len(own)), strict=True):
            anchors[f] = min(share, p // 2) if qwen and length > 1 else share
        rest, n = total - context, len(frames)
        for f, share in zip(frames, apportion(rest, [1] * n, [rest] * n), strict=True):
            salient[f] = min(share, p - anchors[f]) if qwen else share
        if any(s + a > p for s, a in zip(salient, anchors, strict=True)):  # where the code for LLaVA-Video stops
            return anchor_budgets([(0, length)], p, total, rest // length, [1], self.anchor_interval)
        return salient, anchors

    def _per_frame(self, positions: int) -> tuple[int, int]:
        """Tokens kept of a frame on average, and how many of them are merged context."""
        kept = max(1, floor(self.retention_ratio * positions))
        return kept, floor(kept * self.context_share)

    def _reach(self, p: int, segments: list[tuple[int, int]], counts: list[int]) -> list[tuple[int, int]]:
        """The tokens of which frames join the anchors of a frame: its segment's, or its own alone."""
        context = self._per_frame(p)[1]
        if self.official and self.variant != "onevision":
            alone = [False] * len(counts)
        else:
            by_share = self.official or self.dispatch == "official"
            alone = [by_share and count == context for count in counts]
        whole = [span for span in segments for _ in range(*span)]
        return [(f, f + 1) if single else span for f, (single, span) in enumerate(zip(alone, whole, strict=True))]
