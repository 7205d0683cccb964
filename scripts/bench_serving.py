"""Offers a vLLM server more and more video requests at a time, with and without compression.

    python scripts/bench_serving.py --model llava-hf/llava-onevision-qwen2-7b-ov-hf --frames 32 --dtype bfloat16
    python tests/vllm/checkpoints.py llava_onevision tiny      # for any machine, where only the curves' shapes count
    python scripts/bench_serving.py --model tiny -- --enforce-eager --max-model-len 2048

Both servers run one after the other in one run, each asked the same. Weights are random (`--load-format dummy`; say
`auto` for a checkpoint's own), so that answers mean nothing and times are real. Every request has a clip of its own,
which no cache knows. A row is one level of concurrency: that many requests are always under way, until each has been
made `--rounds` times. `kv_use` is the largest part of the KV cache in use, as vLLM's metrics say.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import math
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vidcompress.compat import require

KV_METRIC = "vllm:kv_cache_usage_perc"
QUESTION = "What happens in this video?"


@dataclass
class Row:
    """What was measured at one level of concurrency; times in milliseconds, rates a second."""

    compression: str
    concurrency: int
    requests: int
    failed: int
    prompt_tokens: int
    requests_per_s: float
    output_tokens_per_s: float
    ttft_p50_ms: float
    ttft_p99_ms: float
    kv_use: float


def quantile(values: list[float], q: float) -> float:
    """The nearest-rank quantile; nan of nothing."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(q * len(ordered)) - 1)] if ordered else float("nan")


def make_clips(folder: Path, count: int, frames: int, side: int) -> list[Path]:
    """So many different mp4s: a square crosses noise."""
    import av
    import numpy as np

    paths = [folder / f"clip{number}.mp4" for number in range(count)]
    for number, path in enumerate(paths):
        generator = np.random.default_rng(number)
        still = generator.integers(0, 120, (side, side, 3), dtype=np.uint8)
        with av.open(str(path), "w") as container:
            stream = container.add_stream("mpeg4", rate=12)
            stream.width = stream.height = side
            stream.pix_fmt = "yuv420p"
            for at in np.linspace(0, side * 3 // 4, frames).astype(int):
                picture = still.copy()
                picture[side // 3 : side // 2, at : at + side // 4] = (250, number % 250, 40)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            container.mux(stream.encode())
    return paths


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@contextlib.contextmanager
def server(options: argparse.Namespace, compression: str | None, folder: Path) -> Iterator[str]:
    """The address of a server that is ready; SystemExit with the end of its log if it does not start."""
    port, log = free_port(), folder / "server.log"
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", options.model]
    command += ["--served-model-name", "bench", "--host", "127.0.0.1", "--port", str(port), "--dtype", options.dtype]
    command += ["--load-format", options.load_format, "--allowed-local-media-path", str(folder)]
    command += ["--media-io-kwargs", json.dumps({"video": {"num_frames": options.frames}}), *options.server]
    if compression is not None:
        command += ["--hf-overrides", json.dumps({"vidcompress": json.loads(compression)})]
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env={**os.environ})
    address, deadline = f"http://127.0.0.1:{port}", time.monotonic() + options.start_s
    try:
        while not _answers(f"{address}/health"):
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"the server did not start:\n{log.read_text()[-3000:]}")
            time.sleep(1)
        yield address
    finally:
        process.terminate()
        process.wait(60)


def _answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(address, timeout=10) as reply:
            return reply.status == 200
    except OSError:
        return False


def kv_use(address: str) -> float:
    """The part of the KV cache that is in use now, from 0 to 1."""
    with urllib.request.urlopen(f"{address}/metrics", timeout=10) as reply:
        lines = reply.read().decode().splitlines()
    return max((float(line.split()[-1]) for line in lines if line.startswith(KV_METRIC)), default=float("nan"))


async def one(client: Any, clip: Path, new_tokens: int) -> tuple[float, int, int]:
    """(seconds to the first token, tokens of the prompt, of the answer) of one request."""
    content = [
        {"type": "video_url", "video_url": {"url": clip.resolve().as_uri()}},
        {"type": "text", "text": QUESTION},
    ]
    start, first, usage = time.perf_counter(), 0.0, None
    stream = await client.chat.completions.create(
        model="bench",
        messages=[{"role": "user", "content": content}],
        max_tokens=new_tokens,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"ignore_eos": True},
    )
    async for part in stream:
        first = first or time.perf_counter() - start
        usage = part.usage or usage
    return first, usage.prompt_tokens, usage.completion_tokens


