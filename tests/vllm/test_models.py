"""Tiny models of every backbone, served in this process: counts, answers and positions, against transformers."""

from __future__ import annotations

import checkpoints
import numpy as np
import pytest
import torch
from served import STEPS, Ask, Local, one, served
from vllm.exceptions import VLLMValidationError

from vidcompress import Site, VideoTokens, load
from vidcompress.serving.positions import of_prompt

some = pytest.mark.parametrize("some_kind", ["llava_onevision", "qwen2_5_vl"])
RATIO = 0.3
FRAME = {"llava_onevision": (3, 3), "qwen2_vl": (4, 6), "qwen2_5_vl": (4, 6)}  # rows and columns of tokens
IMAGE = checkpoints.clip(1, seed=5)[0]


def compression(kind: str, checkpoint, method: str = "infomerge", ratio: float = RATIO) -> dict:
    """A method whose signals are those of the tower, and few segments for few frames."""
    settings = {"method": method, "retention_ratio": ratio, "dyseg_c": 2}
    return {**settings, "siglip_head": str(checkpoint / "siglip")} if kind == "llava_onevision" else settings


def several(kind: str) -> list[Ask]:
    """Prompts that stock vLLM takes: it fails where LLaVA-OneVision's videos of other lengths come together."""
    first, second = checkpoints.clip(8), checkpoints.clip(8 if kind == "llava_onevision" else 4, seed=3)
    return [one(8, seed=1), one(24, seed=2), Ask([first, "a", IMAGE, "b", second, "c"])]


@pytest.fixture(scope="module", params=checkpoints.KINDS)
def kind(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def stock(kind, checkpoint):
    """What a stock server answers to `several`, and the positions of all it computed."""
    with served(kind, checkpoint(kind)) as server:
        return [(server.answer([ask]), list(server.positions)) for ask in several(kind)]


@pytest.fixture(scope="module")
def pair(kind, stock, checkpoint):
    """A server and a model of transformers that compress alike; started when the stock server has ended."""
    said = compression(kind, checkpoint(kind))
    with served(kind, checkpoint(kind), said) as server:
        yield server, Local(kind, checkpoint(kind), said)


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


OTHERS = ["random", "uniform_frames", "tome", "dycoke_outer", "vidcom2", "divprune", "fastvid"]


def test_other_methods(pair, checkpoint):
    server, local = pair
    asks = [one(8, seed=7), Ask([IMAGE, "b", checkpoints.clip(24, seed=8), "c"])]
    usual = compression(server.kind, checkpoint(server.kind))
    try:
        for name in OTHERS:
            said = {**usual, "method": name} if name == "fastvid" else {"method": name}
            local.compress(said)
            with server.serving(said):
                assert server.answer(asks) == [local.answer(ask) for ask in asks], name
    finally:
        local.compress(usual)


def test_numbering_anew(pair, checkpoint):
    server, local = pair
    said = {"method": "uniform_tokens", "retention_ratio": 0.2, "positions": "renumber"}
    ask = Ask([IMAGE, "b", checkpoints.clip(24), "c"])
    local.compress(said)
    try:
        with server.serving(said):
            found = server.answer([ask], salt="anew")  # nothing of it is cached
            everything = torch.cat(server.positions, -1)
            assert torch.equal(everything, torch.arange(found[0][0] + STEPS - 1).expand_as(everything))
            assert found == [local.answer(ask)]
    finally:
        local.compress(compression(server.kind, checkpoint(server.kind)))


def test_everything_kept_is_stock(pair, stock, checkpoint):
    server, _ = pair
    with server.serving(compression(server.kind, checkpoint(server.kind), ratio=1.0)):
        for ask, (answers, positions) in zip(several(server.kind), stock, strict=True):
            assert server.answer([ask]) == answers
            assert all(torch.equal(a, b) for a, b in zip(server.positions, positions, strict=True))


def test_other_settings_share_no_cache(pair, checkpoint):
    server, _ = pair
    ask = one(24, seed=11)
    server.answer([ask])
    assert server.answer([ask]) and server.cached[0] > 0
    with server.serving({**compression(server.kind, checkpoint(server.kind)), "temperature": 3.0}):
        server.answer([ask])
        assert server.cached == [0]  # the first block of 32 holds some of the video


def test_a_video_of_nan_does_not_stop_the_others(pair):
    server, _ = pair
    fine = server.answer([one(8, seed=12)], salt="before")
    tower = server.model.vision_tower if server.kind == "llava_onevision" else server.model.visual
    normal = tower.forward
    tower.forward = lambda *args, **kwargs: normal(*args, **kwargs) * np.nan
    try:
        assert len(server.answer([one(8, seed=13)])[0][1]) == STEPS
    finally:
        tower.forward = normal
    assert server.answer([one(8, seed=12)], salt="after") == fine


@some
def test_prefill_in_chunks(some_kind, checkpoint):
    folder = checkpoint(some_kind)
    said, asks = compression(some_kind, folder), [one(24, seed=i, words=f"What is {i}?") for i in range(3)]
    small = {"max_num_batched_tokens": 48, "enable_chunked_prefill": True, "max_num_seqs": 4}
    with served(some_kind, folder, said, **small) as server:
        local = Local(some_kind, folder, said)
        assert server.answer(asks) == [local.answer(ask) for ask in asks]
        assert max(p.shape[-1] for p in server.positions) <= 48


@some
def test_ranks_decide_the_same(some_kind, checkpoint):
    folder = checkpoint(some_kind)
    said, asks = compression(some_kind, folder), [one(8, seed=i) for i in range(3)]
    with served(some_kind, folder, said, tensor_parallel_size=2) as server:
        local = Local(some_kind, folder, said)
        assert server.answer(asks) == [local.answer(ask) for ask in asks]


def test_positions_in_bfloat16(checkpoint):
    kind, said = "qwen2_5_vl", {"method": "uniform_tokens", "retention_ratio": 0.05}
    ask = one(1100, seed=1)
    with served(kind, checkpoint(kind), said, dtype="bfloat16", max_model_len=2048) as server:
        server.answer([ask])
        tokenizer = server.engine.get_tokenizer()
        first = tokenizer(ask.text(kind))["input_ids"].index(tokenizer.convert_tokens_to_ids("<|video_pad|>"))
        grid = (550, *FRAME[kind])
        keep = load(said).reduce(VideoTokens(torch.zeros(550 * 24, 1), grid), Site.projector()).keep
        time, row, column = torch.cat(server.positions, -1)[:, first : first + len(keep)] - first
        assert torch.equal(time, 2 * (keep // 24)) and time.max() > 1000
        assert torch.equal(row, keep // 6 % 4) and torch.equal(column, keep % 6)
