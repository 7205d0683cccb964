"""Unified spatiotemporal compression, both halves, on examples worked out by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from reductions import same
from scenes import (
    GRIDS,
    PROJECTOR,
    assert_lawful,
    scene,
    video,
    walk,
)
from torch import Tensor

from vidcompress import ops
from vidcompress.method import Pipeline
from vidcompress.methods.text_aware_merge import TextAwareMerge
from vidcompress.methods.unified import Unified
from vidcompress.methods.unified_pool import UnifiedPool
from vidcompress.tokens import Site, VideoTokens


# -- Unified, its outer half -------------------------------------------------------------------------------------------
def test_unified_pool_by_hand() -> None:
    # r P = 4 tokens, half of them clusters: two for the pool. Attention visits 2, then 0, which is at a right angle to
    # it: the pool is full, although only at 0.7 and beyond would 1 have been turned away.
    # Recycled: 1 and 3 to 7, at 2, 3, 4 and 10, 11, 13 on a line. k = 2: the mean squared distance to oneself and the
    # nearest other is 1/4 (d^2 / 2 / 2), of token 7 it is 1. Of equals the first is the densest: token 1, delta 11;
    # then 5, whose nearest denser one is 4: delta 6. All others have delta 1 or 2. Centres: 1 and 5.
    # Clusters: 2, 3, 4 and 10, 11, 13, with means 3 and 34/3.
    x = torch.tensor([[1.0, 0], [2, 0], [0, 1], [3, 0], [4, 0], [10, 0], [11, 0], [13, 0]])
    attention = torch.tensor([0.8, 0.7, 0.9, 0.1, 0.2, 0.3, 0.4, 0.5])
    method = UnifiedPool(retention_ratio=0.5, cluster_share=0.5, neighbours=2)
    reduction = method.decide(video(x, (1, 2, 4), attention), PROJECTOR)
    assert reduction.notes["pool"].tolist() == [2, 0] and reduction.notes["centres"].tolist() == [1, 5]
    assert reduction.keep.tolist() == [0, 1, 2, 5]
    want = torch.tensor([[1.0, 0], [3, 0], [0, 1], [34 / 3, 0]])
    torch.testing.assert_close(reduction.apply(x), want, atol=1e-5, rtol=0)
    # Were no equal the denser one, all five would stand at the largest distance, and the first two be centres.
    strict = replace(method, density_ties="strict").decide(video(x, (1, 2, 4), attention), PROJECTOR)
    assert strict.notes["centres"].tolist() == [1, 3]


def test_unified_pool_turns_away_what_it_has() -> None:
    # Cosines 0.6 and 0.8 to the first: at tau 0.7 the second of attention is turned away, the third taken; at 0.9 the
    # second is taken, at 0.5 neither.
    x = torch.tensor([[1.0, 0, 0], [0.8, 0.6, 0], [0.6, 0, 0.8], [0, 0, -1.0], [0, 0, -2.0], [0, 0, -3.0]])
    attention = torch.tensor([0.9, 0.8, 0.7, 0.3, 0.2, 0.1])
    pools = {
        tau: UnifiedPool(retention_ratio=0.5, cluster_share=1 / 3, tau=tau)
        .decide(video(x, (1, 1, 6), attention), PROJECTOR)
        .notes["pool"]
        .tolist()
        for tau in (0.5, 0.7, 0.9)
    }
    assert pools == {0.5: [0, 3], 0.7: [0, 2], 0.9: [0, 1]}


def test_unified_pool_visits_equal_attention_by_index() -> None:
    x = torch.eye(8)
    notes = UnifiedPool(retention_ratio=0.5).decide(video(x, (1, 2, 4), torch.ones(8)), PROJECTOR).notes
    assert notes["pool"].tolist() == [0, 1, 2]


def test_unified_pool_above_one_is_attention_alone() -> None:
    tokens = scene("copies", (8, 4, 4))
    for tau in (1.01, 5.0):
        method = UnifiedPool(retention_ratio=0.25, tau=tau)
        notes = method.decide(tokens, PROJECTOR).notes
        best = tokens.signal("saliency.received").topk(round(0.7 * method.budget(tokens.grid))).indices
        assert torch.equal(notes["pool"], best)


@pytest.mark.parametrize("tau", [0.0, 0.2, 0.5, 0.7, 0.9])
def test_unified_pool_is_unlike_itself(tau: float) -> None:
    tokens = scene("slow", (8, 4, 4))
    method = UnifiedPool(retention_ratio=0.3, tau=tau)
    reduction = method.decide(tokens, PROJECTOR)
    pool, attention = reduction.notes["pool"], tokens.signal("saliency.received")
    unit = torch.nn.functional.normalize(tokens.features.double(), dim=-1)
    likeness = unit[pool] @ unit[pool].T
    assert likeness[~torch.eye(len(pool), dtype=torch.bool)].max() < tau
    assert (attention[pool].diff() < 0).all()
    # Who was visited before the last and is not in it is like one that was visited earlier.
    for i in (attention > attention[pool[-1]]).nonzero().squeeze(1).tolist():
        assert i in pool or (unit[i] @ unit[pool[attention[pool] > attention[i]]].T).max() >= tau - 1e-9


def test_a_pool_that_cannot_fill_leaves_its_part_to_the_clusters() -> None:
    # A still video of five positions at right angles: 16 tokens, 11 for the pool, but five are all there is. The
    # other 11 are clusters, every position has some, and each is the mean of copies.
    x = torch.eye(5)[None].expand(4, -1, -1).flatten(0, 1)
    tokens = video(x, (4, 1, 5))
    reduction = UnifiedPool(retention_ratio=0.8).decide(tokens, PROJECTOR)
    pool, centres = reduction.notes["pool"], reduction.notes["centres"]
    assert (len(pool), len(centres)) == (5, 11) and sorted((pool % 5).tolist()) == [0, 1, 2, 3, 4]
    assert set((centres % 5).tolist()) == {0, 1, 2, 3, 4}
    torch.testing.assert_close(reduction.apply(x), x[reduction.keep], atol=1e-6, rtol=0)
    # One colour: one token in the pool, and all the rest of the budget clusters.
    colour = UnifiedPool(retention_ratio=0.5).decide(scene("one colour", (4, 2, 5)), PROJECTOR)
    assert len(colour.notes["pool"]) == 1 and len(colour.notes["centres"]) == 19
    # A black video: nothing is like anything, so that all fill the pool.
    black = UnifiedPool(retention_ratio=0.5).decide(scene("all zero", (4, 2, 5)), PROJECTOR)
    assert len(black.notes["pool"]) == 14


def test_a_long_video_is_clustered_in_windows() -> None:
    # As many clusters a window as its recycled tokens deserve, each window's those of its tokens alone.
    tokens = scene("slow", (11, 4, 5), 24)
    method = UnifiedPool(retention_ratio=0.3, exact_up_to=219, window_frames=4)
    whole, parts = replace(method, exact_up_to=220), method.decide(tokens, PROJECTOR)
    assert_lawful(parts, tokens, method.budget(tokens.grid))
    pool, centres = parts.notes["pool"], parts.notes["centres"]
    assert torch.equal(pool, whole.decide(tokens, PROJECTOR).notes["pool"])
    exact = replace(method, exact_up_to=None).decide(tokens, PROJECTOR).notes["centres"]
    assert torch.equal(whole.decide(tokens, PROJECTOR).notes["centres"], exact) and not torch.equal(centres, exact)
    recycled = torch.ones(220, dtype=torch.bool)
    recycled[pool] = False
    spans = [(0, 60), (60, 140), (140, 220)]
    counts = ops.fair_shares(method.budget(tokens.grid) - len(pool), [int(recycled[a:b].sum()) for a, b in spans])
    for (a, b), count in zip(spans, counts, strict=True):
        want = ops.density_clusters(tokens.features[a:b], count, method.neighbours, "index", recycled[a:b])
        mine = (parts.source >= a) & (parts.source < b)
        assert torch.equal(centres[(centres >= a) & (centres < b)], want.centre + a)
        order = parts.source[mine].argsort()
        assert torch.equal(parts.keep[parts.slot[mine]][order], want.joined + a)


def test_windows_are_no_more_than_clusters_and_may_be_empty() -> None:
    tokens = scene("slow", (11, 4, 5), 24)
    method = UnifiedPool(
        retention_ratio=0.1, cluster_share=0.15, exact_up_to=1, window_frames=1
    )  # 22 tokens, 3 clusters
    reduction = method.decide(tokens, PROJECTOR)
    assert_lawful(reduction, tokens, 22)
    first, second, third = reduction.notes["centres"].tolist()
    assert first < 60 <= second < 140 <= third
    # Attention falls: the first of three windows is in the pool, all of it, and one token of the second.
    method = UnifiedPool(retention_ratio=0.5, cluster_share=0.25, exact_up_to=1, window_frames=1)
    reduction = method.decide(video(torch.eye(24), (12, 1, 2), torch.arange(24.0).flip(0)), PROJECTOR)
    assert reduction.notes["pool"].tolist() == [*range(9)]
    assert [int(c) // 8 for c in reduction.notes["centres"]] == [1, 2, 2]


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_cluster_share(share: float) -> None:
    tokens = video(torch.eye(64), (4, 4, 4))
    reduction = UnifiedPool(retention_ratio=0.5, cluster_share=share).decide(tokens, PROJECTOR)
    centres = round(share * 32)
    assert len(reduction.notes["centres"]) == centres and len(reduction.notes["pool"]) == 32 - centres
    assert (reduction.slot is None) == (share == 0)  # without clusters nothing is merged, what is turned away is gone


def test_clusters_join_the_nearest_centre() -> None:
    tokens = scene("slow", (9, 4, 5), 24)
    x = tokens.features.double()
    for ties in ("index", "strict"):
        reduction = UnifiedPool(retention_ratio=0.2, density_ties=ties).decide(tokens, PROJECTOR)
        centres = reduction.notes["centres"]
        nearest = centres[
            torch.cdist(x[reduction.source], x[centres], compute_mode="donot_use_mm_for_euclid_dist").argmin(1)
        ]
        assert torch.equal(reduction.keep[reduction.slot], nearest)
        for centre in centres.tolist():
            members = x[reduction.source[nearest == centre]]
            out = reduction.apply(tokens.features)[reduction.keep == centre][0]
            torch.testing.assert_close(out.double(), members.mean(0), atol=1e-5, rtol=1e-5)


# -- Unified, its inner half -------------------------------------------------------------------------------------------
def inner(x: Tensor, attention: list[float], text: list[list[float]]) -> VideoTokens:
    signals = {"text_attention": torch.tensor(attention), "text_hidden": torch.tensor(text)}
    return VideoTokens(x, (1, 1, len(x)), torch.arange(len(x)), signals)


@pytest.mark.parametrize(
    ("weight", "keep", "want"),
    [
        # Attention alone: 0 and 3. 1 is at a right angle to 0 and almost parallel to 3; 2 is almost parallel to 0.
        (0.0, [0, 3], [[1.5, 0.1], [0.05, 2.0]]),
        # Likeness to the text alone, the better of two text tokens: 0, 1, .0995, .9994. So 1 and 3; 0 is like 3 (.033)
        # rather than 1 (0), and so is 2 (.133 against .0995).
        (1.0, [1, 3], [[0.0, 1.0], [3.1 / 3, 3.2 / 3]]),
        # Half each: attention scaled to 1, 0, 1/8, 7/8. 0 and 1 both have 1/2, 3 has .937: the lowest of the equals.
        (0.5, [0, 3], [[1.5, 0.1], [0.05, 2.0]]),
    ],
)
def test_text_aware_merge_by_hand(weight: float, keep: list[int], want: list[list[float]]) -> None:
    x = torch.tensor([[1.0, 0], [0, 1], [2, 0.2], [0.1, 3]])
    tokens = inner(x, [0.9, 0.1, 0.2, 0.8], [[0.0, 5], [-1, 0]])
    reduction = TextAwareMerge(text_weight=weight).decide(tokens, Site.decoder(18))
    assert reduction.keep.tolist() == keep
    torch.testing.assert_close(reduction.apply(x), torch.tensor(want), atol=1e-5, rtol=0)


def test_scores_that_are_all_equal_do_not_count() -> None:
    # One of the two scores is flat: the other decides alone, whatever the weight.
    x = torch.eye(6)
    flat = inner(x, [0.3] * 6, [[1.0, 5, 2, 4, 3, 0]])
    for weight in (0.1, 0.5, 1.0):
        assert TextAwareMerge(text_weight=weight).decide(flat, Site.decoder(18)).keep.tolist() == [1, 3, 4]
    # Both are: the first tokens stay, and those without likeness join the first of them.
    tokens = inner(x, [0.3] * 6, [[0.0] * 6])
    reduction = TextAwareMerge().decide(tokens, Site.decoder(18))
    assert reduction.keep.tolist() == [0, 1, 2]
    assert reduction.apply(x)[0].tolist() == pytest.approx([0.25, 0, 0, 0.25, 0.25, 0.25])


@pytest.mark.parametrize(("depth", "layer"), [(28, 18), (24, 15), (32, 21), (14, 9), (4, 3)])
def test_merging_layer_is_in_proportion(depth: int, layer: int) -> None:
    assert TextAwareMerge().sites(depth) == [Site.decoder(layer)]
    assert Unified().sites(depth) == [PROJECTOR, Site.decoder(layer)]
    assert TextAwareMerge(layer=2).sites(depth) == [Site.decoder(2)]


@pytest.mark.parametrize(
    ("ratio", "before", "want"), [(0.5, 627, 314), (0.5, 5, 2), (0.5, 7, 4), (0.01, 9, 1), (1.0, 9, 9)]
)
def test_text_aware_merge_rounds(ratio: float, before: int, want: int) -> None:
    method = TextAwareMerge(retention_ratio=ratio)
    assert method.count(Site.decoder(18), (32, 14, 14), 6272, before) == want


def test_unified_is_its_halves() -> None:
    tokens = scene("slow", (8, 4, 4), 24)
    common = {"tau": 0.6, "cluster_share": 0.4, "neighbours": 3, "density_ties": "strict"}
    whole = Unified(retention_ratio=0.3, keep_ratio=0.4, text_weight=0.7, layer=5, **common)
    pool = UnifiedPool(retention_ratio=0.3, **common)
    merge = TextAwareMerge(retention_ratio=0.4, text_weight=0.7, layer=5)
    pairs = list(zip(walk(whole, tokens), walk(Pipeline([pool, merge]), tokens), strict=True))
    assert [a.site for a, _ in pairs] == [b.site for _, b in pairs] == [PROJECTOR, Site.decoder(5)]
    assert all(same(a.reduction, b.reduction) for a, b in pairs)
    for grid in GRIDS:
        assert Pipeline.of(whole).counts(grid) == Pipeline([pool, merge]).counts(grid)
    assert whole.needs == pool.needs | merge.needs
