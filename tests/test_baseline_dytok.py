"""DyToK: recorded runs of its official code, budgets by hand, and first looks of models against the oracle."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import oracle
import pytest
import torch
from baselines import PROJECTOR, clip
from recorded import recorded
from reductions import dense, per_frame
from test_engine_generate import agrees, empty_cache, needs_grouped_videos
from tiny import (
    FRAMES,
    LATE,
    ONE,
    TWO,
    Attentive,
    InnerMix,
    anatomy,
    compress,
    generate,
    llava,
    llava_inputs,
    pair,
    step_logits,
)
from tiny_qwen import qwen, qwen_inputs
from torch import Tensor, nn
from transformers import StaticCache

import vidcompress
from vidcompress.costs import MODELS, dimensions, estimate, flops
from vidcompress.engine.decoder_signals import LayerView
from vidcompress.engine.sequence import Sequence
from vidcompress.first_look import FirstLook, frame_budgets
from vidcompress.method import Pipeline
from vidcompress.methods.dytok import DyToK
from vidcompress.methods.prumerge import PruMerge
from vidcompress.tokens import VideoTokens

CASES = recorded("dytok")


# -- recorded runs -----------------------------------------------------------------------------------------------------
def looked(query: Tensor, key: Tensor, places: Tensor) -> Tensor:
    """[M] the library's look at one layer whose projections are recorded: query [H, D], key [G, n, D]."""
    (heads, d), n = query.shape, key.shape[1]
    columns = torch.arange(n, dtype=torch.float32).view(1, n, 1)  # as hidden states
    attention = SimpleNamespace(
        q_proj=lambda hidden: query.view(1, 1, heads * d),
        k_proj=lambda hidden: key[:, hidden[0, :, 0].long()].transpose(0, 1).flatten(1)[None],
        head_dim=d,
        scaling=d**-0.5,
    )
    layer = SimpleNamespace(input_layernorm=nn.Identity(), self_attn=attention)
    mask = torch.ones(1, n, dtype=torch.bool)
    tokens = Sequence(columns, mask, torch.arange(n).view(1, 1, n), mask[:, :0])
    rotary = torch.ones(1, n, d), torch.zeros(1, n, d)  # the recorded ones are rotated already
    return LayerView(layer, 0, tokens, rotary).look(0, places, torch.tensor([n - 1]))


