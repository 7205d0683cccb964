"""Density peaks against their definition, and by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from neartie import assert_same_choice
from test_ops import both, implementations, rand, randn
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vidcompress import ops

# -- density_peaks -----------------------------------------------------------------------------------------------------
LOWEST = torch.finfo(torch.float32).min
"""Log score of a candidate at distance 0 of a denser one, or alone: below all others, above those that are none."""


def true_peaks(tokens: Tensor, candidates: Tensor, k: int, ties: str = "index") -> Tensor:
    """Log scores in fp64 from the words of its docstring, point by point: independent of both implementations."""
    out = torch.full(candidates.shape, -math.inf, dtype=torch.float64)
    for b in range(tokens.shape[0]):
        points = candidates[b].nonzero().squeeze(1).tolist()
        x = tokens[b].double()
        distance = {(i, j): float((x[i] - x[j]).norm()) / x.shape[1] ** 0.5 for i in points for j in points}
        square = {i: sorted(distance[i, j] ** 2 for j in points)[:k] for i in points}
        density = {i: -sum(s) / len(s) for i, s in square.items()}
        largest = max(distance.values(), default=0)
        for i in points:
            denser = [j for j in points if density[j] > density[i]]
            denser += [j for j in points if ties == "index" and density[j] == density[i] and j < i]
            delta = min((distance[i, j] for j in denser), default=largest)
            out[b, i] = density[i] + math.log(delta) if delta > 0 else LOWEST
    return out


def clusters(frames: int, n: int, channels: int, spread: float) -> Tensor:
    """Five centres and tokens `spread` away from them."""
    centre = randn(frames, 5, channels, seed=7)
    own = (rand(frames, n, seed=8) * 5).long()
    return centre.gather(1, own[..., None].expand(-1, -1, channels)) + spread * randn(frames, n, channels, seed=9)


def some(frames: int, n: int, share: float = 0.7) -> Tensor:
    return rand(frames, n, seed=3) < share


def duplicated() -> Tensor:
    x = randn(3, 30, 24)
    x[:, 1::5] = x[:, [0]]
    x[:, 7] = x[:, 8]
    return x


def with_outlier() -> Tensor:
    x = randn(2, 30, 24)
    x[:, 4] *= 1000
    return x


PEAKS = {
    "random": lambda: (randn(3, 29, 24), some(3, 29), 4),
    "all candidates": lambda: (randn(3, 29, 24), torch.ones(3, 29, dtype=torch.bool), 4),
    "one channel": lambda: (randn(2, 13, 1), some(2, 13), 4),
    "fewer than k": lambda: (randn(2, 9, 8), some(2, 9, 0.3), 7),
    "k = 1": lambda: (randn(2, 9, 8), some(2, 9), 1),
    "k = n": lambda: (randn(2, 9, 8), some(2, 9), 9),
    "one candidate": lambda: (randn(3, 6, 8), torch.eye(6)[:3].bool(), 4),
    "two candidates": lambda: (randn(1, 6, 8), torch.eye(6)[:1].bool() | torch.eye(6)[4:5].bool(), 4),
    "no candidate": lambda: (randn(2, 6, 8), torch.zeros(2, 6, dtype=torch.bool), 4),
    "no frame": lambda: (randn(0, 6, 8), torch.zeros(0, 6, dtype=torch.bool), 4),
    "one token": lambda: (randn(2, 1, 8), torch.ones(2, 1, dtype=torch.bool), 4),
    "all equal": lambda: (randn(1, 1, 8).expand(2, 12, 8), some(2, 12), 4),
    "all zero": lambda: (torch.zeros(2, 12, 8), some(2, 12), 4),
    "all equal, large": lambda: (randn(1, 1, 8).expand(2, 12, 8) * 1e3 + 1e4, some(2, 12), 4),
    "duplicates": lambda: (duplicated(), some(3, 30), 4),
    "x 0.001": lambda: (randn(3, 29, 24) * 1e-3, some(3, 29), 4),
    "x 10": lambda: (randn(3, 29, 24) * 10, some(3, 29), 4),
    "+ 100": lambda: (randn(3, 29, 24) + 100, some(3, 29), 4),
    "bfloat16": lambda: (randn(3, 29, 24).bfloat16(), some(3, 29), 4),
    "float16": lambda: (randn(3, 29, 24).half(), some(3, 29), 4),
    "float16 + 100": lambda: ((randn(3, 29, 24) + 100).half(), some(3, 29), 4),
    "clusters 0.1": lambda: (clusters(3, 29, 24, 0.1), some(3, 29), 4),
    "clusters 0.01": lambda: (clusters(3, 29, 24, 0.01), some(3, 29), 4),
    "clusters 0.001": lambda: (clusters(3, 29, 24, 0.001), some(3, 29), 4),
    "clusters 0.0001": lambda: (clusters(3, 29, 24, 0.0001), some(3, 29), 4),
    "outlier": lambda: (with_outlier(), some(2, 30), 4),
}


@both
@pytest.mark.parametrize("ties", ["index", "strict"])
@pytest.mark.parametrize("case", PEAKS)
def test_peaks_are_chosen_as_defined(case: str, ties: str, kind: str) -> None:
    run = implementations("density_peaks")[kind == "torch"]
    tokens, candidates, k = PEAKS[case]()
    got, true = run(tokens, candidates, k, ties), true_peaks(tokens, candidates, k, ties)
    assert got.dtype == torch.float32 and got.shape == candidates.shape
    assert not got.isnan().any() and not got.eq(math.inf).any()
    assert torch.equal(got.isfinite(), candidates)
    for mine, right in zip(got, true, strict=True):
        number = int(right.isfinite().sum())
        for m in {min(1, number), number // 3, number // 2, number}:
            chosen, want = (ops.top_tokens(s[None], m)[0] for s in (mine, right))
            assert_same_choice(chosen, want, right, logarithmic=True)


@both
def test_peaks_by_hand(kind: str) -> None:
    # On a line (C = 1): 0, 1, 10, 12; k = 2, so density is minus half the squared distance to the neighbour:
    # -1/2, -1/2, -2, -2. "index": 0 is the densest of all, its delta the largest distance 12; 1 has 0 at distance 1;
    # 10 has 1 at 9; 12 has 10, equally dense but earlier, at 2.
    # "strict": nothing is denser than 1 either: 12; and 10 is not denser than 12, whose nearest is 1 at 11.
    run = implementations("density_peaks")[kind == "torch"]
    line = torch.tensor([0.0, 1, 10, 12]).view(1, 4, 1)
    everyone = torch.ones(1, 4, dtype=torch.bool)
    index = [-0.5 + math.log(12), -0.5, -2 + math.log(9), -2 + math.log(2)]
    strict = [-0.5 + math.log(12), -0.5 + math.log(12), -2 + math.log(9), -2 + math.log(11)]
    torch.testing.assert_close(run(line, everyone, 2), torch.tensor([index]), atol=1e-5, rtol=0)
    torch.testing.assert_close(run(line, everyone, 2, "strict"), torch.tensor([strict]), atol=1e-5, rtol=0)
    # Without the token at 1: k = 2 neighbours are 10 for 0 and 12 for 10, densities -50, -2, -2.
    third = torch.tensor([[True, False, True, True]])
    want = [-50 + math.log(10), -math.inf, -2 + math.log(12), -2 + math.log(2)]
    torch.testing.assert_close(run(line, third, 2), torch.tensor([want]), atol=1e-4, rtol=0)


@both
def test_peaks_of_duplicates(kind: str) -> None:
    # 3, 3, 3, 5 with k = 2: the copies are equally dense (0). "index": only the first is a peak, the others lie at
    # distance 0 of it, but still may be chosen, after 5. "strict": nothing is denser than any copy, all are peaks.
    run = implementations("density_peaks")[kind == "torch"]
    line, everyone = torch.tensor([3.0, 3, 3, 5]).view(1, 4, 1), torch.ones(1, 4, dtype=torch.bool)
    low, peak, last = LOWEST, math.log(2), -2 + math.log(2)
    torch.testing.assert_close(run(line, everyone, 2), torch.tensor([[peak, low, low, last]]), atol=1e-6, rtol=0)
    strict = torch.tensor([[peak, peak, peak, last]])
    torch.testing.assert_close(run(line, everyone, 2, "strict"), strict, atol=1e-6, rtol=0)


@both
def test_peaks_with_the_noise_of_official_code(kind: str) -> None:
    # density + noise in the linear domain: exp(-1/2) and exp(-1/2) + 0.1, so that now 1 is the densest.
    run = implementations("density_peaks")[kind == "torch"]
    line, everyone = torch.tensor([0.0, 1, 10, 12]).view(1, 4, 1), torch.ones(1, 4, dtype=torch.bool)
    noise = torch.tensor([[0, 0.1, 0, 0]])
    want = [-0.5 + math.log(1), math.log(math.exp(-0.5) + 0.1) + math.log(12), -2 + math.log(9), -2 + math.log(2)]
    torch.testing.assert_close(run(line, everyone, 2, noise=noise), torch.tensor([want]), atol=1e-5, rtol=0)


def test_peaks_scores_agree() -> None:
    naive, fast = implementations("density_peaks")
    for arguments in (PEAKS["random"](), PEAKS["all candidates"](), PEAKS["+ 100"](), PEAKS["x 0.001"]()):
        torch.testing.assert_close(fast(*arguments), naive(*arguments), atol=3e-6, rtol=0)


def test_peaks_of_one_frame_do_not_depend_on_the_others() -> None:
    naive, fast = implementations("density_peaks")
    tokens, candidates, k = PEAKS["random"]()
    for run in (naive, fast):
        alone = torch.cat([run(tokens[b : b + 1], candidates[b : b + 1], k) for b in range(3)])
        torch.testing.assert_close(run(tokens, candidates, k), alone, atol=1e-6, rtol=0)


def test_peaks_ignore_what_is_no_candidate() -> None:
    naive, fast = implementations("density_peaks")
    tokens, candidates, k = PEAKS["random"]()
    other = torch.where(candidates[..., None], tokens, 5 * randn(*tokens.shape, seed=11))
    for run in (naive, fast):
        torch.testing.assert_close(run(other, candidates, k), run(tokens, candidates, k), atol=1e-5, rtol=0)


class Work(TorchDispatchMode):
    """Counts the elements of all tensors that are made while it is on: what a computation costs, without a clock."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.elements += sum(x.numel() for x in tree_leaves(out) if isinstance(x, Tensor))
        return out


@pytest.mark.parametrize("kind", ["one colour", "nearly one colour", "all zero"])
def test_peaks_of_a_flat_picture_cost_like_those_of_any_other(kind: str) -> None:
    # A black video or a plain background makes every pair of tokens a close one.
    _, fast = implementations("density_peaks")
    flat = randn(2, 1, 512).expand(-1, 60, -1) + (0.001 * randn(2, 60, 512) if kind == "nearly one colour" else 0)
    flat = torch.zeros(2, 60, 512) if kind == "all zero" else flat.contiguous()
    candidates, cost = torch.ones(2, 60, dtype=torch.bool), []
    for tokens in (randn(2, 60, 512), flat):
        with Work() as work:
            fast(tokens, candidates, 4)
        cost.append(work.elements)
    assert cost[1] < 4 * cost[0]
