"""Times the steps of the methods against naive versions, which make N x N (or full) matrices or loop, in one run.

    python scripts/bench_inside.py --channels 3584 --grid 32x14x14 --repeat 3

Rounds are interleaved, two calls a round; a row gives the least of both times (what else runs on the machine only
adds), their ratio, and the memory that each takes beyond its input in a round of its own (CPU: resident memory, GPU:
allocated). The naive versions are those of straightforward.py. Tokens are synthetic shots of still and moving
positions; the decoder layer has Qwen2-7B's width and random weights. Only ratios of one run mean something.
"""

from __future__ import annotations

import argparse
import functools
import json
from dataclasses import dataclass, replace
from typing import Any

import straightforward as plain
import torch
from torch import Tensor, nn

from vidcompress import Site, VideoTokens, load, ops
from vidcompress.compat import ensure_torchvision

ensure_torchvision()  # looked for when transformers is imported

from vidcompress.engine.decoder_signals import LayerView  # noqa: E402
from vidcompress.engine.sequence import Sequence  # noqa: E402
from vidcompress.profiling import Work, device_at_hand, machine, megabytes, milliseconds  # noqa: E402


@dataclass
class Step:
    """One step: what it is, ours, the naive one if there is any, and bars: on time and memory relative to it, and on
    MB.
    """

    name: str
    ours: Work
    naive: Work | None
    time_bar: float | None = None
    memory_bar: float | None = None
    mb_bar: float | None = None


def synthetic(t: int, p: int, channels: int) -> Tensor:
    """[T, P, C] fp32: scenes of about eight frames, some positions still and some moving, twelve kinds of tokens."""
    draw = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw)

    basis = noise(64, channels) * (torch.arange(1, 65).float() ** -0.7)[:, None]
    common, frames = 0.7 * noise(channels), []
    for first in range(0, t, 8):
        kinds = noise(12, 64) @ basis
        kind = torch.randint(12, (p,), generator=draw)
        scene = kinds[kind] + 0.35 * noise(p, 64) @ basis + 0.25 * noise(p, channels)
        moves = torch.where(torch.rand(p, generator=draw) < 0.6, 0.05, 0.45)[:, None]
        for _ in range(min(8, t - first)):
            frames.append(common + scene + moves * (0.6 * noise(p, 64) @ basis + 0.3 * noise(p, channels)))
    video = torch.stack(frames)
    return video / video.std()


# -- what is measured --------------------------------------------------------------------------------------------------
def unified_steps(x: Tensor, ratio: float) -> list[Step]:
    """The steps of Unified before the LLM."""
    draw = torch.Generator().manual_seed(1)
    query, key = (torch.randn(4, 16, 729, 72, generator=draw) for _ in range(2))
    order = torch.rand(len(x), generator=draw).argsort(descending=True)
    budget = max(10, round(ratio * len(x)))
    size = round(0.7 * budget)
    everything = torch.ones(1, len(x), dtype=torch.bool)
    centres = torch.randperm(len(x), generator=draw)[: budget - size].sort().values
    joined = ops.nearest(x, x[centres], "euclidean")
    weight = 1 / joined.bincount(minlength=len(centres)).clamp_min(1)[joined].float()
    own = torch.arange(len(x))
    return [
        Step(
            "received attention, 4 frames",
            lambda: ops.column_mean_attention(query, key, 72**-0.5),
            lambda: plain.received_attention(query, key, 72**-0.5),
            0.5,
        ),
        Step(
            f"retention pool, {size}",
            lambda: ops.retention_pool(x, order, 0.7, size),
            lambda: plain.retention_pool(x, order, 0.7, size),
            0.1,
        ),
        Step(
            f"retention pool, {size}, against a buffer",
            lambda: ops.retention_pool(x, order, 0.7, size),
            lambda: plain.retention_pool_in_a_buffer(x, order, 0.7, size),
        ),
        Step(
            f"density peaks, N = {len(x)}",
            lambda: ops.density_peaks(x[None], everything, 7),
            lambda: plain.density_peaks(x[None], 7),
            0.7,
            0.45,
        ),
        Step(
            f"nearest of {len(centres)} centres",
            lambda: ops.nearest(x, x[centres], "euclidean"),
            lambda: plain.nearest(x, centres),
        ),
        Step(
            "merging",
            lambda: ops.merge(x, centres, joined, own, weight),
            lambda: plain.merge(x, joined, len(centres)),
            0.25,
        ),
    ]


def local_steps(x: Tensor, p: int) -> list[Step]:
    """The steps that FastVID and InfoMerge take within a frame, or within a segment."""
    frames = x.unflatten(0, (-1, p))
    segment, everything = frames[:8], torch.ones(frames.shape[:2], dtype=torch.bool)
    return [
        Step(
            "density peaks, frame by frame",
            lambda: ops.density_peaks(frames, everything, 4),
            lambda: plain.density_peaks(frames, 4),
            0.6,
            0.6,
        ),
        Step(
            f"fingerprints of {len(segment)} frames",
            lambda: ops.cosine_fingerprint(segment),
            lambda: plain.cosine_fingerprint(segment),
            0.7,
        ),
        Step(
            f"spectral entropy of {segment.shape[0] * p}",
            lambda: ops.spectral_entropy(segment.flatten(0, 1)),
            lambda: plain.spectral_entropy(segment.flatten(0, 1)),
            0.25,
        ),
    ]


