"""Methods against recorded runs (golden/README.md): the same tokens, the same vectors, the same steps on the way.

`GOLDEN=<folder>` tries other files of the same format.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from neartie import TOLERANCE, assert_same_choice
from safetensors import safe_open
from torch import Tensor

from vidcompress import ops
from vidcompress.engine.decoder_signals import LayerView
from vidcompress.engine.sequence import Sequence
from vidcompress.method import Method, Pipeline, floor, list_methods
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


@dataclass(frozen=True)
class Inside:
    """One recorded run that takes place inside the LLM, or goes on there."""

    name: str
    facts: dict[str, Any]
    tensors: dict[str, Tensor] = field(repr=False)

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def stage(self, number: int) -> dict[str, Tensor]:
        """The tensors of one stage, by their own names."""
        prefix = f"stage{number}."
        return {k.removeprefix(prefix): v for k, v in self.tensors.items() if k.startswith(prefix)}


def read(folder: Path) -> Iterator[tuple[Path, str, dict[str, Any], dict[str, Tensor]]]:
    """(file, case, its metadata, its tensors) of every recorded run in the files of `folder`."""
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
            cases = json.loads(file.metadata()["cases"])
        for name, facts in cases.items():
            own = {k.removeprefix(f"{name}."): v for k, v in tensors.items() if k.startswith(f"{name}.")}
            yield path, name, facts, own


def load_cases(folder: Path) -> Iterator[Case]:
    """Every recorded run of an outer method; files of other formats hold no `<case>.attention`, or no `.features`."""
    for path, name, facts, own in read(folder):
        if not {"features", "attention", "keep", "tokens"} <= own.keys():
            continue
        recorded = facts.get("method", path.stem)
        for method in BOTH_NAMES.get(recorded, (recorded,)):
            params = facts.get("params")
            if params is None and method in list_methods():
                known = {f.name for f in fields(list_methods()[method])}
                params = {k: v for k, v in facts.items() if k in known} | {"remainder": "official"}
            grid = tuple(facts.get("grid") or (*own["features"].shape[:2], 1))
            case = f"{path.stem}-{name}" if method == recorded else f"{path.stem}-{name}-{method}"
            yield Case(case, method, params, grid, own)


def load_inside(folder: Path, *tensors: str) -> list[Inside]:
    """The recorded runs that hold these tensors."""
    return [Inside(f"{p.stem}-{n}", facts, own) for p, n, facts, own in read(folder) if own.keys() >= set(tensors)]


BOTH_NAMES = {"unified": ("unified", "unified_pool")}
"""Methods of which a part is a method of its own."""

FOLDER = Path(os.environ.get("GOLDEN", OWN))
CASES = list(load_cases(FOLDER))
MERGED = load_inside(FOLDER, "visual", "text", "probs")
HIERAVID = load_inside(FOLDER, "features", "stage1.keep", "stage4.keep")
FASTV = load_inside(FOLDER, "attention", "hidden", "order_image_keep")
PYRAMIDDROP = load_inside(FOLDER, "features", "wq", "wk", "prompt_len")
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def each(cases: list[Inside]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.name)


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


def dense(shape: tuple[int, int], slot: Tensor, source: Tensor, weight: Tensor) -> Tensor:
    """[K, N] fp64."""
    return torch.zeros(shape, dtype=torch.float64).index_put_((slot, source), weight.double(), accumulate=True)


def map_of(reduction: Reduction) -> Tensor:
    """[K, N] fp64 of a reduction; slots without triplets hand their own token on."""
    k = len(reduction)
    shape = (k, reduction.num_source)
    slot, source = torch.arange(k), reduction.keep
    if reduction.slot is None:
        return dense(shape, slot, source, torch.ones(k))
    alone = ~torch.isin(slot, reduction.slot)
    columns = zip(
        (slot[alone], source[alone], torch.ones(int(alone.sum()))),
        (reduction.slot, reduction.source, reduction.weight),
        strict=True,
    )
    return dense(shape, *(torch.cat(column) for column in columns))


def assert_same_map(reduction: Reduction, tensors: dict[str, Tensor]) -> None:
    """The map is the recorded one, and every survivor's weights sum to 1."""
    got = map_of(reduction)
    want = dense(tuple(got.shape), *(tensors[f"mix.{name}"] for name in ("slot", "source", "weight")))
    torch.testing.assert_close(got, want, atol=1e-5, rtol=0)
    torch.testing.assert_close(got.sum(1), torch.ones(len(got), dtype=torch.float64), atol=1e-5, rtol=0)


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
    inside = [
        load_inside(OWN, "visual", "text", "probs"),
        load_inside(OWN, "features", "stage1.keep", "stage4.keep"),
        load_inside(OWN, "attention", "hidden", "order_image_keep"),
        load_inside(OWN, "features", "wq", "wk", "prompt_len"),
    ]
    tried = {c.name.split("-")[0] for c in [*cases, *(c for some in inside for c in some)]}
    assert sorted(tried) == sorted(p.stem for p in OWN.glob("*.safetensors"))
    assert len(cases) == 4 + 2 + 8 + 2 * 6
    assert [len(some) for some in inside] == [4, 6, 2, 2]
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
    assert_same_map(case.decide(), case.tensors)


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
    mixed = map_of(reduction)
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


