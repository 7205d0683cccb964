"""PruMerge and PruMerge+ against recorded runs of their official code, by hand, at every size, and on a model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from baselines import KINDS, PROJECTOR, assert_exact, clip, video
from recorded import recorded
from reductions import dense, per_frame

from vidcompress.config import load
from vidcompress.methods.prumerge import PruMerge
from vidcompress.methods.prumerge_plus import PruMergePlus
from vidcompress.tokens import VideoTokens

CASES = recorded("prumerge")
every_method = pytest.mark.parametrize("build", [PruMerge, PruMergePlus])


def of(name: str, **settings: Any) -> tuple[VideoTokens, PruMerge]:
    """A recorded case without CLIP's class token, and its method: as adaptive as the code, or with the code's count."""
    facts, case = CASES[name]
    tokens = video(case["features"][:, 1:], case["cls_attention_row"][None, 1:], case["keys"][:, 1:])
    given = {"adaptive": True, "retention_ratio": 0.5} if facts["adaptive"] else {}
    given = given or {"retention_ratio": (len(case["kept"]) + 1) / len(tokens)}
    return tokens, (PruMergePlus if facts["plus"] else PruMerge)(**given | settings)


# -- recorded runs -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("official", [False, True])
@pytest.mark.parametrize("implementation", ["torch", "naive"])
@pytest.mark.parametrize("name", CASES)
def test_as_recorded(name: str, implementation: str, official: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VIDCOMPRESS_OPS", implementation)
    case = CASES[name][1]
    tokens, method = of(name, official=official)
    reduction = method.decide(tokens, PROJECTOR)
    # The token for all others, the last in the code, is where the last of them was.
    rest = case["dropped"].max()[None]
    order = torch.cat([case["order_kept"], rest])
    assert torch.equal(reduction.keep, order.sort().values)
    assert torch.equal(case["kept"], reduction.keep[reduction.keep != rest])
    out = reduction.apply(tokens.features)
    torch.testing.assert_close(out, case["tokens"][order.argsort()], rtol=1e-4, atol=1e-5)
    weights = dense(reduction)
    for place, near in zip(case["order_kept"], case["neighbours"], strict=True):
        (row,) = weights[reduction.keep == place]
        assert torch.equal(row.nonzero().squeeze(1), torch.cat([near, place[None]]).sort().values)
        assert row[place] == 1
    (row,) = weights[reduction.keep == rest]
    assert torch.equal(row.nonzero().squeeze(1), case["dropped"])


def test_a_fixed_budget_of_plus_as_recorded() -> None:
    # With room for the recorded tokens and no more, they are what is kept.
    tokens, adaptive = of("plus_adaptive")
    kept = CASES["plus_adaptive"][1]["kept"]
    fixed = PruMergePlus(retention_ratio=(len(kept) + 1) / len(tokens))
    got, want = (dense(method.decide(tokens, PROJECTOR)) for method in (fixed, adaptive))
    assert torch.equal(got, want)


# -- by hand -----------------------------------------------------------------------------------------------------------
def test_one_frame_by_hand() -> None:
    # Tokens 1 and 4 are kept, and 7 for the rest: the last of 0 2 3 5 6 7. By their keys 1 is most like 5, then 0, and
    # 4 like 1 and 0.
    attention = torch.tensor([[0.01, 0.4, 0.02, 0.03, 0.3, 0.04, 0.05, 0.06]])
    angle = torch.tensor([[0.5, 1.0, 3.0, 4.0, -0.1, 0.9, 2.5, 4.5]])
    tokens = video(torch.eye(8)[None], attention, torch.stack([angle.cos(), angle.sin()], -1))
    reduction = PruMerge(retention_ratio=3 / 8, neighbours=2).decide(tokens, PROJECTOR)
    assert reduction.keep.tolist() == [1, 4, 7]
    want = torch.zeros(3, 8)
    want[0, [1, 5, 0]] = torch.tensor([1, 0.04, 0.01])
    want[1, [4, 0, 5]] = torch.tensor([1, 0.01, 0.04])
    rest = torch.tensor([0, 2, 3, 5, 6, 7])
    want[2, rest] = attention[0, rest]
    torch.testing.assert_close(reduction.apply(tokens.features), want)


def test_one_token_a_frame_and_all_but_one() -> None:
    tokens = clip((3, 2, 3))
    reduction = PruMerge(retention_ratio=3 / 18, neighbours=0).decide(tokens, PROJECTOR)
    top = tokens.signal("saliency.received").view(3, 6).argmax(1) + 6 * torch.arange(3)
    assert torch.equal(reduction.keep, top)
    assert torch.equal(reduction.apply(tokens.features), tokens.features[top])
    # Two frames keep all, and one all but one: of its two least attended tokens the later stands for both.
    reduction = PruMerge(retention_ratio=17 / 18, neighbours=0).decide(tokens, PROJECTOR)
    assert per_frame(reduction, tokens.grid) == [5, 6, 6]
    low = tokens.signal("saliency.received")[:6].argsort()[:2].sort().values
    assert reduction.keep[:5].tolist() == [i for i in range(6) if i != low[0]]
    assert dense(reduction)[:5, :6].count_nonzero(1).tolist() == [1 + (i == low[1]) for i in reduction.keep[:5]]


def test_outliers_decide_how_many_are_kept() -> None:
    attention = torch.full((3, 12), 0.1) + 0.001 * torch.arange(12)
    attention[0, [3, 7]] = 1.0
    attention[1, 5] = 1.0
    tokens = video(torch.randn(3, 12, 4), attention, torch.randn(3, 12, 4))
    reduction = PruMerge(adaptive=True, retention_ratio=0.9).decide(tokens, PROJECTOR)
    assert reduction.notes["chosen"].tolist() == [2, 1, 0]
    assert reduction.keep.tolist() == [3, 7, 11, 12 + 5, 12 + 11, 24 + 11]  # and one for the rest in every frame
    limited = PruMerge(adaptive=True, retention_ratio=6 / 36).decide(tokens, PROJECTOR)
    assert limited.notes["chosen"].tolist() == [1, 1, 0]
    assert not PruMerge(adaptive=True).exact and PruMerge().exact


def test_outliers_are_those_of_quartiles() -> None:
    draw = torch.Generator().manual_seed(3)
    attention = torch.rand(6, 41, generator=draw, dtype=torch.float64) ** 6
    for row, count in zip(attention, PruMerge().outliers(attention), strict=True):
        ordered = row.sort().values  # quartiles of 41 numbers are the 11th and the 31st
        assert count == int((row > ordered[30] + 1.5 * (ordered[30] - ordered[10])).sum()) > 0


def test_the_rounding_of_the_code() -> None:
    # 49 tokens: int(49 * (count / 49)) is one less for some counts.
    for count in range(1, 12):
        attention = torch.rand(1, 49, generator=torch.Generator().manual_seed(1)).double() * 0.01
        attention[0, :count] += 1
        assert PruMerge().outliers(attention) == [count]
        assert PruMerge(official=True).outliers(attention) == [int(49 * (count / 49))]
    assert any(int(49 * (count / 49)) < count for count in range(1, 12))
    # The last of 576 is never sampled; steps of 5 would reach it.
    k = 576 // 15
    assert PruMergePlus()._steps(k, 576, torch.device("cpu")).nonzero().squeeze(1).tolist() == [*range(0, 576, 5)]
    code = PruMergePlus(official=True)._steps(k, 576, torch.device("cpu"))
    assert code.nonzero().squeeze(1).tolist() == [*range(0, 575, 5)]


@pytest.mark.parametrize("kept", [3, 9, 14, 20, 29])
def test_plus_takes_as_many_by_attention_as_the_steps_leave_room_for(kept: int) -> None:
    tokens = clip((4, 6, 6))
    reduction = PruMergePlus(retention_ratio=(kept + 1) / 36, neighbours=0).decide(tokens, PROJECTOR)
    for f, attention in enumerate(tokens.signal("saliency.received").view(4, 36).tolist()):
        order = sorted(range(36), key=lambda i: -attention[i])
        unions = [set()]
        for k in range(1, 7):
            unions.append(set(order[:k]) | set(range(0, 36, 36 // k // 3)))
        chosen = [union for union in unions if len(union) <= kept][-1]
        chosen |= set([i for i in order if i not in chosen][: kept - len(chosen)])
        want = sorted(chosen | {max(set(range(36)) - chosen)})
        assert (reduction.keep[reduction.keep // 36 == f] - 36 * f).tolist() == want


# -- every size --------------------------------------------------------------------------------------------------------
@every_method
def test_counts_are_exact(build: type[PruMerge]) -> None:
    assert_exact(build)


@every_method
def test_adaptive_counts_stay_within_the_limit(build: type[PruMerge]) -> None:
    for grid in [(1, 1, 2), (5, 1, 7), (8, 4, 4)]:
        for kind in KINDS:
            for ratio in (0.01, 0.3, 0.9):
                tokens, method = clip(grid, kind), build(adaptive=True, retention_ratio=ratio)
                reduction = method.decide(tokens, PROJECTOR)
                assert 1 <= len(reduction) <= method.budget(grid)
                assert reduction.apply(tokens.features).isfinite().all()


def test_equal_keys_are_taken_in_order() -> None:
    tokens = clip((2, 5, 8), "one colour")
    reduction = PruMerge(retention_ratio=0.1).decide(tokens, PROJECTOR)
    first = dense(reduction)[0]
    assert first[:40].nonzero().squeeze(1).tolist() == [*range(33)]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"neighbours": -1}, "neighbours must be at least 0, got -1"),
        ({"retention_ratio": 2}, "retention_ratio must be"),
    ],
)
@every_method
def test_bad_settings_are_refused(build: type[PruMerge], settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(**settings)


# -- on a model --------------------------------------------------------------------------------------------------------
def test_presets_are_the_adaptive_forms() -> None:
    for name in ("prumerge", "prumerge_plus"):
        assert load(f"{name}-adaptive").adaptive and not load(name).adaptive
    # Above the third quartile lies no more than what the preset allows, whatever attention is.
    for p in (49, 144, 169, 196, 576):
        method = load("prumerge-adaptive")
        assert method.budget((32, 1, p)) // 32 > (p - 1) // 4