def longer_steps(t: int, p: int, channels: int) -> list[Step]:
    """Density peaks of a video twice as long, whose distances would take four times the memory."""
    x = synthetic(2 * t, p, channels).flatten(0, 1)
    everything = torch.ones(1, len(x), dtype=torch.bool)
    ours = functools.partial(ops.density_peaks, x[None], everything, 7)
    return [Step(f"density peaks, N = {len(x)}", ours, None, mb_bar=150)]


def video_of(x: Tensor, grid: tuple[int, int, int], shot: int) -> VideoTokens:
    """Tokens and the signals of a tower, which sees shots of so many frames."""
    draw = torch.Generator().manual_seed(5)
    mood = torch.randn(-(-grid[0] // shot), 1152, generator=draw).repeat_interleave(shot, 0)[: grid[0]]
    signals = {name: torch.rand(len(x), generator=draw) for name in ("saliency.received", "saliency.head")}
    signals["frame_features"] = mood + 0.2 * torch.randn(mood.shape, generator=draw)
    return VideoTokens(x, grid, signals=signals)


def whole_steps(x: Tensor, grid: tuple[int, int, int], ratio: float) -> list[Step]:
    """All that methods decide and merge before the LLM."""
    tokens, (t, h, w) = video_of(x, grid, 8), grid
    narrow = x[:, : max(1, x.shape[1] // 4)].contiguous().repeat(4, 1)
    long = video_of(narrow, (4 * t, h, w), 4 * t)
    methods: dict[str, Any] = {name: load(name, retention_ratio=ratio) for name in ("fastvid", "unified", "hieravid")}
    fastvid = methods["fastvid"] = replace(methods["fastvid"], remainder="official")  # as many anchors in every frame
    shot = replace(fastvid, dyseg_c=1, dyseg_tau=-1.0)

    def whole(method: Any, tokens: VideoTokens) -> Tensor:
        return method.decide(tokens, Site.projector()).apply(tokens.features)

    steps = [Step(f"{name}, all of it", functools.partial(whole, m, tokens), None) for name, m in methods.items()]
    steps[0] = replace(steps[0], naive=lambda: plain.fastvid(fastvid, tokens), time_bar=0.55, memory_bar=0.5)
    one = functools.partial(whole, shot, long)
    return [*steps, Step(f"fastvid, one shot of {4 * t} frames", one, lambda: plain.fastvid(shot, long), 0.35, 0.15)]


def merging_steps(x: Tensor, text: int, ratio: float) -> list[Step]:
    """The steps of text-aware merging, half of the tokens of `ratio` being kept."""
    draw = torch.Generator().manual_seed(4)
    x = x[torch.randperm(len(x), generator=draw)[: max(4, round(ratio * len(x)))].sort().values]
    words, keep, gone = torch.randn(text, x.shape[1], generator=draw), x[::2], x[1::2]
    return [
        Step(
            f"likeness of {len(x)} to {text} words",
            lambda: ops.max_cosine(x, words),
            lambda: plain.cosines(x, words).amax(1),
        ),
        Step(
            f"the likest of {len(keep)} for {len(gone)}",
            lambda: ops.nearest(gone, keep, "cosine"),
            lambda: plain.cosines(gone, keep).argmax(1),
        ),
    ]


def hieravid_steps(x: Tensor, p: int) -> list[Step]:
    """The steps of HieraVid: its segmentation, and the DPP of one long segment."""
    frames = x.unflatten(0, (-1, p))
    segment, n = x[: 8 * p], min(8 * p, len(x))
    relevance = torch.rand(n, generator=torch.Generator().manual_seed(2))
    steps = [
        Step(
            "change between frames",
            lambda: ops.frame_change(frames),
            lambda: 1 - nn.functional.cosine_similarity(frames[1:].double(), frames[:-1].double(), dim=-1),
        )
    ]
    for percent, bar in ((2, 0.35), (10, 0.45), (30, 0.8)):
        k = max(1, n * percent // 100)
        steps.append(
            Step(
                f"DPP, {k} of {n}",
                lambda k=k: ops.dpp_map(segment, relevance.log(), [n], [k]),
                lambda k=k: plain.dpp_map(segment, relevance, k),
                bar,
            )
        )
    return steps


def layer_steps(x: Tensor, text: int, heads: int, kv_heads: int) -> list[Step]:
    """Signals at one decoder layer, against the attention of all tokens to all that an eager layer makes."""
    from transformers import Qwen2Config
    from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer, Qwen2RotaryEmbedding

    channels = x.shape[1]
    config = Qwen2Config(
        hidden_size=channels,
        intermediate_size=channels,
        num_hidden_layers=1,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
    )
    config._attn_implementation = "eager"
    torch.manual_seed(3)
    layer = Qwen2DecoderLayer(config, 0).eval()
    hidden = torch.cat([x, torch.randn(text, channels)])[None]
    n = hidden.shape[1]
    rotary = Qwen2RotaryEmbedding(config)(hidden, torch.arange(n)[None])
    real = torch.ones(1, n, dtype=torch.bool)
    sequence = Sequence(hidden, real, torch.arange(n).view(1, 1, n), real[:, :0])
    visual, words = torch.arange(len(x)), torch.arange(len(x), n)

    def view() -> LayerView:
        return LayerView(layer, 0, sequence, rotary)

    @torch.no_grad()
    def eager() -> Tensor:
        mask = torch.full((n, n), -torch.inf).triu(1)[None, None]
        states = layer.input_layernorm(hidden)
        return layer.self_attn(states, position_embeddings=rotary, attention_mask=mask)[1]

    return [
        Step(
            f"attention of {text} text tokens to {len(x)}",
            lambda: view().signals(frozenset({"text_attention"}), 0, visual, words, words[-1:]),
            lambda: eager()[0, :, words][:, :, visual].mean(0).amax(0),
        ),
        Step(
            f"attention of the last token to {len(x)}",
            lambda: view().signals(frozenset({"last_query_attention"}), 0, visual, words, words[-1:]),
            lambda: eager()[0, :, -1][:, visual].mean(0),
        ),
    ]


def quickest(work: Work, device: torch.device) -> float:
    """Milliseconds of one call, or of a second one that finds caches and memory as the first has left them.

    What ran before may have been a step that maps gigabytes. A call of many seconds is not repeated.
    """
    first = milliseconds(work, device)
    return first if first > 5000 else min(first, milliseconds(work, device))


def main(arguments: list[str] | None = None) -> list[dict[str, object]]:
    """Prints a table (or JSON) and returns its rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grid", default="32x14x14")
    parser.add_argument("--channels", type=int, default=3584)
    parser.add_argument("--heads", type=int, default=28)
    parser.add_argument("--kv-heads", type=int, default=4)
    parser.add_argument("--text", type=int, default=50, help="text tokens after the video")
    parser.add_argument("--retention-ratio", type=float, default=0.1)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    device = device_at_hand()
    if device.type != "cpu":  # a default device, even this one, costs microseconds a call
        torch.set_default_device(device)
    t, h, w = (int(side) for side in options.grid.split("x"))
    with torch.device("cpu"):
        x = synthetic(t, h * w, options.channels)
    x = x.flatten(0, 1).to(device)
    steps = unified_steps(x, options.retention_ratio) + hieravid_steps(x, h * w) + local_steps(x, h * w)
    steps += layer_steps(x, options.text, options.heads, options.kv_heads)
    steps += whole_steps(x, (t, h, w), options.retention_ratio)
    steps += merging_steps(x, options.text, options.retention_ratio)
    steps += longer_steps(t, h * w, options.channels)
    times: list[list[tuple[float | None, float | None]]] = [[] for _ in steps]
    for _ in range(options.repeat):
        for step, rounds in zip(steps, times, strict=True):
            rounds.append((quickest(step.ours, device), step.naive and quickest(step.naive, device)))
    memory = [(megabytes(step.ours, device), step.naive and megabytes(step.naive, device)) for step in steps]
    rows = [_row(step, *both) for step, both in zip(steps, zip(times, memory, strict=True), strict=True)]
    about = machine() | {"grid": options.grid, "channels": options.channels}
    if options.json:
        print(json.dumps({**about, "rows": rows}, indent=1))
    else:
        print(", ".join(f"{k} {v}" for k, v in about.items()))
        print("  ".join(f"{name:<{max(10, len(name))}}" for name in rows[0]))
        for row in rows:
            print("  ".join(f"{'-' if v is None else v!s:<{max(10, len(k))}}" for k, v in row.items()))
    torch.set_default_device(None)
    return rows


def _row(
    step: Step, times: list[tuple[float | None, float | None]], memory: tuple[float | None, float | None]
) -> dict[str, object]:
    ms, naive_ms = (
        None if None in column else min(t for t in column if t is not None) for column in zip(*times, strict=True)
    )
    mb, naive_mb = memory
    ratio = ms / naive_ms if ms is not None and naive_ms is not None else None
    share = mb / naive_mb if mb is not None and naive_mb else None
    bars = [(ratio, step.time_bar), (share, step.memory_bar), (mb, step.mb_bar)]
    held = [value <= bar for value, bar in bars if value is not None and bar is not None]
    return {
        "step": f"{step.name:<44}",
        "ms": _rounded(ms, 3),
        "naive_ms": _rounded(naive_ms, 3),
        "ratio": _rounded(ratio, 3),
        "bar": step.time_bar,
        "mb": _rounded(mb, 0),
        "naive_mb": _rounded(naive_mb, 0),
        "memory": _rounded(share, 3),
        "memory_bar": step.memory_bar,
        "mb_bar": step.mb_bar,
        "held": all(held) if held else None,
    }


def _rounded(value: float | None, digits: int) -> float | None:
    return None if value is None else round(value, digits)


if __name__ == "__main__":
    main()