@cases_with("debug.pool_in_visit_order", "debug.centres", "debug.cluster_of_token")
def test_pool_and_clusters(case: Case) -> None:
    reduction = case.decide()
    assert torch.equal(reduction.notes["pool"], case.debug("pool_in_visit_order"))
    assert torch.equal(reduction.notes["centres"], case.debug("centres"))
    cluster = torch.full((reduction.num_source,), -1)
    if reduction.slot is not None:
        cluster[reduction.source] = reduction.keep[reduction.slot]
    assert torch.equal(cluster, case.debug("cluster_of_token"))


# -- merging inside the LLM --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["text_aware_merge", "unified"])
@each(MERGED)
def test_same_tokens_inside(case: Inside, name: str) -> None:
    params = dict(case.facts["params"])
    if name == "text_aware_merge":
        params["retention_ratio"] = params.pop("keep_ratio")
    method = list_methods()[name](**params)
    signals = {"text_attention": case["probs"].mean(0).amax(0), "text_hidden": case["text"]}
    n = len(case["visual"])
    tokens = VideoTokens(case["visual"], (1, 1, n), torch.arange(n), signals)
    site = method.sites()[-1]
    assert method.count(site, tokens.grid, n, n) == len(case["keep"])
    torch.testing.assert_close(signals["text_attention"], case["debug.attention_max"], atol=1e-6, rtol=1e-5)
    likeness = ops.max_cosine(case["visual"], case["text"]).float()
    torch.testing.assert_close(likeness, case["debug.similarity_max"], atol=1e-6, rtol=1e-5)
    reduction = method.decide(tokens, site)
    assert torch.equal(reduction.keep, case["keep"])
    torch.testing.assert_close(reduction.apply(case["visual"]), case["tokens"], atol=1e-4, rtol=0)
    assert_same_map(reduction, case.tensors)