async def level(address: str, name: str, clips: list[Path], concurrency: int, new_tokens: int) -> Row:
    """One level of concurrency over all these clips."""
    from openai import AsyncOpenAI, OpenAIError

    client = AsyncOpenAI(base_url=f"{address}/v1", api_key="none", timeout=3600, max_retries=0)
    waiting, done, failed, most = iter(clips), [], 0, 0.0

    async def worker() -> None:
        nonlocal failed
        for clip in waiting:
            try:
                done.append(await one(client, clip, new_tokens))
            except OpenAIError as error:
                failed += 1
                print(f"{name}, {concurrency} at a time: {error}", file=sys.stderr)

    async def watch() -> None:
        nonlocal most
        while True:
            most = max(most, await asyncio.to_thread(kv_use, address))
            await asyncio.sleep(0.05)

    watching = asyncio.create_task(watch())
    start = time.perf_counter()
    await asyncio.gather(*(worker() for _ in range(concurrency)))
    seconds = time.perf_counter() - start
    watching.cancel()
    await client.close()
    firsts = [1000 * first for first, _, _ in done]
    return Row(
        compression=name,
        concurrency=concurrency,
        requests=len(clips),
        failed=failed,
        prompt_tokens=max((prompt for _, prompt, _ in done), default=0),
        requests_per_s=round(len(done) / seconds, 3),
        output_tokens_per_s=round(sum(new for _, _, new in done) / seconds, 2),
        ttft_p50_ms=round(quantile(firsts, 0.5), 1),
        ttft_p99_ms=round(quantile(firsts, 0.99), 1),
        kv_use=round(most, 4),
    )


def arguments(given: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="checkpoint: folder or hub id; only its config has to be there")
    parser.add_argument("--compression", help="JSON; default: vidcom2 at 0.1", action="append")
    parser.add_argument("--concurrency", default="1,2,4,8,16,32")
    parser.add_argument("--rounds", type=int, default=2, help="requests of each of those under way")
    parser.add_argument("--frames", type=int, default=32)
    parser.add_argument("--side", type=int, default=128, help="pixels of the clips' sides")
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--load-format", default="dummy")
    parser.add_argument("--start-s", type=float, default=900, help="seconds a server may take to start")
    parser.add_argument("--out", type=Path, help="a JSON file")
    parser.add_argument("server", nargs="*", help="after --: further options of the server")
    options = parser.parse_args(given)
    options.levels = [int(number) for number in options.concurrency.split(",")]
    if min(options.levels) < 1 or options.rounds < 1:
        parser.error("--concurrency and --rounds are at least 1")
    return options


def main(given: list[str] | None = None) -> list[dict[str, Any]]:
    """Prints a table, writes JSON if told where, and returns the rows."""
    options = arguments(given)
    require("vllm", "vllm", "openai")
    require("video", "av")
    from vidcompress.profiling import machine, save

    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        clips = make_clips(folder, 1 + sum(options.levels) * options.rounds, options.frames, options.side)
        chosen = options.compression or [json.dumps({"method": "vidcom2", "retention_ratio": 0.1})]
        print("  ".join(f"{name:>{max(len(name), 10)}}" for name in Row.__annotations__))
        for compression in [None, *chosen]:
            name = "none" if compression is None else compression
            with server(options, compression, folder) as address:
                asyncio.run(level(address, name, clips[:1], 1, options.new_tokens))  # warm-up
                following = iter(clips[1:])
                for concurrency in options.levels:
                    mine = [next(following) for _ in range(concurrency * options.rounds)]
                    rows.append(asyncio.run(level(address, name, mine, concurrency, options.new_tokens)))
                    print("  ".join(f"{v!s:>{max(len(k), 10)}}" for k, v in asdict(rows[-1]).items()), flush=True)
    found = [asdict(row) for row in rows]
    if options.out:
        about = machine() | {"model": options.model, "frames": options.frames, "dtype": options.dtype}
        save({**about, "rows": found}, options.out)
    return found


if __name__ == "__main__":
    main()
