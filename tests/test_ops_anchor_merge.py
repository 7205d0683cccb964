"""anchor_merge and select_in_turn against numbers worked out by hand, the former against its definition too."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from neartie import assert_same_argmax
from test_ops import anchors_of, both, implementations, rand, randn
from torch import Tensor

from vidcompress import ops


def merging(seed: int = 0, positions: int = 11, channels: int = 16) -> list[Any]:
    """Eight frames in segments of 3, 1 and 4; some have no anchors, one merges within itself."""
    frames = randn(8, positions, channels, seed=seed)
    anchors, counts = anchors_of(8, positions, [0, 4, 2, 3, 0, 1, 5, 2], seed=seed + 1)
    reach = [(0, 3)] * 3 + [(3, 4)] + [(4, 8), (4, 8), (6, 7), (4, 8)]
    return [frames, rand(8, positions, seed=seed + 2) > 0.2, anchors, counts, reach, 0.6, True]


def changed(arguments: list[Any], **changes: Any) -> list[Any]:
    names = ("frames", "members", "anchors", "counts", "reach", "weight", "anchors_join")
    return [changes.get(name, value) for name, value in zip(names, arguments, strict=True)]


def scaled(by: float) -> list[Any]:
    return changed(merging(), frames=merging()[0] * by)


CASES = {
    "random": lambda: merging(),
    "odd": lambda: merging(1, 7, 5),
    "one channel": lambda: merging(2, 9, 1),
    "x 0.001": lambda: scaled(1e-3),
    "x 10": lambda: scaled(10),
    "bfloat16": lambda: changed(merging(), frames=merging()[0].bfloat16()),
    "float16": lambda: changed(merging(), frames=merging()[0].half()),
    "offset": lambda: changed(merging(), frames=merging()[0] + 3),
    "some zero": lambda: changed(merging(), frames=merging()[0] * (rand(8, 11, 1) > 0.4)),
    "all zero": lambda: scaled(0),
    "all equal": lambda: changed(merging(), frames=torch.ones(8, 11, 16)),
    "not contiguous": lambda: changed(merging(), frames=randn(11, 8, 16).transpose(0, 1)),
    "no member": lambda: changed(merging(), members=torch.zeros(8, 11, dtype=torch.bool)),
    "all members": lambda: changed(merging(), members=torch.ones(8, 11, dtype=torch.bool)),
    "anchors do not join": lambda: changed(merging(), anchors_join=False),
    "all of a frame": lambda: changed(
        merging(), **dict(zip(("anchors", "counts"), anchors_of(8, 11, [0, 0, 11, 1, 0, 0, 0, 11]), strict=True))
    ),
    "no anchor": lambda: changed(merging(), anchors=torch.zeros(8, 11, dtype=torch.bool), counts=[0] * 8),
    "one token": lambda: [
        randn(1, 1, 4), torch.ones(1, 1, dtype=torch.bool), torch.ones(1, 1, dtype=torch.bool), [1], [(0, 1)], 0.6, True
    ],
}  # fmt: skip


def matrix(triplets: tuple[Tensor, Tensor, Tensor], n: int) -> Tensor:
    """[n, n] fp64: row = anchor."""
    return torch.zeros(n, n, dtype=torch.float64).index_put_(triplets[:2], triplets[2].double(), accumulate=True)


def run(kind: str, arguments: list[Any]) -> Tensor:
    return matrix(implementations("anchor_merge")[kind == "torch"](*arguments), arguments[1].numel())


@pytest.mark.parametrize("weight", [0.6, 0.0, 1.0])
@pytest.mark.parametrize("case", CASES)
def test_merging_equals_definition(case: str, weight: float) -> None:
    naive, fast = implementations("anchor_merge")
    arguments = changed(CASES[case](), weight=weight)
    got, want = fast(*arguments), naive(*arguments)
    assert [x.dtype for x in got] == [x.dtype for x in want] == [torch.long, torch.long, torch.float32]
    n, anchors = arguments[1].numel(), arguments[2].flatten()
    torch.testing.assert_close(matrix(got, n), matrix(want, n), atol=1e-6, rtol=0)
    torch.testing.assert_close(matrix(got, n).sum(1), anchors.double(), atol=1e-6, rtol=0)


def by_hand(tokens: list[list[float]], members: list[int], anchors: list[int], weight: float, join: bool) -> list[Any]:
    """One frame."""
    marks = torch.zeros(2, 1, len(tokens), dtype=torch.bool)
    marks[0, 0, members] = marks[1, 0, anchors] = True
    return [torch.tensor([tokens]), *marks, [len(anchors)], [(0, 1)], weight, join]


@both
def test_merging_by_hand(kind: str) -> None:
    # Anchors 0 = (1,0) and 1 = (0,2). 2 = (3,1) and 4 = (5,0) are nearer in direction to 0, 3 = (-1,1) to 1; members
    # include the anchors. So n_0 = 3, n_1 = 2; own weight max(1/4, .3) = .3 and max(1/3, .3) = 1/3.
    tokens = [[1.0, 0], [0, 2], [3, 1], [-1, 1], [5, 0]]
    got = run(kind, by_hand(tokens, [0, 1, 2, 3, 4], [0, 1], 0.3, True))
    a, b = 0.7 / 3, (1 - 1 / 3) / 2
    want = torch.zeros(5, 5, dtype=torch.float64)
    want[0] = torch.tensor([0.3 + a, 0, a, 0, a])
    want[1] = torch.tensor([0, 1 / 3 + b, 0, b, 0])
    torch.testing.assert_close(got, want, atol=1e-6, rtol=0)
    # Without the anchors themselves n_0 = 2 and n_1 = 1.
    got = run(kind, by_hand(tokens, [0, 1, 2, 3, 4], [0, 1], 0.3, False))
    want[0] = torch.tensor([1 / 3, 0, 1 / 3, 0, 1 / 3])
    want[1] = torch.tensor([0, 1 / 2, 0, 1 / 2, 0])
    torch.testing.assert_close(got, want, atol=1e-6, rtol=0)


@both
def test_an_anchor_that_nobody_chose_stays_as_it_is(kind: str) -> None:
    got = run(kind, by_hand([[1.0, 0], [-1, 0], [2, 0.1]], [0, 2], [0, 1], 0.6, True))
    assert got[1].tolist() == [0, 1, 0]


@both
@pytest.mark.parametrize("join", [True, False])
def test_a_member_joins_one_anchor_of_every_frame_that_reaches_it(kind: str, join: bool) -> None:
    arguments = changed(merging(), weight=0.0, anchors_join=join)
    _, members, anchors, counts, reach = arguments[:5]
    got, p = run(kind, arguments), members.shape[1]
    for f in [f for f, count in enumerate(counts) if count]:
        own = anchors[f].nonzero().squeeze(1) + f * p
        taken = (got[own] > 0).sum(0).view(8, p)
        start, end = reach[f]
        inside = torch.zeros_like(members)
        inside[start:end] = members[start:end]
        inside[f] &= ~anchors[f]
        outside = ~inside
        outside[f] &= ~anchors[f]  # an anchor's own share is no proof of anything
        assert taken[inside].eq(1).all() and taken[outside].eq(0).all()


@both
@pytest.mark.parametrize("anchors", [2, 9, 40])
@pytest.mark.parametrize("channels", [3, 24, 65])
def test_zero_members_and_ties_go_to_the_first_anchor(kind: str, anchors: int, channels: int) -> None:
    direction = randn(1, channels)
    tokens = torch.cat([direction.expand(anchors, -1), randn(20, channels, seed=1), torch.zeros(1, channels)])
    members = list(range(anchors, len(tokens)))
    got = run(kind, by_hand(tokens.tolist(), members, list(range(anchors)), 0.5, True))
    assert got[0, members].gt(0).all() and got[1:anchors, members].eq(0).all()


@both
def test_members_choose_by_cosine_alone(kind: str) -> None:
    frames, members, anchors, counts, reach, *_ = merging(4)
    longer = frames * (0.01 + 100 * rand(8, 11, 1, seed=4))
    got, want = (run(kind, changed(merging(4), frames=x)) for x in (longer, frames))
    torch.testing.assert_close(got, want, atol=1e-6, rtol=0)
    unit = torch.nn.functional.normalize(frames.double(), dim=-1).flatten(0, 1)
    for f in [f for f, count in enumerate(counts) if count]:
        own = anchors[f].nonzero().squeeze(1) + f * 11
        inside = torch.zeros_like(members)
        inside[slice(*reach[f])] = members[slice(*reach[f])]
        inside[f] &= ~anchors[f]
        others = inside.flatten().nonzero().squeeze(1)
        similarity = unit[others] @ unit[own].T
        assert_same_argmax(got[own][:, others].argmax(0), similarity.argmax(1), similarity)


def test_launches_do_not_grow_with_the_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one segment: what is done is done for all of its frames at once."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Count(TorchDispatchMode):
        calls = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.calls += 1
            return func(*args, **(kwargs or {}))

    fast, seen = implementations("anchor_merge")[1], []
    for t in (8, 64):
        anchors, counts = anchors_of(t, 9, [2] * t)
        with Count() as count:
            fast(randn(t, 9, 4), torch.ones(t, 9, dtype=torch.bool), anchors, counts, [(0, t)] * t, 0.6)
        seen.append(count.calls)
    assert seen[0] == seen[1]


# -- select_in_turn ----------------------------------------------------------------------------------------------------
@both
def test_selection_in_turn_by_hand(kind: str) -> None:
    # Position 0 is static in the first segment: once picked it falls behind everything. Two segments side by side, one
    # without frames, and a frame that picks nothing.
    scores = torch.tensor([[9.0, 1, 5, 0], [9, 1, 5, 0], [9, 1, 5, 0], [2, 8, 1, 0], [2, 8, 1, 0]]).double()
    static = torch.tensor([[True, False, False, False], [False] * 4, [False] * 4])
    segments, counts = [(0, 3), (3, 3), (3, 5)], torch.tensor([1, 0, 2, 1, 2])
    picked, held = implementations("select_in_turn")[kind == "torch"](scores, (1.0, 100.0), segments, static, counts)
    want = [[1, 0, 0, 0], [0, 0, 0, 0], [0, 1, 1, 0], [0, 1, 0, 0], [1, 1, 0, 0]]
    assert picked.int().tolist() == want
    assert held.int().tolist() == [[1, 0, 0, 0]] * 3 + [[0, 0, 0, 0]] * 2


def test_selection_in_turn_of_nothing() -> None:
    nothing, none = torch.zeros(0, 4, dtype=torch.bool), torch.zeros(0, 4, dtype=torch.float64)
    picked, held = ops.select_in_turn(none, (1.0, 0.0), [], nothing, torch.zeros(0, dtype=torch.long))
    assert picked.shape == held.shape == (0, 4)
