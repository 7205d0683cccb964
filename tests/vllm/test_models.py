"""Tiny models of every backbone, served in this process: counts, answers and positions, against transformers."""

from __future__ import annotations

import checkpoints
import numpy as np
import pytest
import torch
from served import STEPS, Ask, Local, one, served
from vllm.exceptions import VLLMValidationError

from vidcompress import load
from vidcompress.serving.positions import of_prompt

kinds = pytest.mark.parametrize("kind", checkpoints.KINDS)
RATIO = 0.3
FRAME = {"llava_onevision": (3, 3), "qwen2_vl": (4, 6), "qwen2_5_vl": (4, 6)}  # rows and columns of tokens
IMAGE = checkpoints.clip(1, seed=5)[0]


def compression(kind: str, checkpoint, method: str = "infomerge", ratio: float = RATIO) -> dict:
    """A method whose signals are those of the tower, and few segments for few frames."""
    settings = {"method": method, "retention_ratio": ratio, "dyseg_c": 2}
    return {**settings, "siglip_head": str(checkpoint / "siglip")} if kind == "llava_onevision" else settings


@pytest.fixture(scope="module", params=checkpoints.KINDS)
def pair(request, checkpoint):
    """A server and a model of transformers that compress alike."""
    kind, folder = request.param, checkpoint(request.param)
    said = compression(kind, folder)
    with served(kind, folder, said) as server:
        yield server, Local(kind, folder, said)


def text_length(server, ask: Ask) -> int:
    """Tokens of a prompt with one video, without it."""
    return len(server.engine.get_tokenizer()(ask.text(server.kind))["input_ids"]) - 1


def test_counts_and_answers_are_those_of_transformers(pair):
    server, local = pair
    for frames in (4, 8, 24):  # 24: positions in time beyond those of rows and columns
        ask = one(frames, seed=frames)
        ((length, tokens),) = server.answer([ask])
        times = frames if server.kind == "llava_onevision" else frames // 2
        kept = load("infomerge", retention_ratio=RATIO).budget((times, *FRAME[server.kind]))
        newline = server.kind == "llava_onevision"
        assert length == text_length(server, ask) + kept + newline
        assert (length, tokens) == local.answer(ask)


def test_several_videos_and_an_image(pair):
    server, local = pair
    # transformers takes LLaVA-OneVision's videos of equal length only
    first, second = checkpoints.clip(8, seed=1), checkpoints.clip(8 if server.kind == "llava_onevision" else 4, seed=2)
    for parts in (["a", first, "b", second, "c"], [IMAGE, "b", first, "c"], [first, "then", IMAGE, "and", second, "?"]):
        ask = Ask(parts)
        (found,) = server.answer([ask])
        assert found == local.answer(ask)


def test_a_prompt_without_video_is_served_as_ever(pair):
    server, local = pair
    for ask in (Ask(["hello"]), Ask([IMAGE, "what?"])):
        assert server.answer([ask])[0] == local.answer(ask)


def test_together_or_one_by_one(pair):
    server, _ = pair
    asks = [one(4 + 2 * (i % 3), seed=i, words=f"What is {i}?") for i in range(16)]
    alone = [server.answer([ask], salt=f"alone {i}")[0] for i, ask in enumerate(asks)]
    assert len({tuple(tokens) for _, tokens in alone}) > 8
    assert server.answer(asks, salt="together") == alone


def test_a_prefix_that_holds_the_whole_video(pair):
    server, local = pair
    ask = one(24, seed=3, words="What happens here, and what happened before it, and why does it happen?")
    miss = server.answer([ask], salt="a")
    length, positions = miss[0][0], list(server.positions)
    assert server.cached == [0]
    hit = server.answer([ask], salt="a")
    (cached,) = server.cached
    ids = server.engine.get_tokenizer()(ask.text(server.kind))["input_ids"]
    behind = len(ids) - 1 - ids.index(local.model.config.video_token_id)  # tokens after the video
    assert length - behind <= cached < length, "the cache is to cover the video"
    assert hit == miss == [local.answer(ask)]
    # what was computed anew had the same positions, the answer's too
    first, again = (torch.cat([p[0], *p[1:]], -1) for p in (positions, server.positions))
    assert again.shape[-1] == first.shape[-1] - cached and torch.equal(again, first[..., cached:])


def test_text_stands_where_it_would_without_compression(pair):
    server, local = pair
    ask = one(24, seed=4)
    ((length, _),) = server.answer([ask])
    found = torch.cat(server.positions, -1)
    if server.kind == "llava_onevision":
        assert torch.equal(found, torch.arange(length + STEPS - 1))
        return
    local.answer(ask)
    inputs = local.inputs(ask)
    (ids,) = inputs.pop("input_ids")
    positions, delta = of_prompt(len(ids), local.media(ids, **inputs))
    stays = ids != local.model.config.video_token_id
    kept = local.handle.trace.last.steps[0].reduction.keep
    stays[(~stays).nonzero()[kept, 0]] = True
    answer = len(ids) + delta + torch.arange(STEPS - 1)
    assert torch.equal(found, torch.cat([positions[:, stays], answer.expand(3, -1)], -1))


