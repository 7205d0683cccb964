"""Videos made of numbers, and methods asked about them site by site, for tests of methods."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from reductions import same
from torch import Tensor

from vidcompress.method import Method, Pipeline, list_methods
from vidcompress.tokens import CachedTokens, Grid, Reduction, Site, VideoTokens

PROJECTOR = Site.projector()
GRIDS = [(1, 1, 1), (1, 1, 2), (3, 1, 1), (1, 14, 14), (2, 3, 3), (5, 1, 7), (8, 4, 4), (32, 2, 2), (33, 3, 2)]
RATIOS = [0.01, 0.05, 0.1, 0.15, 0.25, 0.5, 0.9, 0.999, 1.0]


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


WHOLE = ("frame_features", "text_hidden", "last_text_hidden")
"""Signals that are not one number a token."""


def video(features: Tensor, grid: Grid, attention: Tensor | None = None, frames: Tensor | None = None) -> VideoTokens:
    """Tokens with all signals a method may ask for; frame features are mean tokens unless given."""
    n, channels = features.shape
    attention = rand(n, seed=17) if attention is None else attention.flatten()
    frames = features.float().view(grid[0], n // grid[0], -1).mean(1) if frames is None else frames
    kinds = ("saliency.head", "saliency.received", "text_attention", "last_query_attention", "first_look")
    signals = dict.fromkeys((*kinds, "last_query_attention.previous"), attention)
    signals["text_attention.heads"] = attention * torch.tensor([[[0.5]], [[1.0]]], dtype=attention.dtype)  # [2, 1, n]
    signals |= {"frame_features": frames, "text_hidden": randn(5, channels, seed=18).to(features.dtype)}
    signals["last_text_hidden"] = signals["text_hidden"][-1]
    signals["tower_keys"] = randn(n, 6, seed=19).to(features.dtype)
    return VideoTokens(features, grid, signals=signals)


def count(grid: Grid) -> int:
    return grid[0] * grid[1] * grid[2]


SCENES = {
    "random": lambda t, p, c: randn(t, p, c),
    "slow": lambda t, p, c: randn(1, p, c) + 0.1 * randn(t, p, c, seed=1),
    "identical frames": lambda t, p, c: randn(1, p, c).expand(t, -1, -1),
    "one colour a frame": lambda t, p, c: randn(t, 1, c).expand(-1, p, -1),
    "one colour": lambda t, p, c: randn(1, 1, c).expand(t, p, -1),
    "all zero": lambda t, p, c: torch.zeros(t, p, c),
    "black bars": lambda t, p, c: randn(t, p, c) * (torch.arange(p)[:, None] % 3 == 1),
    "black frames": lambda t, p, c: randn(t, p, c) * (torch.arange(t)[:, None, None] % 3 == 1),
    "copies": lambda t, p, c: randn(t, p, c)[:, torch.arange(p) // 3 * 3],
    "small": lambda t, p, c: randn(t, p, c) * 1e-3,
    "large": lambda t, p, c: randn(t, p, c) * 1e3,
}


def scene(kind: str, grid: Grid, channels: int = 12, **signals: Any) -> VideoTokens:
    return video(SCENES[kind](grid[0], grid[1] * grid[2], channels).reshape(-1, channels), grid, **signals)


def assert_lawful(reduction: Reduction, tokens: VideoTokens, budget: int, exact: bool = True) -> Tensor:
    """The contract of one answer, which keeps `budget` tokens, or at most so many; returns the survivors' vectors."""
    keep = reduction.keep
    assert keep.dtype == torch.long and reduction.num_source == len(tokens)
    assert keep.tolist() == sorted(set(keep.tolist())) and 0 <= keep[0] and keep[-1] < len(tokens)
    assert len(reduction) == budget if exact else len(reduction) <= budget
    out = reduction.apply(tokens.features)
    assert out.shape == (len(reduction), tokens.features.shape[1]) and out.dtype == tokens.features.dtype
    assert out.isfinite().all()
    return out


@dataclass(frozen=True)
class Step:
    """What a method saw at one of its sites, and its answer."""

    method: Method
    site: Site
    seen: VideoTokens
    reduction: Reduction


def ask(method: Method, site: Site, seen: VideoTokens) -> Reduction:
    """Its answer; between decoding steps what stays, with the attention of a token that was decoded."""
    if not site.is_decoding:
        return method.decide(seen, site)
    if method.count(site, seen.grid, seen.entered, len(seen)) == len(seen):
        return Reduction.identity(len(seen), seen.features.device)
    assert seen.index is not None
    cached = CachedTokens(seen.grid, seen.index, seen.signals, seen.notes, seen.entered)
    return Reduction(method.retain(cached, site), len(seen))


def walk(compression: Method | Pipeline, tokens: VideoTokens, depth: int = 28) -> Iterator[Step]:
    """One video at all sites, as the engine leads it there; no decoder layer changes it on its way."""
    features, index, entered = tokens.features, torch.arange(len(tokens), device=tokens.features.device), len(tokens)
    notes: dict[str, dict[str, Any]] = {}
    pipeline = Pipeline.of(compression)
    for site, method in (pipeline.stages(depth) | pipeline.evictions(depth)).items():
        earlier = notes.get(method.name, {})
        signals = {
            key: s if key in WHOLE else s[index] if key == "tower_keys" else s[..., index]
            for key, s in tokens.signals.items()
        }
        seen = VideoTokens(features, tokens.grid, index if site.is_inner else None, signals, earlier, entered)
        reduction = ask(method, site, seen)
        yield Step(method, site, seen, reduction)
        features, index = reduction.apply(features), index[reduction.keep]
        notes[method.name] = {**earlier, **reduction.notes}
        entered = entered if site.is_inner else len(reduction)


def assert_same_walk(got: Method, want: Method, tokens: VideoTokens, others: VideoTokens | None = None) -> None:
    """The same answers at all sites; `others` is what `got` sees."""
    pairs = zip(walk(got, others or tokens), walk(want, tokens), strict=True)
    assert all(same(a.reduction, b.reduction) for a, b in pairs)


def build(name: str, ratio: float) -> Method:
    """The method at a ratio, or at the nearest one that it takes."""
    cls = list_methods()[name]
    least = {f.name: f.metadata["low"] for f in fields(cls)}["retention_ratio"]
    return cls(retention_ratio=max(ratio, least or 0))


def keeping_all(name: str) -> Method:
    method = build(name, 1.0)
    return replace(method, keep_ratio=1.0) if hasattr(method, "keep_ratio") else method
