"""The SigLIP pooling head: read from file, folder and hub, and run against transformers' full model.

The hub is a server on the loopback that speaks as much of the hub's API as `HfFileSystem` uses and counts the bytes of
every range it serves.
"""

from __future__ import annotations

import copy
import json
import logging
import pickle
import shutil
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import torch
from huggingface_hub import constants
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import SiglipConfig, SiglipModel, SiglipVisionConfig, SiglipVisionModel

from vidcompress.engine import siglip_head
from vidcompress.engine.siglip_head import SiglipHead, load_siglip_head

WIDTH, HEADS, PATCHES = 32, 4, 16
REPO = "google/tiny-siglip"
FIRST, SECOND = "a" * 40, "b" * 40


@pytest.fixture(autouse=True)
def _one_thread_and_a_reachable_loopback(monkeypatch):
    torch.set_num_threads(1)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def vision_config(**changes) -> SiglipVisionConfig:
    sizes = {"hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": HEADS}
    return SiglipVisionConfig(**{**sizes, "image_size": 16, "patch_size": 4, **changes})


def randomise(model: nn.Module) -> nn.Module:
    """Norms and biases start as ones and zeros, which would hide a mix-up."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


@pytest.fixture(scope="module")
def tower() -> SiglipVisionModel:
    return randomise(SiglipVisionModel(vision_config()))


@pytest.fixture(scope="module")
def run(tower):
    """Last encoder state, and the tower's own pooled output, of five frames."""
    seen = []
    hook = tower.post_layernorm.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        pooled = tower(torch.randn(5, 3, 16, 16, generator=torch.Generator().manual_seed(2))).pooler_output
    hook.remove()
    return seen[0], pooled