def test_bad_prompts_fail_alone(pair):
    server, _ = pair
    video = checkpoints.clip(4)
    place = checkpoints.places(server.kind)["video"]
    if server.kind == "llava_onevision":
        pytest.skip("needs to know nothing of a prompt but its counts")
    with pytest.raises(ValueError, match="write no placeholder yourself"):
        server.answer([Ask([video, "a", place])])
    with pytest.raises(ValueError, match="there must be text"):
        server.engine.generate([{**server.prompt(Ask([video])), "prompt": "ab<|video_pad|>"}], use_tqdm=False)
    with pytest.raises(VLLMValidationError, match="longer than the maximum model length"):
        server.answer([one(600)])
    assert server.answer([one(8)]) == server.answer([one(8)])


@kinds
def test_everything_kept_is_stock(kind, checkpoint):
    asks = [
        one(8, seed=1),
        one(24, seed=2),
        Ask([checkpoints.clip(4), "a", IMAGE, "b", checkpoints.clip(8, seed=3), "c"]),
    ]
    folder = checkpoint(kind)
    with served(kind, folder) as server:
        stock, positions = server.answer(asks), server.positions[0].clone()
    with served(kind, folder, compression(kind, folder, ratio=1.0)) as server:
        assert server.answer(asks) == stock
        assert torch.equal(server.positions[0], positions)


@kinds
def test_prefill_in_chunks(kind, checkpoint):
    folder = checkpoint(kind)
    asks = [one(24, seed=i, words=f"What is {i}?") for i in range(3)]
    said = compression(kind, folder)
    with served(kind, folder, said) as server:
        whole = server.answer(asks)
    small = {"max_num_batched_tokens": 24, "enable_chunked_prefill": True}
    with served(kind, folder, said, **small, max_num_seqs=4) as server:
        assert server.answer(asks) == whole
        assert max(p.shape[-1] for p in server.positions) <= 24 < whole[0][0]


@kinds
def test_ranks_decide_the_same(kind, checkpoint):
    folder = checkpoint(kind)
    asks = [one(8, seed=i) for i in range(3)]
    said = compression(kind, folder, "fastvid")
    with served(kind, folder, said) as server:
        single = server.answer(asks)
    with served(kind, folder, said, tensor_parallel_size=2) as server:
        assert server.answer(asks) == single


@pytest.mark.parametrize("method", ["uniform_frames", "tome", "dycoke", "vidcom2", "divprune", "prunevid_outer"])
@pytest.mark.parametrize("kind", ["llava_onevision", "qwen2_5_vl"])
def test_other_methods(kind, method, checkpoint):
    said = {"method": method}
    with served(kind, checkpoint(kind), said) as server:
        ask = one(8, seed=7)
        assert server.answer([ask])[0] == Local(kind, checkpoint(kind), said).answer(ask)


@pytest.mark.parametrize("kind", ["qwen2_vl", "qwen2_5_vl"])
def test_positions_in_bfloat16(kind, checkpoint):
    folder = checkpoint(kind)
    said = {"method": "uniform_tokens", "retention_ratio": 0.05}
    with served(kind, folder, said, dtype="bfloat16", max_model_len=2048) as server:
        ask = one(1100, seed=1)
        ((length, _),) = server.answer([ask])
        times = server.positions[0][0, :length]
        kept = load(said).budget((550, 1, 12))
        own = times[20 : 20 + kept] - 20
        index = torch.div(torch.arange(kept) * 550 * 12, kept, rounding_mode="floor") // 12
        assert own.max() > 512 and (own.diff() >= 0).all() and len(own.unique()) > 200
        assert torch.isin(own, index.unique() * (2 if kind == "qwen2_5_vl" else 1)).float().mean() > 0.9


def test_numbering_anew(checkpoint):
    kind, said = "qwen2_5_vl", {"method": "uniform_tokens", "retention_ratio": 0.2, "positions": "renumber"}
    ask = Ask([IMAGE, "b", checkpoints.clip(24), "c"])
    with served(kind, checkpoint(kind), said) as server:
        ((length, tokens),) = server.answer([ask])
        assert torch.equal(server.positions[0][:, :length], torch.arange(length).expand(3, -1))
        assert (length, tokens) == Local(kind, checkpoint(kind), said).answer(ask)


def test_a_video_of_nan_does_not_stop_the_others(checkpoint):
    kind = "llava_onevision"
    folder = checkpoint(kind)
    with served(kind, folder, compression(kind, folder)) as server:
        fine = server.answer([one(8)])
        tower, normal = server.model.vision_tower, server.model.vision_tower.forward
        tower.forward = lambda *args, **kwargs: normal(*args, **kwargs) * np.nan
        assert len(server.answer([one(8, seed=9)])[0][1]) == STEPS
        tower.forward = normal
        assert server.answer([one(8)], salt="fresh") == fine