# -- HieraVid, stage after stage ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("implementation", ["torch", "naive"])
@each(HIERAVID)
def test_same_tokens_at_all_stages(case: Inside, implementation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VIDCOMPRESS_OPS", implementation)
    method = list_methods()["hieravid"](**case.facts["params"])
    grid = tuple(case.facts["grid"])
    features = case["features"].flatten(0, 1)
    site, *inner = method.sites()
    reduction = method.decide(VideoTokens(features, grid), site)
    index, entered, notes = reduction.keep, len(reduction), dict(reduction.notes)
    assert torch.equal(index, case["stage1.keep"])
    torch.testing.assert_close(reduction.apply(features), case["stage1.tokens"], atol=1e-4, rtol=0)
    assert_same_map(reduction, case.stage(1))
    for number, site in enumerate(inner, 2):
        stage = case.stage(number)
        signals = {"last_text_hidden": stage["last"]}
        reduction = method.decide(VideoTokens(stage["hidden"], grid, index, signals, notes, entered), site)
        notes = {**notes, **reduction.notes}  # as the engine hands them on
        assert torch.equal(reduction.keep, stage["local"]) and reduction.slot is None
        index = index[reduction.keep]
        assert torch.equal(index, stage["keep"])
        if number > 2 and not reduction.is_identity:
            assert notes["sizes"] == stage["sizes"].tolist() and notes["budgets"] == stage["budgets"].tolist()


@each(HIERAVID)
def test_schedule(case: Inside) -> None:
    method, grid = list_methods()["hieravid"](**case.facts["params"]), tuple(case.facts["grid"])
    debug, counts = case.stage(1), case.facts["counts"]
    assert method.fractions() == pytest.approx(debug["debug.fractions"].tolist(), rel=1e-6)
    assert list(Pipeline.of(method).counts(grid).values()) == counts == debug["debug.counts"].tolist()
    assert method.budget(grid) == counts[0]


@each(HIERAVID)
def test_marks_and_segments(case: Inside) -> None:
    method, debug, features = list_methods()["hieravid"](**case.facts["params"]), case.stage(1), case["features"]
    t, p, _ = features.shape
    change = ops.frame_change(features)
    torch.testing.assert_close(1 - change.float(), debug["debug.similarity"], atol=1e-6, rtol=0)
    marked = ops.top_tokens(-change.flatten()[None], t * p - case.facts["counts"][0]).view(t - 1, p)
    assert torch.equal(marked.long(), debug["debug.marked"][1:])
    notes = method.decide(VideoTokens(features.flatten(0, 1), tuple(case.facts["grid"])), Site.projector()).notes
    assert [list(s) for s in notes["segments"]] == debug["debug.segments"].tolist()
    torch.testing.assert_close(notes["b"].float(), debug["debug.b"], atol=1e-5, rtol=0)
    torch.testing.assert_close(notes["z"].float(), debug["debug.z"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("implementation", ["torch", "naive"])
@pytest.mark.parametrize("number", [3, 4])
@each(HIERAVID)
def test_order_of_the_picks(case: Inside, number: int, implementation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VIDCOMPRESS_OPS", implementation)
    stage, params = case.stage(number), case.facts["params"]
    hidden = stage["hidden"]
    relevance = ops.minmax((hidden.double() @ stage["last"].double() / hidden.shape[1] ** 0.5).softmax(0))
    torch.testing.assert_close(relevance.float(), stage["relevance"], atol=1e-6, rtol=1e-4)
    sizes, counts = stage["sizes"].tolist(), stage["budgets"].tolist()
    kernel = params.get("kernel", "dot")
    order = ops.dpp_map(hidden, relevance.double().log(), sizes, counts, params["rank_eps"], kernel)
    assert torch.equal(order, stage["order"])


@each(HIERAVID)
def test_order_by_relevance(case: Inside) -> None:
    stage = case.stage(2)
    logits = stage["hidden"].double() @ stage["last"].double() / stage["hidden"].shape[1] ** 0.5
    torch.testing.assert_close(logits.float(), stage["logits"], atol=1e-5, rtol=1e-5)
    chosen = logits.topk(len(stage["local"])).indices.sort().values
    assert torch.equal(chosen, stage["local"])


# -- FastV and PyramidDrop ---------------------------------------------------------------------------------------------
@each(FASTV)
def test_fastv_keeps_the_same(case: Inside) -> None:
    row = case["attention"].mean(0)[-1]  # [n] of the last query
    start, length = case.facts.get("sys_length", 35), case.facts.get("image_length", 576)
    places = torch.arange(start, start + length)
    count = len(case["order_image_keep"])
    method = list_methods()["fastv"](retention_ratio=count / length)
    signals = {"last_query_attention.previous": row[places]}
    tokens = VideoTokens(case["hidden"][places], (1, 1, length), torch.arange(length), signals)
    (site,) = method.sites()
    assert method.count(site, tokens.grid, length, length) == count
    stays = torch.ones(len(row), dtype=torch.bool)
    stays[places] = False
    stays[places[method.decide(tokens, site).keep]] = True
    keep = stays.nonzero().squeeze(1)
    assert torch.equal(keep, case["keep"])
    assert torch.equal(case["hidden"][keep], case["tokens"])


def ranking_layer(wq: Tensor, wk: Tensor, heads: int) -> SimpleNamespace:
    """What a view of a decoder layer calls: RMSNorm of weight 1, and two projections without bias."""
    size = wq.shape[0] // heads
    attention = SimpleNamespace(
        q_proj=lambda x: x @ wq.T,
        k_proj=lambda x: x @ wk.T,
        head_dim=size,
        scaling=size**-0.5,
    )
    return SimpleNamespace(
        input_layernorm=lambda x: x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt(), self_attn=attention
    )


def rotary(positions: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """(cos, sin), each [B, L, D], base 1e4."""
    angle = positions[..., None] * 1e4 ** -(torch.arange(0, size, 2) / size)
    return torch.cat([angle, angle], -1).cos(), torch.cat([angle, angle], -1).sin()


@each(PYRAMIDDROP)
def test_pyramiddrop_keeps_the_same(case: Inside) -> None:
    # The engine's view of a layer gives the signal, the method decides on it, the engine's sequence is shortened.
    facts, lengths = case.facts, case["lengths"].tolist()
    method = list_methods()["pyramiddrop"](layers=facts["layer_list"], ratios=facts["ratios"])
    assert method.positions == "renumber"
    batch, longest, width = case["features"].shape
    column = torch.arange(longest)
    mask = column < torch.tensor(lengths)[:, None]
    sequence = Sequence(case["features"], mask, (column * mask)[None], torch.zeros(batch, 0, dtype=torch.bool))
    origin = column.expand(batch, -1)  # [B, L] the first sequence's column of every token
    entered = case["image_tokens"].tolist()
    index = [torch.arange(n) for n in entered]
    places = [start + i for start, i in zip(case["image_start"].tolist(), index, strict=True)]
    for site, wq, wk in zip(method.sites(32), case["wq"], case["wk"], strict=True):
        number = site.stage
        turn = rotary(sequence.positions[0], width // facts["heads"])
        view = LayerView(ranking_layer(wq, wk, facts["heads"]), site.layer, sequence, turn)
        stays = sequence.mask.clone()
        for row in range(batch):
            if not len(places[row]):
                continue
            last = sequence.mask[row].nonzero()[-1]
            signals = view.signals(method.needs, row, places[row], last, last)
            recorded = f"stage{number}.sample{row}"
            attention = signals["last_query_attention"]
            torch.testing.assert_close(attention, case[f"{recorded}.attention"], atol=1e-6, rtol=1e-4)
            seen = sequence.embeds[row, places[row]]
            tokens = VideoTokens(seen, (1, 1, entered[row]), index[row], signals, entered=entered[row])
            keep = method.decide(tokens, site).keep
            assert torch.equal(keep, case[f"{recorded}.keep_local"])
            stays[row, places[row]] = False
            stays[row, places[row][keep]] = True
            index[row] = index[row][keep]
        columns = [row.nonzero().squeeze(1) for row in stays]
        sequence, moved = sequence.shortened(columns, [method.positions == "renumber"] * len(columns))
        origin = origin.gather(1, moved)
        for row in range(batch):
            real = sequence.mask[row]
            if len(places[row]):
                assert torch.equal(origin[row, real], case[f"stage{number}.sample{row}.keep"])
                places[row] = torch.isin(origin[row], case["image_start"][row] + index[row]).nonzero().squeeze(1)
                places[row] = places[row][real[places[row]]]
            right = case[f"stage{number}.mask"][row].bool()
            assert torch.equal(sequence.positions[0, row, real], case[f"stage{number}.position_ids"][row, right])
    for row in range(batch):
        real = sequence.mask[row]
        assert torch.equal(sequence.embeds[row, real], case["final_features"][row, : int(real.sum())])


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
