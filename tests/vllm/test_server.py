"""vLLM's OpenAI server, started as a user starts it, and asked about videos behind URLs on the loopback."""

from __future__ import annotations

import functools
import json
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import checkpoints
import pytest
from transformers import AutoTokenizer

from vidcompress import load

FRAMES, RATIO = 8, 0.3


class Quiet(SimpleHTTPRequestHandler):
    """A file server that logs nothing."""

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def media(clips):
    """The address under which the clips are."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(clips)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.fixture(scope="module", params=["llava_onevision", "qwen2_5_vl"])
def api(request, checkpoint, tmp_path_factory):
    """(kind, address, log) of a server that compresses."""
    kind, log = request.param, tmp_path_factory.mktemp("log") / "server.log"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(checkpoint(kind))]
    command += ["--served-model-name", "tiny", "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32"]
    command += ["--enforce-eager", "--max-model-len", "512", "--block-size", "32"]
    command += ["--hf-overrides", json.dumps({"vidcompress": {"method": "vidcom2", "retention_ratio": RATIO}})]
    command += ["--media-io-kwargs", json.dumps({"video": {"num_frames": FRAMES}})]
    environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_LOGGING_LEVEL": "INFO"}
    with log.open("w") as out:
        server = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=environment)
    try:
        address = f"http://127.0.0.1:{port}"
        while not healthy(address):
            assert server.poll() is None, log.read_text()[-4000:]
            time.sleep(1)
        yield kind, address, log
    finally:
        server.terminate()
        server.wait(60)


def healthy(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address}/health", timeout=10) as reply:
            return reply.status == 200
    except OSError:
        return False


def ask(address: str, url: str, words: str = "What happens?") -> tuple[int, dict]:
    """(status, reply) of a chat about the video at `url`."""
    content = [{"type": "video_url", "video_url": {"url": url}}, {"type": "text", "text": words}]
    body = {"model": "tiny", "messages": [{"role": "user", "content": content}], "max_tokens": 4, "temperature": 0}
    request = urllib.request.Request(f"{address}/v1/chat/completions", json.dumps(body).encode())
    request.add_header("Content-Type", "application/json")
    try:
        with urllib.request.urlopen(request, timeout=600) as reply:
            return reply.status, json.loads(reply.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def test_a_video_behind_a_url(api, media, checkpoint):
    kind, address, log = api
    status, reply = ask(address, f"{media}/good.mp4")
    assert status == 200, reply
    grid, newline = ((FRAMES, 3, 3), 1) if kind == "llava_onevision" else ((FRAMES // 2, 4, 6), 0)
    text = f"<|im_start|>user\n{checkpoints.places(kind)['video']}What happens?<|im_end|>\n<|im_start|>assistant\n"
    tokenizer = AutoTokenizer.from_pretrained(checkpoint(kind))
    expected = len(tokenizer(text)["input_ids"]) - 1 + load("vidcom2", retention_ratio=RATIO).budget(grid) + newline
    assert reply["usage"]["prompt_tokens"] == expected
    lines = [line for line in log.read_text().splitlines() if "vidcompress" in line and "is active" in line]
    assert sum("(config)" in line for line in lines) == sum("(model)" in line for line in lines) == 1


def test_a_corrupt_video_fails_alone(api, media):
    _, address, _ = api
    names = ["good.mp4", "corrupt.mp4", "good.mp4", "corrupt.mp4", "good.mp4"]
    with ThreadPoolExecutor(len(names)) as pool:
        found = list(pool.map(lambda i: ask(address, f"{media}/{names[i]}", f"What is {i}?"), range(len(names))))
    assert [status == 200 for status, _ in found] == [name == "good.mp4" for name in names]
    assert all(400 <= status < 600 and reply["error"]["message"] for status, reply in found if status != 200)
    assert healthy(address) and ask(address, f"{media}/good.mp4")[0] == 200
