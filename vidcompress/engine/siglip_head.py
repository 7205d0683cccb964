"""SigLIP's attention-pooling head, re-attached to a vision tower that was shipped without it.

LLaVA checkpoints keep SigLIP's encoder and drop what follows: the final layer norm and the pooling head, whose one
learned query (the probe) says how much every patch matters for the whole frame. FastVID and InfoMerge read both its
output and its attention. `load_siglip_head` takes just these tensors out of a full SigLIP checkpoint (61 MB of 3.5 GB
for so400m; from the hub only their bytes travel) and `SiglipHead` runs them.

Source: FastVID (arXiv 2503.11187), `siglip_encoder.py` of its official repository; head and checkpoint keys as in
transformers' `modeling_siglip.py`; file format of safetensors (8-byte length, JSON header, raw tensors).
"""

from __future__ import annotations

import copy
import json
import logging
import math
import os
import re
import uuid
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple
from urllib.parse import quote

import torch
from torch import Tensor, nn

from vidcompress.precision import full_precision

if TYPE_CHECKING:
    from transformers import SiglipVisionConfig
    from transformers.models.siglip.modeling_siglip import SiglipMultiheadAttentionPoolingHead

logger = logging.getLogger(__name__)

FRAMES_PER_CHUNK = 64  # 64 x 729 x 1152 fp32 is 215 MB per intermediate; longer videos need no more
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PROBE = "head.probe"
COMMIT = re.compile("[0-9a-f]{40}")
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
CONFIG_FIELDS = ("hidden_size", "intermediate_size", "num_attention_heads", "layer_norm_eps", "hidden_act")
ACCEPTED = "a .safetensors file, a folder with model.safetensors (or its sharded index), or a hub id 'namespace/name'"
MALFORMED = (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError)  # what odd JSON can raise
MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors format

Opener = Callable[[str], AbstractContextManager[BinaryIO]]


