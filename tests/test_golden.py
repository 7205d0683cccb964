"""Methods against recorded runs (golden/README.md): the same tokens, the same vectors, the same steps on the way.

`GOLDEN=<folder>` tries other files of the same format.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import pytest
import torch
from neartie import TOLERANCE, assert_same_choice
from safetensors import safe_open
from torch import Tensor

from vidcompress import ops
from vidcompress.method import Method, floor, list_methods
from vidcompress.tokens import Reduction, Site, VideoTokens

OWN = Path(__file__).parent / "golden"


@dataclass(frozen=True)
class Case:
    """One recorded run."""

    name: str
    method: str
    params: dict[str, Any]
    grid: tuple[int, int, int]
    tensors: dict[str, Tensor] = field(repr=False)

    def build(self) -> Method:
        return list_methods()[self.method](**self.params)

    def tokens(self, dtype: torch.dtype = torch.float32) -> VideoTokens:
        """What the method sees, features in `dtype`; its saliency goes under every name it may ask for."""
        t = self.tensors
        signals = {"saliency.head": t["attention"].flatten(), "saliency.received": t["attention"].flatten()}
        if "frame_features" in t:
            signals["frame_features"] = t["frame_features"]
        return VideoTokens(t["features"].flatten(0, 1).to(dtype), self.grid, signals=signals)

    def decide(self, dtype: torch.dtype = torch.float32) -> Reduction:
        return self.build().decide(self.tokens(dtype), Site.projector())

    def debug(self, name: str) -> Tensor:
        """An intermediate quantity."""
        return self.tensors[f"debug.{name}"]


def load_cases(folder: Path) -> Iterator[Case]:
    """Every recorded run of an outer method in the files of `folder`; files of other formats hold no `<case>.keep`."""
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
            cases = json.loads(file.metadata()["cases"])
        for name, facts in cases.items():
            own = {k.removeprefix(f"{name}."): v for k, v in tensors.items() if k.startswith(f"{name}.")}
            if not {"features", "attention", "keep", "tokens"} <= own.keys():
                continue
            method = facts.get("method", path.stem)
            params = facts.get("params")
            if params is None and method in list_methods():
                known = {f.name for f in fields(list_methods()[method])}
                params = {k: v for k, v in facts.items() if k in known} | {"remainder": "official"}
            grid = tuple(facts.get("grid") or (*own["features"].shape[:2], 1))
            yield Case(f"{path.stem}-{name}", method, params, grid, own)


CASES = list(load_cases(Path(os.environ.get("GOLDEN", OWN))))
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def cases_with(*tensors: str) -> pytest.MarkDecorator:
    """Those recorded runs that hold these tensors."""
    return pytest.mark.parametrize(
        "case", [c for c in CASES if c.tensors.keys() >= set(tensors)], ids=lambda case: case.name
    )


@pytest.fixture(autouse=True)
def known(request: pytest.FixtureRequest) -> None:
    case = getattr(request.node, "callspec", None) and request.node.callspec.params.get("case")
    if isinstance(case, Case) and case.method not in list_methods():
        pytest.skip(f"there is no method {case.method!r}")


def dense(case: Case, slot: Tensor, source: Tensor, weight: Tensor) -> Tensor:
    """[K, N] fp64."""
    t, h, w = case.grid
    out = torch.zeros(len(case.tensors["keep"]), t * h * w, dtype=torch.float64)
    return out.index_put_((slot, source), weight.double(), accumulate=True)


def map_of(case: Case, reduction: Reduction) -> Tensor:
    """[K, N] fp64 of a reduction; slots without triplets hand their own token on."""
    k = len(reduction)
    slot, source = torch.arange(k), reduction.keep
    if reduction.slot is None:
        return dense(case, slot, source, torch.ones(k))
    alone = ~torch.isin(slot, reduction.slot)
    columns = zip(
        (slot[alone], source[alone], torch.ones(int(alone.sum()))),
        (reduction.slot, reduction.source, reduction.weight),
        strict=True,
    )
    return dense(case, *(torch.cat(column) for column in columns))


def near_tie_anchors(case: Case, reduction: Reduction) -> dict[int, int]:
    """{anchor: token} of the token indices whose vector hangs on a choice between two anchors that fp32 may take either
    way: the token's highest cosines to the anchors of one frame differ by less than a near-tie, in fp64.

    Only for methods that compare the tokens as they are given (FastVID).
    """
    p = case.grid[1] * case.grid[2]
    unit = torch.nn.functional.normalize(case.tensors["features"].flatten(0, 1).double(), dim=-1)
    anchors = torch.empty(0, dtype=torch.long) if reduction.slot is None else reduction.keep[reduction.slot.unique()]
    tied: dict[int, int] = {}
    for frame in anchors.div(p, rounding_mode="floor").unique():
        own = anchors[anchors // p == frame]
        if len(own) > 1:
            best = (unit @ unit[own].T).topk(2)  # [N, 2]
            close = (best.values[:, 0] - best.values[:, 1]) < TOLERANCE * best.values[:, 0].abs()
            for token in close.nonzero().squeeze(1).tolist():
                tied |= dict.fromkeys(own[best.indices[token]].tolist(), token)
    return tied


def assert_same_tokens(case: Case, got: Tensor, reduction: Reduction, tolerance: float = 1e-4) -> list[int]:
    """Vectors agree to `tolerance`, but for anchors in a near-tie (FastVID). Returns the indices of those excused."""
    wrong = (got - case.tensors["tokens"]).abs().amax(1) > tolerance
    off = case.tensors["keep"][wrong].tolist()
    excused = near_tie_anchors(case, reduction) if off and case.method == "fastvid" else {}
    unexcused = [i for i in off if i not in excused]
    assert not unexcused, f"{case.name}: tokens {unexcused} are off by more than {tolerance}"
    return off


# -- the result --------------------------------------------------------------------------------------------------------
def test_the_files_of_this_repository_are_all_tried() -> None:
    cases = list(load_cases(OWN))
    assert sorted({c.name.split("-")[0] for c in cases}) == sorted(p.stem for p in OWN.glob("*.safetensors"))
    assert len(cases) == 4 + 2 + 8
    assert {c.method for c in cases} <= set(list_methods())


@pytest.mark.parametrize("implementation", ["torch", "naive"])
@every_case
def test_same_tokens(case: Case, implementation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VIDCOMPRESS_OPS", implementation)
    reduction = case.decide()
    assert torch.equal(reduction.keep, case.tensors["keep"])
    got = reduction.apply(case.tensors["features"].flatten(0, 1))
    assert_same_tokens(case, got, reduction)


@cases_with("mix.slot", "mix.source", "mix.weight")
def test_same_map(case: Case) -> None:
    want = dense(case, *(case.tensors[f"mix.{name}"] for name in ("slot", "source", "weight")))
    got = map_of(case, case.decide())
    torch.testing.assert_close(got, want, atol=1e-5, rtol=0)
    torch.testing.assert_close(got.sum(1), torch.ones(len(got), dtype=torch.float64), atol=1e-5, rtol=0)


@every_case
def test_budget_is_known_beforehand(case: Case) -> None:
    method, kept = case.build(), len(case.tensors["keep"])
    budget = method.budget(case.grid)
    assert budget == kept if method.exact else budget >= kept


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
@every_case
def test_half_precision_storage(case: Case, dtype: torch.dtype) -> None:
    # The dtype is storage only: decisions are those of the same numbers in fp32, vectors are rounded once.
    tokens = case.tokens(dtype)
    method = case.build()
    reduction = method.decide(tokens, Site.projector())
    exact = VideoTokens(tokens.features.float(), tokens.grid, signals=tokens.signals)
    reference = method.decide(exact, Site.projector())
    if method.exact:
        assert len(reduction) == len(case.tensors["keep"])
    assert torch.equal(reduction.keep, reference.keep)
    out = reduction.apply(tokens.features)
    assert out.dtype == dtype and out.isfinite().all()
    assert torch.equal(out, reference.apply(exact.features).to(dtype))


# -- the steps on the way ----------------------------------------------------------------------------------------------
@cases_with("debug.segments")
def test_segments(case: Case) -> None:
    want = [tuple(s) for s in case.debug("segments").tolist()]
    method = case.build()
    assert ops.segment_frames(case.tensors["frame_features"], method.dyseg_c, method.dyseg_tau) == want
    assert case.decide().notes["segments"] == want


@cases_with("debug.salient_per_frame", "debug.anchor_budget")
def test_budgets_of_every_frame(case: Case) -> None:
    salient, anchors = case.debug("salient_per_frame").tolist(), case.debug("anchor_budget").tolist()
    notes = case.decide().notes
    assert notes["salient"] == salient and notes["anchors"] == anchors
    p = case.grid[1] * case.grid[2]
    assert case.tensors["keep"].div(p, rounding_mode="floor").bincount(minlength=case.grid[0]).tolist() == [
        s + a for s, a in zip(salient, anchors, strict=True)
    ]


@cases_with("debug.centres")
def test_anchors(case: Case) -> None:
    centres, reduction = case.debug("centres"), case.decide()
    mixed = map_of(case, reduction)
    # An anchor is mixed with others unless nobody but itself chose it; a salient token never is, a replaced one is.
    salient = case.tensors.get("debug.salient", torch.zeros(0)).flatten().nonzero().squeeze(1)
    several = reduction.keep[(mixed > 0).sum(1) > 1]
    assert torch.isin(several, torch.cat([centres, salient])).all()
    if len(salient):
        assert torch.equal(torch.cat([centres, salient]).sort().values, reduction.keep)


@cases_with("debug.tfd", "debug.static", "debug.segments")
def test_fingerprints_and_static_positions(case: Case) -> None:
    want, static = case.debug("tfd"), case.debug("static").bool()
    features, method = case.tensors["features"], case.build()
    count = floor(method.static_ratio * features.shape[1])
    for k, (start, end) in enumerate(case.debug("segments").tolist()):
        got = ops.cosine_fingerprint(features[start:end])
        if end - start == 1:
            assert want[k].isnan().all() and not static[k].any() and got.eq(0).all()
            continue
        torch.testing.assert_close(got, want[k], atol=1e-6, rtol=1e-4)
        assert_same_choice(ops.top_tokens(-got[None], count)[0], static[k], -want[k].double())


@cases_with("debug.H", "debug.w", "debug.score", "debug.segments")
def test_segment_scores_and_weights(case: Case) -> None:
    entropy, weights, score = (case.debug(name).double() for name in ("H", "w", "score"))
    features = case.tensors["features"]
    segments = case.debug("segments").tolist()
    got = torch.stack([ops.spectral_entropy(features[start:end].flatten(0, 1)) for start, end in segments])
    torch.testing.assert_close(got, entropy, atol=1e-5, rtol=0)
    length = torch.tensor([end - start for start, end in segments]).double()
    torch.testing.assert_close(weights, length * torch.sigmoid(case.build().temperature * score), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(case.decide().notes["weights"].double(), weights, atol=1e-4, rtol=1e-4)


@cases_with("debug.replaced", "debug.salient", "debug.segments")
def test_replaced_tokens_carry_their_segments_mean(case: Case) -> None:
    replaced = case.debug("replaced").bool()
    salient = case.debug("salient").bool()
    features, reduction = case.tensors["features"], case.decide()
    out = reduction.apply(features.flatten(0, 1))
    p, slot = features.shape[1], {int(i): k for k, i in enumerate(reduction.keep)}
    for start, end in case.debug("segments").tolist():
        for f, position in (replaced & salient)[start:end].nonzero().tolist():
            mean = features[start:end, position].mean(0)
            torch.testing.assert_close(out[slot[(start + f) * p + position]], mean, atol=1e-5, rtol=1e-5)
        for f, position in (salient & ~replaced)[start:end].nonzero().tolist():
            assert torch.equal(out[slot[(start + f) * p + position]], features[start + f, position])


# -- the judging of the one near-tie -----------------------------------------------------------------------------------
def paper_shape() -> tuple[Case, Reduction, dict[int, int]]:
    case = next(c for c in load_cases(OWN) if c.name == "fastvid-paper_shape")
    reduction = case.decide()
    return case, reduction, near_tie_anchors(case, reduction)


def joining(case: Case, reduction: Reduction, token: int, leaves: int, joins: int) -> Reduction:
    """The reduction with `token` merged into the anchor `joins` instead of `leaves`, at the weights it had."""
    row = {int(i): k for k, i in enumerate(reduction.keep)}
    moved = (reduction.slot == row[leaves]) & (reduction.source == token)
    assert moved.sum() == 1
    slot = torch.where(moved, row[joins], reduction.slot)
    return Reduction(reduction.keep, reduction.num_source, slot, reduction.source, reduction.weight)


def test_paper_shape_has_one_near_tie() -> None:
    case, _, tied = paper_shape()
    assert len(tied) == 2 and len(set(tied.values())) == 1
    (token,) = set(tied.values())
    unit = torch.nn.functional.normalize(case.tensors["features"].flatten(0, 1).double(), dim=-1)
    a, b = (float(unit[token] @ unit[anchor]) for anchor in tied)
    assert abs(a - b) == pytest.approx(4.8e-6, rel=0.05)


def test_only_the_near_tie_is_excused() -> None:
    case, reduction, tied = paper_shape()
    features = case.tensors["features"].flatten(0, 1)
    (token,) = set(tied.values())
    sources = {anchor: reduction.source[reduction.slot == int((reduction.keep == anchor).nonzero())] for anchor in tied}
    leaves = next(anchor for anchor in tied if token in sources[anchor])
    joins = next(anchor for anchor in tied if anchor != leaves)
    other = joining(case, reduction, token, leaves, joins)
    assert sorted(assert_same_tokens(case, other.apply(features), reduction)) == sorted(tied)
    # Any other token moved between the same two anchors' neighbours is a mistake.
    stranger = next(int(i) for i in reduction.keep[reduction.slot.unique()] if int(i) not in tied)
    row = int((reduction.keep == stranger).nonzero())
    member = next(int(i) for i in reduction.source[reduction.slot == row] if int(i) != stranger)
    with pytest.raises(AssertionError, match=str(stranger)):
        assert_same_tokens(case, joining(case, reduction, member, stranger, joins).apply(features), reduction)