@pytest.mark.parametrize("implementation", ["torch", "naive"])
@pytest.mark.parametrize("name", CASES)
def test_as_recorded(name: str, implementation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VIDCOMPRESS_OPS", implementation)
    facts, case = CASES[name]
    frames, m = facts["frames"], facts["visual_length"] - 1  # the last of them is the newline
    places = facts["visual_start"] + torch.arange(m)
    looks = [looked(query, key, places) for query, key in zip(case["query"], case["keys"], strict=True)]
    by_layer = torch.stack([look.view(frames, -1).mean(1) for look in looks])
    torch.testing.assert_close(by_layer, case["layer_frame_weights"], rtol=1e-4, atol=1e-7)
    weights = by_layer.mean(0)
    torch.testing.assert_close(weights / weights.sum(), case["frame_weights"], rtol=1e-4, atol=1e-7)
    budgets = frame_budgets(weights.tolist(), facts["total"], facts["upper_limit"])
    assert budgets == case["budgets"].tolist()
    # What the method asks of a video of which frames are so often looked at.
    p = max(m // frames, facts["upper_limit"])  # frames of the recorded budgets hold more than were looked at
    paid = weights[:, None].expand(-1, p).flatten()
    tokens = VideoTokens(torch.zeros(frames * p, 1), (frames, p, 1), signals={"first_look": paid})
    method = DyToK(retention_ratio=facts["total"] / (frames * p), upper_limit=facts["upper_limit"])
    assert method.shares(tokens, frames) == budgets


@pytest.mark.parametrize("implementation", ["torch", "naive"])
def test_tokens_as_recorded(implementation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VIDCOMPRESS_OPS", implementation)
    facts, case = CASES["with_compression"]
    t, p = case["saliency"].shape
    places = facts["visual_start"] + torch.arange(t * p)
    looks = [looked(query, key, places) for query, key in zip(case["query"], case["keys"], strict=True)]
    signals = {
        "saliency.received": case["saliency"].flatten(),
        "tower_keys": case["metric"].flatten(0, 1),
        "first_look": torch.stack(looks).mean(0),
    }
    tokens = VideoTokens(case["features"].flatten(0, 1), (t, p, 1), signals=signals)
    reduction = DyToK(retention_ratio=facts["total"] / (t * p)).decide(tokens, PROJECTOR)
    assert reduction.notes["dominant"] == case["dominant"].tolist()
    assert reduction.notes["contextual"] == case["contextual"].tolist()
    assert per_frame(reduction, tokens.grid) == case["budgets"].tolist()
    copied = dense(reduction).count_nonzero(1) == 1
    dominant = case["dominant_index"] + p * torch.arange(t).repeat_interleave(case["dominant"])
    assert torch.isin(dominant, reduction.keep).all()
    # The code hands a frame's dominant tokens on first, in their order, and then the contextual ones.
    order = []
    for frame, most in enumerate(reduction.notes["dominant"]):
        own = (reduction.keep // p == frame).nonzero().squeeze(1)
        first = torch.isin(reduction.keep[own], dominant)
        assert int(first.sum()) == most and copied[own[first]].all()
        order += [own[first], own[~first]]
    out = reduction.apply(tokens.features)[torch.cat(order)]
    torch.testing.assert_close(out, case["tokens"], rtol=1e-4, atol=1e-5)


# -- by hand -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("weights", "total", "most", "want"),
    [
        ([1, 1, 1, 1], 8, 4, [2, 2, 2, 2]),
        ([5, 3, 2], 10, 10, [5, 3, 2]),
        ([4, 4, 2], 9, 10, [4, 3, 2]),  # 3.6, 3.6, 1.8: the largest remainder is the last's, then the first's
        ([8, 1, 1], 10, 4, [4, 3, 3]),  # of four that do not fit two go round twice
        ([7, 2, 1], 10, 4, [4, 4, 2]),  # three: the second, the third, and the second, which is then full
        ([0, 0, 0], 4, 4, [2, 1, 1]),
        ([1, 0, 0], 3, 2, [2, 1, 0]),
        ([1, 1], 0, 3, [0, 0]),
    ],
)
def test_budgets_by_hand(weights: list[float], total: int, most: int, want: list[int]) -> None:
    assert frame_budgets(weights, total, most) == want


def test_budgets_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="9 tokens do not fit into 2 frames of at most 4"):
        frame_budgets([1, 2], 9, 4)


def test_a_limit_bounds_what_is_kept() -> None:
    method = DyToK(retention_ratio=0.5, upper_limit=3)
    assert method.budget((4, 5, 2)) == 12 and DyToK(retention_ratio=0.25, upper_limit=3).budget((4, 5, 2)) == 10
    assert method.shares(with_look(clip((4, 5, 2)), [9, 1, 1, 1]), 4) == [3, 3, 3, 3]


def with_look(tokens: VideoTokens, weights: list[float]) -> VideoTokens:
    """The clip, its frames looked at as much as that."""
    paid = torch.tensor(weights, dtype=torch.float32).repeat_interleave(len(tokens) // len(weights))
    return VideoTokens(tokens.features, tokens.grid, signals={**tokens.signals, "first_look": paid})


def test_a_frame_that_nobody_looks_at_vanishes() -> None:
    tokens = with_look(clip((4, 3, 3)), [0, 3, 1, 0])
    reduction = DyToK(retention_ratio=8 / 36).decide(tokens, PROJECTOR)
    assert per_frame(reduction, tokens.grid) == [0, 6, 2, 0]
    assert reduction.notes["dominant"] == [0, 5, 1, 0]


@dataclass(kw_only=True)
class LookingPruMerge(FirstLook, PruMerge):
    """The same budgets around another per-frame method."""

    needs = PruMerge.needs | {"first_look"}


def test_around_another_method() -> None:
    tokens = with_look(clip((4, 6, 6)), [1, 3, 2, 2])
    reduction = LookingPruMerge(retention_ratio=16 / 144).decide(tokens, PROJECTOR)
    assert per_frame(reduction, tokens.grid) == [2, 6, 4, 4]
    assert per_frame(PruMerge(retention_ratio=16 / 144).decide(tokens, PROJECTOR), tokens.grid) == [4] * 4


def test_which_layers_are_looked_at() -> None:
    assert DyToK().looks(24) == tuple(range(16, 24)) and DyToK(layers=[3, 1]).looks(28) == (3, 1)
    assert Pipeline([DyToK(layers=[3, 1]), InnerMix()]).looks(28) == (1, 3) and InnerMix().looks(28) == ()
    with pytest.raises(ValueError, match="dytok looks at layer 24; this decoder has 24 layers, 0 to 23"):
        Pipeline([DyToK(layers=[24])]).looks(24)


@pytest.mark.parametrize(
    ("settings", "error", "says"),
    [
        ({"layers": [-1]}, ValueError, "layers must be at least 0, got -1"),
        ({"layers": 3}, TypeError, "layers must be a list of int, got 3"),
        ({"upper_limit": 0}, ValueError, "upper_limit must be at least 1, got 0"),
        ({"scope": "video"}, ValueError, "scope must be one of 'frame', got 'video'"),
        ({"assistant": 3}, TypeError, "assistant must be"),
        ({"asistant": "tiny"}, ValueError, "dytok has no setting 'asistant'"),
    ],
)
def test_bad_settings(settings: dict[str, Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        vidcompress.load("dytok", **settings)


# -- what it costs -----------------------------------------------------------------------------------------------------
def test_the_look_is_counted() -> None:
    of, grid = MODELS["llava-onevision-7b"], (32, 14, 14)
    for layers, looked_layers in (([17, 3], 17), (None, 27), ([0], 0)):
        found = estimate(of, grid, DyToK(retention_ratio=0.25, layers=layers), text_tokens=50)
        reduced = flops("hieravid", of, [1568 + 50] * 28)
        whole = flops("hieravid", of, [6272 + 50] * 28)
        assert found.looked_layers == looked_layers
        assert sum(found.flops["hieravid"]) == sum(reduced) + sum(whole[:looked_layers])
        extra = sum(found.flops["unified"]) - sum(flops("unified", of, [1618] * 28))
        assert extra == sum(flops("unified", of, [6322] * 28, 0)[:looked_layers])  # nothing is written in it
    assert estimate(of, grid, DyToK(retention_ratio=1.0)).looked_layers == 0


# -- on models ---------------------------------------------------------------------------------------------------------
def method(**settings: Any) -> DyToK:
    return DyToK(**{"retention_ratio": 0.4, "layers": (1, 4)} | settings)


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("positions", ["keep", "renumber"])
def test_answers_as_recomputed(positions: str, attn: str) -> None:
    dytok = method(positions=positions)
    plain, model, handle = pair(dytok, attn=attn)
    inputs = llava_inputs([ONE, TWO, LATE])
    got = generate(model, inputs, 4)
    assert handle.trace.last.looked_at == [1, 4] and 0 < handle.trace.last.look_seconds <= handle.trace.last.seconds
    assert len({tuple(per_frame(s.reduction, s.grid)) for s in handle.trace.last.steps}) > 1
    uncached = generate(model, inputs, 4, use_cache=False)
    for b in range(3):
        expected = oracle.answer(plain, oracle.row(inputs, b), dytok, steps=4)
        agrees(got, inputs, expected, b)
        agrees(uncached, inputs, expected, b)


def test_in_a_pipeline() -> None:
    methods = Pipeline([method(), Attentive(layers=(2, 4), signal="last_query_attention.previous")])
    plain, model, _ = pair(methods)
    inputs = llava_inputs([TWO])
    agrees(generate(model, inputs, 4), inputs, oracle.answer(plain, inputs, methods, steps=4))


@pytest.mark.parametrize("later", [False, True], ids=["alone", "behind a turn that was reduced inside"])
def test_a_video_in_the_second_turn(later: bool) -> None:
    # It is looked at behind what earlier turns left in the cache, which stays as it was.
    first = Pipeline([InnerMix(layers=(2,), positions="renumber")] if later else [method()])
    second = Pipeline([method()])
    plain, model, handle = pair(first)
    whole = llava_inputs([[5, 6, "V", 7, 40, 41, "V", 42], [5, "V", 7, 40, 41, 43, "V", 42]])
    ids, mask, cut = whole["input_ids"], whole["attention_mask"], 3 + 4 * FRAMES + 1
    videos = [whole["pixel_values_videos"][turn::2].contiguous() for turn in range(2)]
    cache = empty_cache(model)
    with torch.no_grad():
        model(input_ids=ids[:, :cut], attention_mask=mask[:, :cut], pixel_values_videos=videos[0],
              past_key_values=cache)  # fmt: skip
    stored = [layer.keys.clone() for layer in cache.layers]
    handle.switch(second)
    got = generate(model, dict(whole, pixel_values_videos=videos[1]), 4, past_key_values=cache)
    for layer, before in zip(cache.layers, stored, strict=True):
        assert torch.equal(layer.keys[:, :, : before.shape[2]], before)
    for b in range(2):
        row = oracle.row(whole, b)
        at = cut - int((mask[b] == 0).sum())
        agrees(got, whole, oracle.answer(plain, row, second, steps=4, turns=[(at, first)]), b)


def test_behind_earlier_turns_a_cache_that_is_written_in_place_is_refused() -> None:
    model = llava()
    compress(model, method())
    whole = llava_inputs([[5, 6, 7, "V", 8]])
    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=64)
    with torch.no_grad():
        model(input_ids=whole["input_ids"][:, :2], past_key_values=cache)
        with pytest.raises(ValueError, match=r"a first look at a video behind earlier turns .* StaticCache"):
            model(**whole, past_key_values=cache)
    # As the first turn it is as good as any.
    kinds = ({}, {"cache_implementation": "static"})
    a, b = (generate(model, llava_inputs([ONE]), 3, **kind) for kind in kinds)
    torch.testing.assert_close(step_logits(a), step_logits(b), **oracle.TOLERANCE)


@needs_grouped_videos
def test_beams_are_looked_at_once() -> None:
    _, model, handle = pair(method())
    inputs = llava_inputs([TWO, ONE])
    greedy = generate(model, inputs, 3)
    kept = [s.reduction.keep for s in handle.trace.last.steps]
    beams = generate(model, inputs, 3, num_beams=2)
    again = {(s.row // 2, s.video): s.reduction.keep for s in handle.trace.last.steps}
    assert all(torch.equal(a, b) for a, b in zip(kept, again.values(), strict=True))
    assert beams.sequences.shape == greedy.sequences.shape


# -- an assistant ------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def twin(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The model itself, as a checkpoint."""
    folder = tmp_path_factory.mktemp("twin")
    llava().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def smaller(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model of half the depth, with eyes of its own."""
    folder = tmp_path_factory.mktemp("smaller")
    llava(layers=3, seed=5).save_pretrained(folder)
    return str(folder)


def kept(handle: Any) -> list[list[int]]:
    return [step.reduction.keep.tolist() for step in handle.trace.last.steps]


@pytest.mark.parametrize(
    "how", [{}, {"use_cache": False}, {"num_beams": 2}, {"num_return_sequences": 2, "do_sample": True}]
)
def test_a_twin_sees_what_the_model_sees(how: dict[str, Any], twin: str) -> None:
    _, alone, by_itself = pair(method())
    _, helped, by_twin = pair(method(assistant=twin))
    inputs = llava_inputs([TWO, ONE, LATE])
    outputs = []
    for model in (alone, helped):
        torch.manual_seed(0)
        outputs.append(generate(model, inputs, 4, **how))
    assert kept(by_twin) == kept(by_itself)
    assert len({tuple(per_frame(step.reduction, step.grid)) for step in by_twin.trace.last.steps}) > 1
    assert torch.equal(*(step_logits(output) for output in outputs))
    assert by_twin.trace.last.looked_at == [1, 4] and by_twin.trace.last.look_seconds > 0


@pytest.mark.parametrize("kind", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_a_twin_of_another_backbone(kind: str, tmp_path: Path) -> None:
    qwen(kind).save_pretrained(tmp_path)
    found = []
    for assistant in (None, str(tmp_path)):
        model = qwen(kind)
        handle = compress(model, method(assistant=assistant, layers=(1, 2)))
        output = generate(model, qwen_inputs(kind, [TWO, ONE]), 3)
        found.append((kept(handle), step_logits(output)))
    assert found[0][0] == found[1][0] and torch.equal(found[0][1], found[1][1])


def test_a_smaller_one_looks_with_its_own_eyes(smaller: str) -> None:
    inputs = llava_inputs([TWO, ONE])
    model, own = llava(), llava(layers=3, seed=5)
    shares = []
    for looked, settings in ((model, {"assistant": smaller}), (own, {})):
        handle = compress(looked, method(layers=None, **settings))
        generate(looked, inputs, 2)
        shares.append([per_frame(step.reduction, step.grid) for step in handle.trace.last.steps])
        assert handle.trace.last.looked_at == [2]
    assert shares[0] == shares[1]
    handle = compress(llava(), method())
    generate(handle.model, inputs, 2)
    assert shares[0] != [per_frame(step.reduction, step.grid) for step in handle.trace.last.steps]


def test_an_assistant_comes_and_goes(twin: str, smaller: str) -> None:
    _, model, handle = pair(method())
    inputs = llava_inputs([TWO])
    generate(model, inputs, 2)
    alone = kept(handle)
    for assistant in (twin, smaller, None):
        handle.switch(method(assistant=assistant, layers=(1, 2)))
        generate(model, inputs, 2)
    handle.switch(method())
    generate(model, inputs, 2)
    assert kept(handle) == alone
    with pytest.raises(ValueError, match=r"Look looks at layer 4; this decoder has 3 layers, 0 to 2"):
        handle.switch(method(assistant=smaller))
    with pytest.raises(OSError):
        handle.switch(method(assistant="/nowhere/at/all"))
    generate(model, inputs, 2)
    assert kept(handle) == alone


def test_an_assistant_reads_prompts_whole(twin: str) -> None:
    _, model, _ = pair(method(assistant=twin))
    inputs, cache = llava_inputs([[5, 6, "V", 7, 40]]), empty_cache(model)
    turn = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        model(input_ids=turn, past_key_values=cache)
        with pytest.raises(ValueError, match="a cache of 3 tokens is the model's own"):
            model(**inputs | {"attention_mask": None}, past_key_values=cache)
    embedded = dict(inputs)
    embedded["inputs_embeds"] = model.get_input_embeddings()(embedded.pop("input_ids"))
    with torch.no_grad(), pytest.raises(ValueError, match="it needs input_ids"):
        model(**embedded)


def test_images_beside_the_video(twin: str) -> None:
    """Older transformers, and any plain forward, hand their pixels on; where they are gone that is said."""
    inputs = llava_inputs([[5, 6, "I", 7, "V", 40, 41]])
    (_, alone, by_itself), (_, helped, by_twin) = pair(method()), pair(method(assistant=twin))
    with torch.no_grad():
        assert torch.equal(alone(**inputs).logits, helped(**inputs).logits)
    assert kept(by_twin) == kept(by_itself)
    try:
        got = generate(helped, inputs, 3)
    except ValueError as error:
        assert "it needs pixel_values; give a whole prompt" in str(error)
    else:
        assert torch.equal(step_logits(got), step_logits(generate(alone, inputs, 3)))


def test_an_assistant_of_another_vocabulary_is_refused(tmp_path: Path) -> None:
    qwen("qwen2_vl").save_pretrained(tmp_path)
    model = llava()
    with pytest.raises(ValueError, match="is a qwen2_vl, the model a llava_onevision"):
        compress(model, method(assistant=str(tmp_path)))
    other = llava()
    other.config.video_token_id = other.config.video_token_index = 9
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="writes videos as token 9, the model as"):
        compress(model, method(assistant=str(tmp_path / "other")))
    assert vidcompress.handle_of(model) is None


def test_the_look_of_an_assistant_is_counted(smaller: str) -> None:
    of, grid = MODELS["llava-onevision-7b"], (32, 14, 14)
    found = estimate(of, grid, DyToK(retention_ratio=0.25, assistant=smaller), text_tokens=50)
    own = dimensions(smaller)
    assert own.layers == 3 and found.looked_layers == 0
    assert found.assistant_flops == {name: sum(flops(name, own, [6322] * 3, 0)[:2]) for name in found.flops}
    assert found.flops["hieravid"] == flops("hieravid", of, [1618] * 28)
    assert estimate(of, grid, DyToK(retention_ratio=1.0, assistant=smaller)).assistant_flops == {}


def test_nothing_to_reduce_is_not_looked_at() -> None:
    plain, model, handle = pair(method(retention_ratio=1.0))
    inputs = llava_inputs([ONE, TWO])
    assert torch.equal(*(step_logits(generate(m, inputs)) for m in (plain, model)))
    assert handle.trace.last.looked_at == [] and handle.trace.last.look_seconds == 0


def test_the_look_leaves_no_trace_in_the_output() -> None:
    plain, model, _ = pair(method())
    inputs = llava_inputs([ONE])
    with torch.no_grad():
        prompt = oracle.shorten(plain, inputs, method())
        output = model(**inputs, output_hidden_states=True, output_attentions=False)
        assert len(output.hidden_states) == 7
        kept = output.hidden_states[0][0, prompt.columns]
        torch.testing.assert_close(kept, prompt.embeds[0], **oracle.TOLERANCE)
    # Weights learn from what is kept alone.
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] > 100, -100)
    expected, got = oracle.loss(plain, inputs, labels, method()), model(**inputs, labels=labels).loss
    expected.backward()
    got.backward()
    oracle.assert_same_gradients(plain, model)


def test_it_stops_at_the_last_layer_it_looks_at() -> None:
    _, model, handle = pair(method(layers=(0, 2)))
    ran: list[int] = []
    for i, layer in enumerate(model.model.language_model.layers):
        layer.register_forward_hook(lambda module, args, output, i=i: ran.append(i))
    with torch.no_grad():
        model(**llava_inputs([ONE]))
        assert ran == [0, 1, *range(6)]
        before = anatomy(model)
        handle.remove()
        ran.clear()
        model(**llava_inputs([ONE]))
    assert ran == [*range(6)] and anatomy(model) != before


def test_a_layer_that_is_not_there_is_refused() -> None:
    model = llava()
    before = anatomy(model)
    with pytest.raises(ValueError, match="dytok looks at layer 6; this decoder has 6 layers, 0 to 5"):
        compress(model, method(layers=(2, 6)))
    assert anatomy(model) == before
