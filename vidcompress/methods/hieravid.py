"""HieraVid: hierarchical pruning. Runs are merged before the LLM, then relevance decides, then relevance and diversity.

Four equal stages of decoder layers keep fewer and fewer tokens. What docs/decisions.md, D17 to D20, settles is not in
the paper. About twice FastVID's time: likenesses to the token before, in fp64, and greedy MAP.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from vidcompress import ops
from vidcompress.method import DEPTH, Method, decay_for, floor, setting
from vidcompress.tokens import Grid, Reduction, Site, VideoTokens

CHUNK_ELEMENTS = 4 << 20  # of the video, whose fp32 copies exist at once
DECAYS = ((0.1, 0.23), (0.2, 0.355), (0.3, 0.61))  # (retention ratio, q) of the paper's FLOPs; q is interpolated


@dataclass(kw_only=True)
class HieraVid(Method):
    needs = frozenset({"last_text_hidden"})
    costly = "likenesses of all neighbouring frames, and greedy MAP in two stages"
    looks_ahead = True

    retention_ratio: float = setting(0.30, "mean over all layers of the fraction kept", above=0, high=1)
    first: float | None = setting(None, "fraction after merging; null: what gives retention_ratio", above=0, high=1)
    q: float | None = setting(
        None, "each stage keeps q times the one before; null: by retention_ratio", above=0, high=1
    )
    beta: float = setting(0.4, "a frame with a smaller share of merged positions begins a segment", low=0, high=1)
    lam: float = setting(0.5, "lambda: weight of standing for later segments, against novelty (eq. 4)", low=0, high=1)
    r_var: float = setting(0.05, "how much a segment's budget may deviate, per standard deviation (eq. 5)", low=0)
    eps: float = setting(1e-6, "segment scores whose standard deviation is below this count as equal", low=0)
    rank_eps: float = setting(1e-6, "a token with less than this part of itself left is used up", low=0, high=0.9)
    kernel: Literal["dot", "cosine"] = setting("dot", "likeness of two tokens in the DPP: dot product, or cosine")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.first is not None:  # then the ratio is what `first` and q make it
            self.q = self._decay()
            self.retention_ratio = sum(self.fractions()) / 4

    def sites(self, depth: int = DEPTH) -> list[Site]:
        if depth < 4:
            raise ValueError(f"hieravid has four stages of decoder layers, this decoder has {depth} layers")
        inner = [Site.decoder(quarter * depth // 4, quarter) for quarter in (1, 2, 3)]
        return [Site.projector(), *inner]

    def fractions(self) -> list[float]:
        """What each of the four stages keeps of the video: x, x q, x q^2, x q^3."""
        b, q, x = self.retention_ratio, self._decay(), self.first
        if x is None:
            x = 4 * b / sum(q**i for i in range(4))
            if x > 1:  # even all tokens in the first stage are too few: the others keep more instead
                x, q = 1.0, decay_for(b)
        return [x * q**i for i in range(4)]

    def budget(self, grid: Grid) -> int:
        t, h, w = grid
        # Merging takes tokens that have one before them, so the first frame's are always left.
        return max(h * w, floor(self.fractions()[0] * t * h * w), 1)

    def count(self, site: Site, grid: Grid, entered: int, before: int) -> int:
        if site.stage == 0:
            return self.budget(grid)
        return min(before, max(1, floor(self.fractions()[site.stage] * math.prod(grid))))

    def reduce(self, tokens: VideoTokens, site: Site) -> Reduction:
        if site.stage == 0:
            return self._merge_runs(tokens)
        x, count = tokens.features, self.wanted(tokens, site)
        # Relevance to the last instruction token (eq. 8); the softmax keeps the order.
        last = tokens.signal("last_text_hidden").double() / x.shape[1] ** 0.5
        logits = torch.cat([part.double() @ last for part in x.split(1024)])
        if site.stage == 1:
            return Reduction.pruning(ops.top_tokens(logits[None], count)[0])
        # Relevance-weighted DPP, each segment with its own budget (eq. 5, 9-11).
        sizes, counts = self._segment_budgets(tokens, site.stage, count)
        order = ops.dpp_map(x, _log_relevance(logits), sizes, counts, self.rank_eps, self.kernel)
        return Reduction(order.sort().values, len(x), notes={"sizes": sizes, "budgets": counts})

    def _merge_runs(self, tokens: VideoTokens) -> Reduction:
        """Merge-ratio segmentation: tokens that are most like their predecessors are merged into it (eq. 1-3)."""
        t, h, w = tokens.grid
        x, p = tokens.frames, h * w
        change = ops.frame_change(x).flatten()[None]  # [1, (T - 1) P]
        marked = torch.zeros(t, p, dtype=torch.bool, device=x.device)
        marked[1:] = ops.top_tokens(change, t * p - self.budget(tokens.grid), lowest=True).view(t - 1, p)
        # A run of marked positions joins the unmarked token before it.
        frame = torch.arange(t, device=x.device)[:, None]
        leader = (frame * ~marked).cummax(0).values * p + torch.arange(p, device=x.device)  # [T, P]
        weight = 1 / leader.flatten().bincount(minlength=t * p)[leader].float()
        run, index = weight < 1, torch.arange(t * p, device=x.device).view(t, p)
        merged = Reduction.merging(index[~marked], t * p, [(leader[run], index[run], weight[run])])
        # A frame that shares too little with the one before begins a segment.
        shared = marked.sum(1).tolist()
        starts = [f for f in range(t) if f == 0 or shared[f] < self.beta * p - 1e-9]
        segments = list(itertools.pairwise([*starts, t]))
        owned = [(merged.keep >= start * p) & (merged.keep < end * p) for start, end in segments]
        columns = tokens.features.split(max(1, CHUNK_ELEMENTS // (t * p)), dim=1)
        chunks = (merged.apply(part.float()).double() for part in columns)
        means = torch.cat([torch.stack([x[own].mean(0) for own in owned]) for x in chunks], 1)
        notes = {"segments": segments, **self._segment_scores(means)}
        return Reduction(merged.keep, t * p, merged.slot, merged.source, merged.weight, notes)

    def _segment_scores(self, g: Tensor) -> dict[str, Any]:
        """From means [S, C]: how much a segment stands for what follows, and is not what came before (eq. 4-5)."""
        before = g.cumsum(0) - g  # sums over the segments before each, and after it
        after = g.sum(0) - g - before
        last = torch.arange(len(g), device=g.device) == len(g) - 1  # what comes after it is nothing but rounding
        left = cosine_similarity(g, before, dim=-1, eps=1e-30)
        right = cosine_similarity(g, after, dim=-1, eps=1e-30).masked_fill(last, 0)
        b = self.lam * right + (1 - self.lam) * (1 - left)
        return {"b": b, "z": ops.standardise(b, self.eps)}

    def _segment_budgets(self, tokens: VideoTokens, stage: int, total: int) -> tuple[list[int], list[int]]:
        """(tokens, tokens to keep) of every segment."""
        _, h, w = tokens.grid
        assert tokens.index is not None
        end = torch.tensor([end for _, end in tokens.notes["segments"]], device=tokens.index.device)
        segment = torch.searchsorted(end, tokens.index // (h * w), right=True)
        sizes = segment.bincount(minlength=len(end)).tolist()
        a = self.fractions()
        keep = (a[stage] / a[stage - 1] + self.r_var * tokens.notes["z"]).clamp(0, 1).tolist()
        least = [min(1, size) for size in sizes]
        if sum(least) > total:
            least = [0] * len(sizes)
        return sizes, ops.apportion(total, [k * n for k, n in zip(keep, sizes, strict=True)], sizes, least)

    def _decay(self) -> float:
        if self.q is not None:
            return self.q
        b = min(max(self.retention_ratio, DECAYS[0][0]), DECAYS[-1][0])
        (low, below), (high, above) = next(pair for pair in itertools.pairwise(DECAYS) if b <= pair[1][0])
        return below + (above - below) * (b - low) / (high - low)


def _log_relevance(logits: Tensor) -> Tensor:
    """Logarithm of the min-max scaled softmax (eq. 8), of which itself next to nothing would differ from 0."""
    low, high = logits.amin(), logits.amax()
    part = (-torch.expm1(low - logits)).log() - (-torch.expm1(low - high)).log()
    return torch.where(high > low, logits - high + part, -torch.inf)
