"""CDPruner: recorded runs of the official code, exact counts, and what relevance does."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from baseline_cases import GRIDS, KINDS, RATIOS, clip
from recorded import recorded
from tiny import ONE, compress, generate, llava, llava_inputs
from torch import Tensor
from torch.nn.functional import normalize

import vidcompress
from vidcompress.method import floor
from vidcompress.methods.cdpruner import CDPruner
from vidcompress.tokens import Site, VideoTokens

FIRST = Site.decoder(0)
CASES = recorded("cdpruner")


@dataclass(kw_only=True)
class WithCLIP(CDPruner):
    """Compares CLIP's embeddings with each other, as the code does, where the tokens have others."""

    embeds: Any = None

    def likeness(self, tokens: VideoTokens) -> Tensor:
        return super().likeness(replace(tokens, features=self.embeds))


@pytest.mark.parametrize("implementation", ["torch", "naive"])
@pytest.mark.parametrize("name", CASES)
def test_as_recorded(name: str, implementation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # A batch of images is a video, an image a frame.
    monkeypatch.setenv("VIDCOMPRESS_OPS", implementation)
    facts, case = CASES[name]
    params = facts["params"]
    features, count = case["in.image_features"], params["visual_token_num"]
    t, p, _ = features.shape
    tokens = VideoTokens(features.flatten(0, 1), (t, 1, p), signals={"text_hidden": case["in.text_embeds"]})
    embeds = case["in.image_embeds"].flatten(0, 1)
    method = WithCLIP(relevant="unlike", retention_ratio=count / p, embeds=embeds)
    torch.testing.assert_close(method.relevance(tokens).view(t, p).float(), case["out.relevance"], atol=1e-5, rtol=1e-4)
    reduction = method.decide(tokens, FIRST)
    start = torch.arange(t)[:, None] * p
    assert torch.equal(reduction.notes["order"].view(t, count), case["out.index"] + start)
    assert torch.equal(reduction.keep.view(t, count), case["out.index_ascending"] + start)
    assert torch.equal(torch.zeros(t * p).index_fill(0, reduction.keep, 1).view(t, p).bool(), case["out.mask"].bool())
    # The other sign keeps others.
    assert not torch.equal(replace(method, relevant="like").decide(tokens, FIRST).keep, reduction.keep)


@pytest.mark.parametrize("relevant", ["like", "unlike"])
def test_by_definition(relevant: str) -> None:
    # Greedy by determinants: each pick makes the determinant of the kept tokens' kernel largest.
    tokens = clip((2, 3, 4), "cuts", 16)
    unit = normalize(tokens.features.double(), dim=-1)
    likeness = (unit @ normalize(tokens.signal("text_hidden").double(), dim=-1).T).mean(1)
    value = likeness if relevant == "like" else -likeness
    r = (value - value.min() + 1e-6) / (value.max() - value.min())
    kernel = r[:, None] * (unit @ unit.T) * r
    reduction = CDPruner(retention_ratio=0.4, relevant=relevant).decide(tokens, FIRST)
    assert reduction.notes["counts"] == [5, 4]
    want: list[int] = []
    for frame, count in ((range(12), 5), (range(12, 24), 4)):
        picked: list[int] = []
        for _ in range(count):
            left = [i for i in frame if i not in picked]
            dets = [kernel[[*picked, i]][:, [*picked, i]].det() for i in left]
            picked.append(left[int(torch.stack(dets).argmax())])
        want += picked
    assert reduction.notes["order"].tolist() == want


def test_text_decides() -> None:
    # Orthogonal tokens span nothing of each other, so that relevance alone counts.
    tokens = VideoTokens(torch.eye(12), (2, 2, 3), signals={"text_hidden": torch.linspace(0, 1, 12)[None]})
    keep = CDPruner(retention_ratio=0.5).decide(tokens, FIRST).keep.tolist()
    assert keep == [3, 4, 5, 9, 10, 11]
    assert CDPruner(retention_ratio=0.5, relevant="unlike").decide(tokens, FIRST).keep.tolist() == [0, 1, 2, 6, 7, 8]
    # Several tokens of text count by their direction, all alike.
    text = torch.stack([torch.eye(12)[2], 100 * torch.eye(12)[8]])
    kept = CDPruner(retention_ratio=1 / 6).decide(replace(tokens, signals={"text_hidden": text}), FIRST)
    assert kept.keep.tolist() == [2, 8]


def test_equally_relevant_tokens_are_chosen_by_diversity() -> None:
    tokens = VideoTokens(torch.tensor([[1.0, 0], [1, 0], [0, 1]]), (1, 1, 3), signals={"text_hidden": torch.ones(1, 2)})
    assert CDPruner(retention_ratio=0.7).decide(tokens, FIRST).keep.tolist() == [0, 2]
    assert CDPruner().relevance(tokens).tolist() == [1, 1, 1]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: "x".join(map(str, grid)))
def test_any_grid_and_ratio(grid: tuple[int, int, int], kind: str) -> None:
    tokens = clip(grid, kind)
    for ratio in RATIOS:
        method = CDPruner(retention_ratio=ratio)
        reduction = method.decide(tokens, FIRST)
        assert method.exact and len(reduction) == max(1, floor(ratio * len(tokens)))
        assert reduction.is_identity == (len(reduction) == len(tokens))
        counts = reduction.notes.get("counts", [0])
        assert max(counts) - min(counts) <= 1


def test_after_another_method() -> None:
    # Frames of 6, 0 and 2 tokens: half of each.
    index = torch.tensor([0, 1, 2, 3, 4, 5, 12, 15])
    tokens = clip((3, 2, 3), "cuts")
    tokens = VideoTokens(tokens.features[index], (3, 2, 3), index, tokens.signals)
    reduction = CDPruner(retention_ratio=0.5).decide(tokens, FIRST)
    assert reduction.notes["counts"] == [3, 0, 1] and len(reduction) == 4


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"relevant": "alike"}, "relevant must be one of 'like', 'unlike', got 'alike'"),
        ({"layer": -1}, "layer must be at least 0, got -1"),
        ({"eps": -1.0}, "eps must be at least 0, got -1"),
    ],
)
def test_bad_settings(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=f"cdpruner: {says}"):
        CDPruner(**settings)


def test_on_a_model() -> None:
    model, inputs = llava(), llava_inputs([ONE])
    seen = []
    with compress(model, "cdpruner", retention_ratio=0.3) as handle:
        hook = model.model.language_model.layers[0].self_attn.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(kwargs["hidden_states"].shape[1]), with_kwargs=True
        )
        generate(model, inputs, 3)
        hook.remove()
        step = handle.trace.last.steps[0]
        assert (step.before, step.after, str(step.site)) == (24, 7, "decoder[0]")
        assert step.reduction.notes["counts"] == [2, 1, 1, 1, 1, 1]
        assert step.after == vidcompress.load("cdpruner", retention_ratio=0.3).count(FIRST, step.grid, 24, 24)
    # No layer runs over what is removed: two words, seven tokens, the newline, three words; then one at a time.
    assert seen == [13, 1, 1]
    # What is asked decides.
    other = dict(inputs, input_ids=inputs["input_ids"].clone())
    other["input_ids"][0, -3:] = torch.tensor([101, 102, 103])
    kept = []
    with compress(model, "cdpruner", retention_ratio=0.3) as handle:
        for asked in (inputs, other):
            model(**asked)
            kept.append(handle.trace.last.steps[0].reduction.keep.tolist())
    assert kept[0] != kept[1]