@pytest.fixture(scope="module")
def checkpoint(tower, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    tower.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tensors(checkpoint) -> dict[str, torch.Tensor]:
    """The checkpoint under the keys of google/siglip-*; whether a bare tower is saved so depends on transformers."""
    file = load_file(checkpoint / "model.safetensors")
    return {f"vision_model.{key.removeprefix('vision_model.')}": value for key, value in file.items()}


def of_head(key: str) -> bool:
    return key.removeprefix("vision_model.").startswith(("head.", "post_layernorm."))


def head_bytes(tensors) -> int:
    wanted = [value for key, value in tensors.items() if of_head(key)]
    assert len(wanted) == 13
    return sum(tensor.nbytes for tensor in wanted)


def assert_is_towers_head(head: SiglipHead, run) -> None:
    hidden, pooled = run
    features, attention = head(hidden)
    torch.testing.assert_close(features, pooled)
    torch.testing.assert_close(attention.sum(1), torch.ones(len(hidden)))


# Running the head ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def head(checkpoint) -> SiglipHead:
    return load_siglip_head(checkpoint, vision_config())


def test_attention_is_the_probes_softmax_per_head_averaged(head, run, tower):
    hidden, _ = run
    with torch.no_grad():
        z = tower.post_layernorm(hidden)  # [F, N, C]
        attention = tower.head.attention
        q_weight, k_weight, _ = attention.in_proj_weight.chunk(3)
        q_bias, k_bias, _ = attention.in_proj_bias.chunk(3)
        q = (tower.head.probe[0, 0] @ q_weight.T + q_bias).view(HEADS, -1)  # [H, d]
        k = (z @ k_weight.T + k_bias).view(len(z), PATCHES, HEADS, -1)  # [F, N, H, d]
        logits = torch.einsum("hd,fnhd->fhn", q, k) / (WIDTH // HEADS) ** 0.5
        expected = logits.softmax(-1).mean(1)
    assert expected.std() > 1e-3  # not uniform: otherwise any attention would pass
    torch.testing.assert_close(head(hidden)[1], expected)


def test_chunks_do_not_show(head, monkeypatch):
    hidden = torch.randn(7, PATCHES, WIDTH, generator=torch.Generator().manual_seed(3))
    sizes = []
    hook = head.post_layernorm.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    whole = head(hidden)
    monkeypatch.setattr(siglip_head, "FRAMES_PER_CHUNK", 3)
    chunked = head(hidden)
    hook.remove()
    assert sizes == [7, 3, 3, 1]
    torch.testing.assert_close(chunked, whole)


def test_at_most_64_frames_at_once(head):
    sizes = []
    hook = head.post_layernorm.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    features, attention = head(torch.zeros(130, 2, WIDTH))
    hook.remove()
    assert sizes == [64, 64, 2]
    assert features.shape == (130, WIDTH) and attention.shape == (130, 2)


def test_no_patches_by_patches_matrix(head):
    """With 2000 patches an N x N matrix per head would be 64 MB; the largest tensor made is k and v, [N, 2C]."""
    largest = 0

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            found = [t for t in (out if isinstance(out, (tuple, list)) else [out]) if isinstance(t, torch.Tensor)]
            largest = max(largest, *(t.numel() for t in found), 0)
            return out

    with Largest():
        head(torch.zeros(1, 2000, WIDTH))
    assert 2000 * WIDTH <= largest <= 2000 * 2 * WIDTH


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_computes_in_fp32_whatever_comes_in(head, run, dtype):
    hidden = run[0].to(dtype)
    features, attention = head(hidden)
    assert features.dtype == attention.dtype == torch.float32
    torch.testing.assert_close((features, attention), head(hidden.float()), rtol=0, atol=0)


def test_autocast_does_not_reach_it(head, run):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = head(run[0])
    torch.testing.assert_close(inside, head(run[0]), rtol=0, atol=0)


def test_no_gradient(head, run):
    features, attention = head(run[0].clone().requires_grad_())
    assert not features.requires_grad and not attention.requires_grad
    assert not any(p.requires_grad for p in (*head.head.parameters(), *head.post_layernorm.parameters()))


def test_loaded_and_used_in_inference_mode_then_outside(checkpoint, run):
    with torch.inference_mode():
        head = load_siglip_head(checkpoint, vision_config())
        head(run[0])
        head(torch.empty(1, 2, WIDTH, device="meta"))
    assert not head._on(torch.device("meta"))[1].probe.is_inference()
    assert_is_towers_head(copy.deepcopy(head), run)
    assert_is_towers_head(head, run)


def test_no_frames(head):
    features, attention = head(torch.zeros(0, PATCHES, WIDTH))
    assert features.shape == (0, WIDTH) and attention.shape == (0, PATCHES)


@pytest.mark.parametrize(
    "hidden",
    [
        torch.zeros(2, PATCHES, WIDTH + 1),
        torch.zeros(PATCHES, WIDTH),
        torch.zeros(2, 0, WIDTH),
        torch.zeros(2, PATCHES, WIDTH, dtype=torch.int64),
    ],
)
def test_bad_hidden_is_refused(head, hidden):
    with pytest.raises(ValueError, match=r"hidden has shape .* expected float patch features \[frames, .*, 32\]"):
        head(hidden)


def test_follows_its_input_and_keeps_its_weights(checkpoint, run):
    """The meta device stands in for an accelerator: a head that moved there in place would have lost its weights."""
    head = load_siglip_head(checkpoint, vision_config())
    on_meta = torch.empty(3, PATCHES, WIDTH, device="meta")
    features, attention = head(on_meta)
    assert (features.device.type, features.shape, attention.shape) == ("meta", (3, WIDTH), (3, PATCHES))
    copies = head._on(on_meta.device)
    assert head._on(on_meta.device) is copies  # one copy per device, not one per call
    assert_is_towers_head(head, run)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu(head, run):
    features, attention = head(run[0].cuda())
    assert features.is_cuda and attention.is_cuda
    torch.testing.assert_close((features.cpu(), attention.cpu()), head(run[0]), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda head: pickle.loads(pickle.dumps(head))])
def test_duplicates_are_whole_and_independent(checkpoint, run, duplicate):
    head = load_siglip_head(checkpoint, vision_config())
    head(torch.empty(1, 2, WIDTH, device="meta"))
    twin = duplicate(head)
    assert twin._copies == {} and len(head._copies) == 1
    with torch.no_grad():
        for parameter in (*head.head.parameters(), *head.post_layernorm.parameters()):
            parameter.zero_()
    assert_is_towers_head(twin, run)


def test_does_not_enter_the_model_it_hangs_on(checkpoint):
    model = nn.Linear(2, 2)
    keys, parameters = set(model.state_dict()), len(list(model.parameters()))
    model.siglip_head = load_siglip_head(checkpoint, vision_config())
    assert set(model.state_dict()) == keys and len(list(model.parameters())) == parameters
    assert isinstance(copy.deepcopy(model).siglip_head, SiglipHead)


def test_loading_leaves_the_random_state_alone(checkpoint):
    state = torch.get_rng_state()
    load_siglip_head(checkpoint, vision_config())
    assert torch.equal(torch.get_rng_state(), state)


def test_loading_ignores_default_dtype_and_device(checkpoint, run):
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            head = load_siglip_head(checkpoint, vision_config())
    finally:
        torch.set_default_dtype(torch.float32)
    assert_is_towers_head(head, run)


# Local checkpoints ---------------------------------------------------------------------------------------------------


def test_from_file_and_folder(checkpoint, run):
    for source in (checkpoint, str(checkpoint), checkpoint / "model.safetensors"):
        assert_is_towers_head(load_siglip_head(source, vision_config()), run)


@pytest.fixture(scope="module")
def sharded(tower, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sharded")
    tower.save_pretrained(folder, max_shard_size="20KB")
    return folder


def shards_of_head(folder: Path) -> set[str]:
    weight_map = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    return {shard for key, shard in weight_map.items() if of_head(key)}


def test_from_sharded_folder(sharded, run):
    assert not (sharded / "model.safetensors").exists()
    assert len(shards_of_head(sharded)) > 1
    assert_is_towers_head(load_siglip_head(sharded, vision_config()), run)


def test_from_the_two_tower_model(tmp_path):
    """google/siglip-* repositories hold text and vision tower together."""
    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = SiglipConfig(text_config={**text, "vocab_size": 20}, vision_config=vision_config().to_dict())
    model = randomise(SiglipModel(config))
    model.save_pretrained(tmp_path)
    hidden = torch.randn(2, PATCHES, WIDTH, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        expected = model.vision_model.head(model.vision_model.post_layernorm(hidden))
    torch.testing.assert_close(load_siglip_head(tmp_path, model.config.vision_config)(hidden)[0], expected)


@pytest.mark.parametrize("prefix", ["", "vision_model.", "model.vision_tower.vision_model."])
def test_prefix_is_found(tensors, tmp_path, run, prefix):
    file = tmp_path / "any_name.safetensors"
    save_file({prefix + key.removeprefix("vision_model."): value for key, value in tensors.items()}, file)
    assert_is_towers_head(load_siglip_head(file, vision_config()), run)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_weight_dtypes(tensors, tmp_path, run, dtype):
    file = tmp_path / "low.safetensors"
    save_file({key: value.to(dtype) for key, value in tensors.items()}, file)
    head = load_siglip_head(file, vision_config())
    assert head.head.probe.dtype == torch.float32
    for name, weight in head.head.state_dict().items():
        assert torch.equal(weight, tensors[f"vision_model.head.{name}"].to(dtype).float())
    assert head(run[0])[0].isfinite().all()


# Errors --------------------------------------------------------------------------------------------------------------


def saved(tensors, folder: Path) -> Path:
    file = folder / "model.safetensors"
    save_file(tensors, file)
    return file


@pytest.mark.parametrize("source", ["nowhere.safetensors", "./no/such", "bare-name", "ns/x.safetensors", Path("ns/x")])
def test_nothing_there(source):
    with pytest.raises(FileNotFoundError, match=r"no SigLIP checkpoint at .*file, a folder .* hub id 'namespace/name'"):
        load_siglip_head(source, vision_config())


def test_folder_without_safetensors(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(
        FileNotFoundError, match=r"neither model.safetensors nor model.safetensors.index.json; accepted"
    ):
        load_siglip_head(tmp_path, vision_config())


def test_no_head_in_it(tensors, tmp_path):
    file = saved({key: value for key, value in tensors.items() if ".head." not in key}, tmp_path)
    with pytest.raises(ValueError, match=r"found no such key; LLaVA checkpoints dropped the head"):
        load_siglip_head(file, vision_config())


def test_two_heads_in_it(tensors, tmp_path):
    file = saved({**tensors, "other.head.probe": torch.zeros(1, 1, WIDTH)}, tmp_path)
    with pytest.raises(ValueError, match=r"found 2 of them \('other\.', 'vision_model\.'\)"):
        load_siglip_head(file, vision_config())


def test_missing_keys_are_listed(tensors, tmp_path):
    gone = ("vision_model.head.mlp.fc1.bias", "vision_model.post_layernorm.weight")
    file = saved({key: value for key, value in tensors.items() if key not in gone}, tmp_path)
    with pytest.raises(ValueError, match=r"missing post_layernorm\.weight, head\.mlp\.fc1\.bias$"):
        load_siglip_head(file, vision_config())


def test_wrong_width(checkpoint):
    with pytest.raises(ValueError, match=r"SigLIP head has width 32, the vision tower 64"):
        load_siglip_head(checkpoint, vision_config(hidden_size=64))


def test_wrong_shape_is_named(checkpoint):
    with pytest.raises(ValueError, match=r"head\.mlp\.fc1\.weight \[48, 32\] instead of \[40, 32\]"):
        load_siglip_head(checkpoint, vision_config(intermediate_size=40))


@pytest.mark.parametrize("shape", [(), (1, WIDTH)])
def test_probe_of_another_rank(tensors, tmp_path, shape):
    file = saved({**tensors, "vision_model.head.probe": torch.zeros(shape)}, tmp_path)
    with pytest.raises(ValueError, match=r"head\.probe \[.*\] instead of \[1, 1, 32\]"):
        load_siglip_head(file, vision_config())


def test_heads_that_do_not_divide_the_width(checkpoint):
    config = vision_config()
    config.num_attention_heads = 5
    with pytest.raises(ValueError, match=r"hidden_size 32, which 5 attention heads do not divide"):
        load_siglip_head(checkpoint, config)


def test_another_kind_of_config(checkpoint):
    with pytest.raises(TypeError, match=r"SiglipConfig without hidden_size, .* expected a SiglipVisionConfig"):
        load_siglip_head(checkpoint, SiglipConfig())


def test_integer_weights_are_refused(tensors, tmp_path):
    key = "vision_model.head.mlp.fc1.weight"
    file = saved({**tensors, key: tensors[key].to(torch.int8)}, tmp_path)
    with pytest.raises(ValueError, match=rf"{key} has dtype I8; accepted: F64, F32, F16, BF16"):
        load_siglip_head(file, vision_config())


def raw(header: bytes | dict, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


PROBE_ENTRY = {"dtype": "F32", "shape": [1, 1, WIDTH], "data_offsets": [0, 4 * WIDTH]}


@pytest.mark.parametrize(
    "content",
    {
        "empty": b"",
        "short": b"1234567",
        "git-lfs pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
        "header longer than the file": raw({}, length=1000),
        "not JSON": raw(b"{not json"),
        "not UTF-8": raw(b"\xff\xfe{}"),
        "not an object": raw(b"[1]"),
        "nested beyond reason": raw(b"[" * 100_000),
        "entry is no object": raw({"head.probe": 3}),
        "entry without offsets": raw({"head.probe": {"dtype": "F32", "shape": [1]}}),
        "infinite offsets": raw(b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, Infinity]}}'),
        "offsets past the end": raw({"head.probe": PROBE_ENTRY}, b"\0" * (4 * WIDTH - 1)),
        "offsets backwards": raw({"head.probe": {**PROBE_ENTRY, "data_offsets": [8, 4]}}, b"\0" * 8),
        "offsets into the header": raw({"head.probe": {**PROBE_ENTRY, "data_offsets": [-8, 120]}}, b"\0" * 128),
    }.values(),
    ids=lambda content: content[:20].hex(),
)
def test_corrupt_files(tmp_path, content):
    file = tmp_path / "model.safetensors"
    file.write_bytes(content)
    with pytest.raises(
        ValueError, match=rf"model.safetensors is not a safetensors file, or a damaged one \({len(content)}"
    ):
        load_siglip_head(file, vision_config())


def test_offsets_that_contradict_the_shape(tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_bytes(raw({"head.probe": {**PROBE_ENTRY, "data_offsets": [0, 64]}}, b"\0" * 64))
    with pytest.raises(ValueError, match=r"head\.probe has 64 bytes, not those of torch.float32 \[1, 1, 32\]"):
        load_siglip_head(file, vision_config())


@pytest.mark.parametrize("index", [b"{", b"[]", b'{"weight_map": [1]}', b'{"weight_map": {"head.probe": 3}}'])
def test_corrupt_index(tmp_path, index):
    (tmp_path / "model.safetensors.index.json").write_bytes(index)
    with pytest.raises(ValueError, match=r"index.json is not the index of a sharded safetensors checkpoint"):
        load_siglip_head(tmp_path, vision_config())


@pytest.mark.parametrize("shard", ["../model.safetensors", "/etc/model.safetensors"])
def test_shards_outside_the_folder_are_not_opened(tmp_path, shard):
    index = {"weight_map": {"head.probe": shard}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"names a shard outside the checkpoint"):
        load_siglip_head(tmp_path, vision_config())


def test_missing_shard(sharded, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(sharded, folder)
    gone = sorted(shards_of_head(folder))[0]
    (folder / gone).unlink()
    with pytest.raises(FileNotFoundError, match=gone):
        load_siglip_head(folder, vision_config())


# The hub -------------------------------------------------------------------------------------------------------------


class Hub(ThreadingHTTPServer):
    """Model repositories `{commit: folder}` of one id, with one branch.

    Weights are answered, as on the real hub, with a redirect to a storage address; `served` counts the bytes that
    address sent per file, `ranges` how often it was asked.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), HubHandler)
        self.commits: dict[str, Path] = {}
        self.branches: dict[str, str] = {}
        self.served: Counter[str] = Counter()
        self.ranges: Counter[str] = Counter()
        self.refuse_weights = self.ignore_ranges = self.portal = False
        self.refuse_repo: str | None = None
        self.authorizations: list[str | None] = []

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def publish(self, commit: str, folder: Path) -> None:
        self.commits[commit] = folder
        self.branches["main"] = commit

    @property
    def weight_bytes(self) -> int:
        return sum(count for name, count in self.served.items() if name.endswith(".safetensors"))


class HubHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *args) -> None:
        pass

    def do_GET(self) -> None:
        hub, path = self.server, unquote(urlsplit(self.path).path)
        if hub.portal:
            return self.answer(200, b"<html>Please log in to the wireless network</html>")
        if path.startswith("/storage/"):
            return self.storage(*path.removeprefix("/storage/").split("/", 1))
        hub.authorizations.append(self.headers["Authorization"])
        if hub.refuse_repo:
            return self.answer(403 if hub.refuse_repo == "GatedRepo" else 404, code=hub.refuse_repo)
        api = path.removeprefix(f"/api/models/{REPO}")
        if api in ("", path):
            revision, what = "main", "info"
        else:
            what, revision = api.removeprefix("/").split("/", 1)
        if path.startswith(f"/{REPO}/resolve/"):
            revision, name = path.removeprefix(f"/{REPO}/resolve/").split("/", 1)
            what = "resolve"
        elif api == path:
            return self.answer(404, code="RepoNotFound")
        commit = hub.branches.get(revision, revision)
        if commit not in hub.commits:
            return self.answer(404, code="RevisionNotFound")
        if what in ("info", "revision"):
            return self.json({"id": REPO, "sha": commit, "private": False, "siblings": []})
        if what == "tree":
            files = sorted(hub.commits[commit].iterdir())
            return self.json(
                [{"type": "file", "oid": "0", "size": file.stat().st_size, "path": file.name} for file in files]
            )
        if hub.refuse_weights:
            return self.answer(403)
        return self.answer(302, location=f"{hub.endpoint}/storage/{commit}/{name}")

    def storage(self, commit: str, name: str) -> None:
        hub, data = self.server, (self.server.commits[commit] / name).read_bytes()
        wanted = self.headers["Range"]
        if wanted is None or hub.ignore_ranges:
            status, part = 200, data
        else:
            begin, end = wanted.removeprefix("bytes=").split("-")
            status, part = 206, data[int(begin) : int(end) + 1 if end else None]
        hub.ranges[name] += 1
        hub.served[name] += len(part)
        self.answer(status, part)

    def json(self, value) -> None:
        self.answer(200, json.dumps(value).encode(), kind="application/json")

    def answer(self, status, body=b"", *, kind="application/octet-stream", code=None, location=None) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        if code:
            self.send_header("X-Error-Code", code)
        if location:
            self.send_header("Location", location)
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def hub():
    with Hub() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def padded(tensors, tmp_path_factory) -> Path:
    """A checkpoint much larger than its head."""
    folder = tmp_path_factory.mktemp("padded")
    padding = {"text_model.embeddings": torch.zeros(1_000_000), "vision_model.zzz": torch.zeros(1_000_000)}
    saved({**tensors, **padding}, folder)
    (folder / "config.json").write_text("{}")
    return folder


def load(hub: Hub, cache: Path, source: str = REPO, **options) -> SiglipHead:
    options = {"token": False, "endpoint": hub.endpoint, "cache_dir": cache, **options}
    return load_siglip_head(source, vision_config(), **options)


def header_bytes(file: Path) -> int:
    return 8 + int.from_bytes(file.read_bytes()[:8], "little")


def test_only_the_heads_bytes_travel_and_only_once(hub, padded, tensors, run, tmp_path):
    hub.publish(FIRST, padded)
    file = padded / "model.safetensors"
    assert_is_towers_head(load(hub, tmp_path), run)
    allowed = header_bytes(file) + head_bytes(tensors)
    assert allowed <= hub.weight_bytes <= 1.05 * allowed < file.stat().st_size / 100
    assert hub.ranges["model.safetensors"] <= 4  # length, header, head, post-layernorm

    hub.served.clear()
    assert_is_towers_head(load(hub, tmp_path), run)
    assert not hub.served


def test_sharded_repository(hub, sharded, tensors, run, tmp_path):
    hub.publish(FIRST, sharded)
    assert_is_towers_head(load(hub, tmp_path), run)
    used = shards_of_head(sharded)
    assert {name for name in hub.served if name.endswith(".safetensors")} == used
    allowed = head_bytes(tensors) + sum(header_bytes(sharded / shard) for shard in used)
    assert allowed <= hub.weight_bytes <= 1.05 * allowed
    assert hub.served["model.safetensors.index.json"] == (sharded / "model.safetensors.index.json").stat().st_size

    hub.served.clear()
    assert_is_towers_head(load(hub, tmp_path), run)
    assert not hub.served


def test_what_is_kept(hub, tensors, tmp_path):
    """One small file per commit, canonical names, the checkpoint's own dtype, nothing half-written beside it."""
    folder = tmp_path / "repo"
    folder.mkdir()
    saved({key: value.bfloat16() for key, value in tensors.items()}, folder)
    hub.publish(FIRST, folder)
    load(hub, tmp_path / "cache")
    files = sorted(p.relative_to(tmp_path / "cache") for p in (tmp_path / "cache").rglob("*") if p.is_file())
    kept = Path("siglip_head", "google--tiny-siglip")
    assert files == [kept / f"{FIRST}.safetensors", kept / "refs" / "main"]
    with safe_open(tmp_path / "cache" / files[0], "pt") as file:
        contents = {key: file.get_tensor(key) for key in file.keys()}
    assert len(contents) == 13 and {key.split(".")[0] for key in contents} == {"head", "post_layernorm"}
    for key, value in contents.items():
        assert torch.equal(value, tensors[f"vision_model.{key}"].bfloat16())


def test_default_cache_is_under_hf_home(hub, padded, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path))
    hub.publish(FIRST, padded)
    load(hub, None)
    assert len(list((tmp_path / "vidcompress").rglob(f"{FIRST}.safetensors"))) == 1


def zero_head(tensors, folder: Path) -> Path:
    """A second commit, told apart by a head of zeros."""
    folder.mkdir()
    saved({key: torch.zeros_like(value) if ".head." in key else value for key, value in tensors.items()}, folder)
    return folder


def test_a_new_commit_is_read_anew(hub, padded, tensors, run, tmp_path):
    hub.publish(FIRST, padded)
    load(hub, tmp_path / "cache")
    hub.publish(SECOND, zero_head(tensors, tmp_path / "new"))
    hub.served.clear()
    assert not load(hub, tmp_path / "cache")(run[0])[0].any()
    assert hub.weight_bytes > 0
    hub.served.clear()
    assert_is_towers_head(load(hub, tmp_path / "cache", revision=FIRST), run)
    assert not hub.served


def test_a_pinned_commit_needs_no_hub_once_kept(hub, padded, run, tmp_path):
    hub.publish(FIRST, padded)
    load(hub, tmp_path, revision=FIRST)
    hub.authorizations.clear()
    assert_is_towers_head(load(hub, tmp_path, revision=FIRST), run)
    assert not hub.authorizations


def test_a_commit_that_was_missing_is_asked_for_again(hub, padded, run, tmp_path):
    with pytest.raises(FileNotFoundError, match=f"'{REPO}' at revision '{FIRST}': neither"):
        load(hub, tmp_path, revision=FIRST)
    hub.publish(FIRST, padded)
    assert_is_towers_head(load(hub, tmp_path, revision=FIRST), run)


def test_revisions(hub, padded, tensors, run, tmp_path):
    hub.publish(FIRST, padded)
    hub.publish(SECOND, zero_head(tensors, tmp_path / "new"))
    hub.branches["refs/pr/1"] = FIRST
    assert_is_towers_head(load(hub, tmp_path / "cache", revision="refs/pr/1"), run)
    assert not load(hub, tmp_path / "cache")(run[0])[0].any()


def test_hub_errors(hub, padded, tmp_path):
    hub.publish(FIRST, padded)
    with pytest.raises(FileNotFoundError, match=r"'google/other': neither a file or folder, nor found on the hub"):
        load(hub, tmp_path, "google/other")
    with pytest.raises(FileNotFoundError, match=r"'google/tiny-siglip' at revision 'v9': neither"):
        load(hub, tmp_path, revision="v9")
    hub.refuse_weights = True
    with pytest.raises(ConnectionError, match=r"could not read .* 'google/tiny-siglip' at revision 'a{40}'"):
        load(hub, tmp_path)
    hub.refuse_weights, hub.refuse_repo = False, "GatedRepo"
    for revision in (None, FIRST):
        with pytest.raises(PermissionError, match=r"'google/tiny-siglip'.* is gated; .* token="):
            load(hub, tmp_path, revision=revision)
    hub.refuse_repo, hub.portal = None, True
    with pytest.raises(ConnectionError, match=r"could not read .* 'google/tiny-siglip'"):
        load(hub, tmp_path)
    assert not list(tmp_path.iterdir())


def test_hub_without_safetensors(hub, tmp_path):
    (tmp_path / "repo").mkdir()
    (tmp_path / "repo" / "pytorch_model.bin").write_bytes(b"x")
    hub.publish(FIRST, tmp_path / "repo")
    with pytest.raises(FileNotFoundError, match=rf"google/tiny-siglip@{FIRST} has neither model.safetensors nor"):
        load(hub, tmp_path / "cache")


def test_the_width_is_checked_before_weights_travel(hub, padded, tmp_path):
    hub.publish(FIRST, padded)
    with pytest.raises(ValueError, match="SigLIP head has width 32, the vision tower 64"):
        load_siglip_head(
            REPO, vision_config(hidden_size=64), token=False, endpoint=hub.endpoint, cache_dir=tmp_path / "cache"
        )
    assert hub.weight_bytes == header_bytes(padded / "model.safetensors")


def test_a_server_that_ignores_ranges(hub, checkpoint, tmp_path):
    hub.publish(FIRST, checkpoint)
    hub.ignore_ranges = True
    with pytest.raises(ConnectionError, match=r"'google/tiny-siglip'.* asked for 8 bytes at 0, got"):
        load(hub, tmp_path)


def test_the_token_goes_to_the_hub(hub, padded, tmp_path):
    hub.publish(FIRST, padded)
    load(hub, tmp_path, token="hf_secret")
    assert set(hub.authorizations) == {"Bearer hf_secret"}
    hub.authorizations.clear()
    load(hub, tmp_path, token=False)
    assert set(hub.authorizations) == {None}


@pytest.fixture
def dead_endpoint() -> str:
    """An address nobody listens at any more."""
    with ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as server:
        return f"http://127.0.0.1:{server.server_address[1]}"


def test_unreachable_hub_and_nothing_kept(hub, dead_endpoint, tmp_path):
    with pytest.raises(ConnectionError, match=r"could not read .* 'google/tiny-siglip'"):
        load(hub, tmp_path, endpoint=dead_endpoint)


def test_offline_mode_and_nothing_kept(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConnectionError, match=r"'google/tiny-siglip'.*offline"):
        load(hub, tmp_path)


def test_unreachable_hub_uses_what_is_kept(hub, dead_endpoint, padded, tensors, run, tmp_path, caplog):
    cache = tmp_path / "cache"
    hub.publish(SECOND, zero_head(tensors, tmp_path / "new"))
    load(hub, cache, revision=SECOND)
    hub.branches["v1"] = FIRST
    hub.commits[FIRST] = padded
    load(hub, cache, revision="v1")
    with caplog.at_level(logging.WARNING, logger=siglip_head.__name__):
        assert_is_towers_head(load(hub, cache, endpoint=dead_endpoint, revision="v1"), run)
    assert f"kept from commit {FIRST}" in caplog.text
    with pytest.raises(ConnectionError):  # nothing was ever seen of this branch: another commit would be a guess
        load(hub, cache, endpoint=dead_endpoint, revision="v2")
    assert_is_towers_head(load(hub, cache, endpoint=dead_endpoint), run)  # the default branch: the newest
    hub.branches["main"] = SECOND
    load(hub, cache)
    assert not load(hub, cache, endpoint=dead_endpoint)(run[0])[0].any()  # seen at main by now


def test_a_damaged_kept_file_is_read_again(hub, padded, run, tmp_path, caplog):
    hub.publish(FIRST, padded)
    load(hub, tmp_path)
    (kept,) = tmp_path.rglob(f"{FIRST}.safetensors")
    whole = kept.read_bytes()
    kept.write_bytes(whole[:100])
    with caplog.at_level(logging.WARNING, logger=siglip_head.__name__):
        assert_is_towers_head(load(hub, tmp_path), run)
    assert "damaged" in caplog.text and kept.read_bytes() == whole


def test_a_cache_that_cannot_be_written_costs_a_warning_only(hub, padded, run, tmp_path, caplog):
    hub.publish(FIRST, padded)
    (tmp_path / "cache").write_text("a file where the folder should be")
    with caplog.at_level(logging.WARNING, logger=siglip_head.__name__):
        assert_is_towers_head(load(hub, tmp_path / "cache"), run)
    assert "could not keep the SigLIP head" in caplog.text


def test_a_local_folder_of_that_name_wins(hub, checkpoint, run, tmp_path, monkeypatch):
    shutil.copytree(checkpoint, tmp_path / REPO)
    monkeypatch.chdir(tmp_path)
    assert_is_towers_head(load(hub, tmp_path / "cache"), run)
    assert not hub.authorizations