@dataclass(eq=False)
class SiglipHead:
    """Post-layernorm and attention-pooling head of SigLIP, kept outside any model.

    Not an `nn.Module`: set as an attribute of a model it enters neither `state_dict()` nor `parameters()`.
    The weights stay fp32 on the CPU; every other device gets one copy when it is first used. The copies are not
    pickled or deep-copied along.

    Args:
        post_layernorm: `LayerNorm(C)` that follows SigLIP's last encoder layer.
        head: transformers' pooling head: probe `[1, 1, C]`, attention, layer norm, MLP.
    """

    post_layernorm: nn.LayerNorm
    head: SiglipMultiheadAttentionPoolingHead
    _copies: dict[torch.device, tuple[nn.LayerNorm, SiglipMultiheadAttentionPoolingHead]] = field(
        default_factory=dict, init=False, repr=False
    )

    @property
    def width(self) -> int:
        """C, the width of the patch features the head takes."""
        return int(self.head.probe.shape[-1])

    @torch.no_grad()
    def __call__(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Pool every frame and say how much each of its patches counted.

        Args:
            hidden: `[F, N, C]` patch features before the post-layernorm (F frames of N patches), any float dtype and
                device.

        Returns:
            `frame_features [F, C]`, the pooled output, and `attention [F, N]`, the probe's attention averaged over
            heads (each row sums to 1); both fp32, on the device of `hidden`. One query per frame: O(N) memory.

        Raises:
            ValueError: `hidden` is not `[F, N >= 1, C]` of a float dtype.
        """
        if hidden.ndim != 3 or hidden.shape[1] == 0 or hidden.shape[2] != self.width or not hidden.is_floating_point():
            raise ValueError(
                f"hidden has shape {tuple(hidden.shape)} and dtype {hidden.dtype}; "
                f"expected float patch features [frames, patches >= 1, {self.width}]"
            )
        frames, patches, width = hidden.shape
        features = torch.empty(frames, width, dtype=torch.float32, device=hidden.device)
        attention = torch.empty(frames, patches, dtype=torch.float32, device=hidden.device)
        post_layernorm, head = self._on(hidden.device)
        with full_precision(hidden.device):
            for at in range(0, frames, FRAMES_PER_CHUNK):
                chunk = slice(at, at + FRAMES_PER_CHUNK)
                z = post_layernorm(hidden[chunk].float())  # [f, N, C]
                pooled, attention[chunk] = _probe_attention(head.attention, head.probe[0, 0], z)
                features[chunk] = pooled + head.mlp(head.layernorm(pooled))
        return features, attention

    def _on(self, device: torch.device) -> tuple[nn.LayerNorm, SiglipMultiheadAttentionPoolingHead]:
        """The two modules on `device`."""
        if device == self.head.probe.device:
            return self.post_layernorm, self.head
        if device not in self._copies:
            with torch.inference_mode(False):  # a copy made in inference mode would be unusable outside it
                modules = copy.deepcopy((self.post_layernorm, self.head))
                self._copies[device] = (modules[0].to(device), modules[1].to(device))
        return self._copies[device]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_copies": {}}


def _probe_attention(attention: nn.MultiheadAttention, probe: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """`nn.MultiheadAttention(probe, z, z)` for one query, with no key or value of any patch.

    q.(K z) = (K^T q).z and sum_n a_n (V z_n) = V (sum_n a_n z_n): the projections move from the N patches to the one
    query and the one average, O(N C heads) work in place of O(N C^2). The key bias is the same for all patches of a
    head and cancels in the softmax.

    Returns:
        `[F, C]` attended output and `[F, N]` weights averaged over heads.
    """
    heads, width = attention.num_heads, probe.shape[0]
    query, key, value = attention.in_proj_weight.view(3, heads, -1, width)  # [H, d, C] each
    query_bias, _, value_bias = attention.in_proj_bias.view(3, heads, -1)  # [H, d] each
    q = (query @ probe + query_bias) * (width // heads) ** -0.5  # [H, d]
    seen = torch.einsum("hdc,hd->ch", key, q)  # [C, H]
    weights = (z @ seen).softmax(1)  # [F, N, H]
    average = weights.transpose(1, 2) @ z  # [F, H, C]
    out = torch.einsum("fhc,hdc->fhd", average, value) + value_bias
    return attention.out_proj(out.flatten(1)), weights.mean(-1)


def load_siglip_head(
    source: str | os.PathLike[str],
    vision_config: SiglipVisionConfig,
    *,
    revision: str | None = None,
    token: bool | str | None = None,
    endpoint: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
) -> SiglipHead:
    """Take the post-layernorm and the pooling head out of a full SigLIP checkpoint.

    Only `*.post_layernorm.*` and `*.head.*` are read. From the hub they come by HTTP range requests and are kept as
    one small safetensors file per commit. When the hub cannot be reached, the commit kept last is used, with a warning.

    Args:
        source: a `.safetensors` file, a folder (`model.safetensors`, or sharded with its index), or a hub id such as
            `"google/siglip-so400m-patch14-384"`. What exists on disk wins.
        vision_config: configuration of the vision tower the head is for.
        revision: branch, tag or commit; hub only. None is the default branch.
        token: hub token; True or None uses the stored one, False none.
        endpoint: address of the hub, if not the default one.
        cache_dir: where heads read from the hub are kept; default `<HF_HOME>/vidcompress`.

    Returns:
        The head in fp32 on the CPU; it follows its input to other devices.

    Raises:
        FileNotFoundError: there is no such file, folder, repository or revision, or no safetensors weights in it.
        PermissionError: the hub repository is gated and the token does not open it.
        ConnectionError: the hub could not be read and nothing kept can stand in.
        ValueError: not a safetensors file, a head that is missing or incomplete, or one that does not fit the tower.
        TypeError: `vision_config` is not a SigLIP vision configuration.
    """
    post_layernorm, head = _empty_modules(vision_config)
    modules = nn.ModuleDict({"post_layernorm": post_layernorm, "head": head})
    expected = {name: tensor.shape for name, tensor in modules.state_dict().items()}
    path = Path(source)
    if path.is_file():
        tensors = _read_file(path, expected)
    elif path.is_dir():
        names = {entry.name for entry in path.iterdir()}
        tensors = _read_checkpoint(lambda name: (path / name).open("rb"), names, expected, str(path))
    elif isinstance(source, str) and _is_hub_id(source):
        cache = Path(cache_dir) if cache_dir is not None else _default_cache()
        tensors = _read_hub(_Hub(source, endpoint, token), revision, cache, expected)
    else:
        raise FileNotFoundError(f"no SigLIP checkpoint at {os.fspath(source)!r}; accepted: {ACCEPTED}")
    modules.load_state_dict({name: tensor.float() for name, tensor in tensors.items()}, assign=True)
    return SiglipHead(post_layernorm, head)


def _empty_modules(config: SiglipVisionConfig) -> tuple[nn.LayerNorm, SiglipMultiheadAttentionPoolingHead]:
    """The two modules without storage: no double memory, and the global random state stays as it is."""
    from transformers.models.siglip.modeling_siglip import SiglipMultiheadAttentionPoolingHead

    if absent := [name for name in CONFIG_FIELDS if not hasattr(config, name)]:
        raise TypeError(
            f"vision_config is a {type(config).__name__} without {', '.join(absent)}; expected a SiglipVisionConfig"
        )
    if config.hidden_size % config.num_attention_heads:
        raise ValueError(
            f"vision_config has hidden_size {config.hidden_size}, which {config.num_attention_heads} attention heads "
            "do not divide; expected a multiple"
        )
    with torch.device("meta"):
        post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        head = SiglipMultiheadAttentionPoolingHead(config)
    return post_layernorm.requires_grad_(False).eval(), head.requires_grad_(False).eval()


# Safetensors: which bytes, and reading no others ---------------------------------------------------------------------


class _NotSafetensors(ValueError):
    """The bytes are not those of a safetensors checkpoint."""


class _Entry(NamedTuple):
    """One tensor in a file: bytes `[begin, end)` from the start of the file."""

    file: str
    begin: int
    end: int
    dtype: torch.dtype
    shape: tuple[int, ...]


def _read_file(path: Path, expected: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    """The expected tensors of one local safetensors file, under their canonical names."""
    with path.open("rb") as file:
        header = _read_header(file, str(path))
        entries = _entries(header, str(path), _prefix(header, str(path)), expected)
        return _read_tensors({str(path): file}, entries, expected)


def _read_checkpoint(
    opener: Opener, names: Container[str], expected: Mapping[str, torch.Size], where: str
) -> dict[str, Tensor]:
    """The expected tensors of a folder or repository, single file or sharded, under their canonical names.

    All headers are read and checked before the first weight is.
    """
    with ExitStack() as stack:
        files: dict[str, BinaryIO] = {}
        entries: dict[str, _Entry] = {}
        if SINGLE in names:
            shards, prefix = [SINGLE], None
        elif INDEX in names:
            with opener(INDEX) as file:
                weight_map = _weight_map(file.read(), f"{where}/{INDEX}")
            prefix = _prefix(weight_map, f"{where}/{INDEX}")
            shards = sorted({weight_map[prefix + name] for name in expected if prefix + name in weight_map})
        else:
            raise FileNotFoundError(f"{where} has neither {SINGLE} nor {INDEX}; accepted: {ACCEPTED}")
        for shard in shards:
            label = f"{where}/{shard}"
            files[label] = stack.enter_context(opener(shard))
            header = _read_header(files[label], label)
            found = _prefix(header, label) if prefix is None else prefix
            entries |= _entries(header, label, found, expected)
        return _read_tensors(files, entries, expected)


def _weight_map(text: bytes, where: str) -> dict[str, str]:
    """Tensor name -> shard, from a sharded checkpoint's index."""
    try:
        weight_map: dict[str, str] = json.loads(text)["weight_map"]
        shards = [PurePosixPath(shard) for shard in weight_map.values()]
    except MALFORMED as error:
        raise _NotSafetensors(f"{where} is not the index of a sharded safetensors checkpoint: {error!r}") from error
    if outside := [str(shard) for shard in shards if shard.is_absolute() or ".." in shard.parts]:
        raise _NotSafetensors(f"{where} names a shard outside the checkpoint: {outside[0]!r}; expected a relative path")
    return weight_map


def _prefix(keys: Iterable[str], where: str) -> str:
    """What stands before `head.probe` in this checkpoint: `vision_model.` as a rule, nothing in a bare tower."""
    found = sorted(key.removesuffix(PROBE) for key in keys if key == PROBE or key.endswith("." + PROBE))
    if len(found) != 1:
        detail = f"{len(found)} of them ({', '.join(map(repr, found))})" if found else "no such key"
        raise ValueError(
            f"{where}: expected exactly one SigLIP pooling head, that is one key '*{PROBE}', found {detail}; "
            "LLaVA checkpoints dropped the head, take it from a full SigLIP checkpoint"
        )
    return found[0]


def _read_header(file: BinaryIO, where: str) -> dict[str, Any]:
    """The JSON header of an open safetensors file, its offsets counted from the start of the file."""
    size = file.seek(0, os.SEEK_END)
    refusal = f"{where} is not a safetensors file, or a damaged one ({size} bytes)"
    if size < 8:
        raise _NotSafetensors(f"{refusal}: too short for a header")
    length = int.from_bytes(_read(file, 0, 8, where), "little")
    if length > min(MAX_HEADER_BYTES, size - 8):
        raise _NotSafetensors(f"{refusal}: it announces a header of {length} bytes")
    try:
        header: dict[str, Any] = json.loads(_read(file, 8, length, where))
        header.pop("__metadata__", None)
        for entry in header.values():
            begin, end = (8 + length + int(offset) for offset in entry["data_offsets"])
            if not 8 + length <= begin <= end <= size:
                raise ValueError(f"bytes {begin} to {end} are not in the file")
            entry["data_offsets"] = begin, end
            entry["shape"] = tuple(int(extent) for extent in entry["shape"])
            entry["dtype"] = str(entry["dtype"])
    except MALFORMED as error:
        raise _NotSafetensors(f"{refusal}: {error!r}") from error
    return header


def _entries(header: Mapping[str, Any], file: str, prefix: str, expected: Iterable[str]) -> dict[str, _Entry]:
    """The expected tensors that one file has, under their canonical names."""
    entries = {}
    for name in expected:
        if (value := header.get(prefix + name)) is None:
            continue
        if value["dtype"] not in DTYPES:
            raise ValueError(f"{file}: {prefix}{name} has dtype {value['dtype']}; accepted: {', '.join(DTYPES)}")
        (begin, end), dtype, shape = value["data_offsets"], DTYPES[value["dtype"]], value["shape"]
        if end - begin != math.prod(shape) * dtype.itemsize:
            raise _NotSafetensors(f"{file}: {prefix}{name} has {end - begin} bytes, not those of {dtype} {list(shape)}")
        entries[name] = _Entry(file, begin, end, dtype, shape)
    return entries


def _read_tensors(
    files: Mapping[str, BinaryIO], entries: Mapping[str, _Entry], expected: Mapping[str, torch.Size]
) -> dict[str, Tensor]:
    """Check the entries against the tower, then read them, neighbours in a file with one read."""
    where = ", ".join(files)
    if missing := [name for name in expected if name not in entries]:
        raise ValueError(f"{where}: the SigLIP head is incomplete, missing {', '.join(missing)}")
    width, tower_width = entries[PROBE].shape[-1:], tuple(expected[PROBE][-1:])
    if width and width != tower_width:
        raise ValueError(
            f"{where}: SigLIP head has width {width[0]}, the vision tower {tower_width[0]}; "
            "expected the SigLIP checkpoint the tower was made from"
        )
    if wrong := [name for name, shape in expected.items() if entries[name].shape != tuple(shape)]:
        shapes = ", ".join(f"{name} {list(entries[name].shape)} instead of {list(expected[name])}" for name in wrong)
        raise ValueError(f"{where}: SigLIP head does not fit the vision tower: {shapes}")

    tensors = {}
    for run in _runs([(name, entries[name]) for name in expected]):
        (_, first), (_, last) = run[0], run[-1]
        data = memoryview(_read(files[first.file], first.begin, last.end - first.begin, first.file))
        for name, entry in run:
            raw = bytearray(data[entry.begin - first.begin : entry.end - first.begin])
            tensors[name] = torch.frombuffer(raw, dtype=entry.dtype).reshape(entry.shape)
    return tensors


def _runs(entries: Iterable[tuple[str, _Entry]]) -> list[list[tuple[str, _Entry]]]:
    """Group entries whose bytes follow one another without a gap."""
    runs: list[list[tuple[str, _Entry]]] = []
    for name, entry in sorted(entries, key=lambda item: item[1][:2]):
        last = runs[-1][-1][1] if runs else None
        if last is not None and (last.file, last.end) == (entry.file, entry.begin):
            runs[-1].append((name, entry))
        else:
            runs.append([(name, entry)])
    return runs


def _read(file: BinaryIO, begin: int, count: int, where: str) -> bytes:
    """Exactly `count` bytes; a server that ignores ranges sends more, a cut file fewer."""
    file.seek(begin)
    data = file.read(count)
    if len(data) != count:
        raise OSError(f"{where}: asked for {count} bytes at {begin}, got {len(data)}")
    return data


# The hub: commit, kept copy, range reads -----------------------------------------------------------------------------


def _is_hub_id(source: str) -> bool:
    """Whether `source` has the form namespace/name and cannot be meant as a path of a file."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(source)
    except HFValidationError:
        return False
    return source.count("/") == 1 and not source.endswith(".safetensors")


def _default_cache() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HOME) / "vidcompress"


class _Hub(NamedTuple):
    """A model repository on a hub."""

    repo: str
    endpoint: str | None
    token: bool | str | None

    def commit(self, revision: str | None) -> str:
        """The commit that `revision` is at now."""
        from huggingface_hub import HfApi, constants

        with _hub_errors(self.repo, revision):
            info = HfApi(endpoint=self.endpoint, token=self.token).model_info(
                self.repo, revision=revision, timeout=constants.HF_HUB_ETAG_TIMEOUT
            )
            if not info.sha or not COMMIT.fullmatch(info.sha):
                raise ConnectionError(f"it names no commit but {info.sha!r}")
            return info.sha

    def read(self, commit: str, expected: Mapping[str, torch.Size]) -> dict[str, Tensor]:
        """The expected tensors, by range requests."""
        from huggingface_hub import HfFileSystem

        root = f"{self.repo}@{commit}"
        with _hub_errors(self.repo, commit):
            # A fresh instance: shared ones keep what they listed, or did not find, for good.
            fs = HfFileSystem(endpoint=self.endpoint, token=self.token, skip_instance_cache=True)
            names = {PurePosixPath(str(name)).name for name in fs.ls(root, detail=False)}
            # cache_type "none": each read is one range request of just that size, nothing is read ahead.
            return _read_checkpoint(
                lambda name: fs.open(f"{root}/{name}", "rb", cache_type="none"), names, expected, root
            )


def _read_hub(hub: _Hub, revision: str | None, cache: Path, expected: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    """The expected tensors of a hub repository: the copy kept of its commit, or else the bytes of the head."""
    kept = _KeptHeads(cache / "siglip_head" / hub.repo.replace("/", "--"))
    if revision and COMMIT.fullmatch(revision) and kept.path(revision).is_file():
        commit = revision  # never changes, so there is nothing to ask
    else:
        try:
            commit = hub.commit(revision)
        except ConnectionError as error:
            if (path := kept.last_seen(revision)) is None:
                raise
            logger.warning("%s; using the SigLIP head kept from commit %s", error, path.stem)
            return _read_file(path, expected)

    path = kept.path(commit)
    tensors = None
    if path.is_file():
        try:
            tensors = _read_file(path, expected)
        except _NotSafetensors as error:
            logger.warning("%s; reading the SigLIP head of %s again", error, hub.repo)
    if tensors is None:
        tensors = hub.read(commit, expected)
        kept.store(commit, tensors)
    if revision != commit:
        kept.remember(revision, commit)
    return tensors


@contextmanager
def _hub_errors(repo: str, revision: str | None) -> Iterator[None]:
    """Turn the hub client's errors into built-in ones that name the repository."""
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

    # Its HTTP library changed between versions; its own errors derive from that library's base error.
    http_error: type[Exception] = next(base for base in HfHubHTTPError.__bases__ if base.__name__ == "HTTPError")
    at = f"{repo!r}" if revision is None else f"{repo!r} at revision {revision!r}"
    try:
        yield
    except GatedRepoError as error:
        raise PermissionError(
            f"the hub repository {at} is gated; accept its conditions on the hub and pass token=, "
            f"or give the checkpoint as a file or folder"
        ) from error
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise FileNotFoundError(
            f"no SigLIP checkpoint at {at}: neither a file or folder, nor found on the hub (a private repository "
            f"needs token=); accepted: {ACCEPTED}"
        ) from error
    except FileNotFoundError:
        raise
    except (http_error, OSError, json.JSONDecodeError) as error:
        raise ConnectionError(f"could not read the SigLIP head from the hub repository {at}: {error}") from error


@dataclass(frozen=True)
class _KeptHeads:
    """Heads already read from one repository: `<commit>.safetensors`, and in `refs/` the commit of each revision."""

    folder: Path

    def path(self, commit: str) -> Path:
        return self.folder / f"{commit}.safetensors"

    def last_seen(self, revision: str | None) -> Path | None:
        """The head last seen at this revision; for the default branch else the newest one, if any."""
        ref = self._ref(revision)
        if ref.is_file() and (path := self.path(ref.read_text())).is_file():
            return path
        kept = self.folder.glob("*.safetensors") if revision is None else ()
        return max(kept, key=lambda path: path.stat().st_mtime, default=None)

    def store(self, commit: str, tensors: Mapping[str, Tensor]) -> None:
        """Keep a head, in its own dtype."""
        from safetensors.torch import save

        self._write(self.path(commit), save(dict(tensors), metadata={"format": "pt"}))

    def remember(self, revision: str | None, commit: str) -> None:
        """Note which commit the revision is at."""
        self._write(self._ref(revision), commit.encode())

    def _ref(self, revision: str | None) -> Path:
        return self.folder / "refs" / quote(revision or "main", safe="")

    def _write(self, path: Path, data: bytes) -> None:
        """Write aside, then rename: nobody ever sees half a file. A full or read-only disk costs only a warning."""
        aside = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            aside.write_bytes(data)
            os.replace(aside, path)
        except OSError as error:
            logger.warning("could not keep the SigLIP head in %s: %s", self.folder, error)
            with suppress(OSError):
                aside.unlink()
