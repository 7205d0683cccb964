"""What the vLLM plugin settles without vLLM: settings, refusals, versions, rotary positions, one video's reduction.

Tests with vLLM itself are in tests/vllm (`make test-vllm`).
"""

from __future__ import annotations

import re
import runpy
import sys
import types
from importlib.metadata import entry_points
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import VOCABULARY
from transformers import LlavaOnevisionConfig, Qwen2_5_VLConfig, Qwen2Config, Qwen2VLConfig, Qwen3VLConfig

import vidcompress
from vidcompress.method import list_methods
from vidcompress.serving import plugin, positions, reduce, settings
from vidcompress.serving.positions import Medium

CONFIGS = {"llava_onevision": LlavaOnevisionConfig, "qwen2_vl": Qwen2VLConfig, "qwen2_5_vl": Qwen2_5_VLConfig}
every_model = pytest.mark.parametrize("kind", CONFIGS)
VLLM_0_32 = "0.32.0"


def config(kind: str) -> Any:
    """Of a model so small that no published head fits its tower."""
    text = Qwen2Config(vocab_size=VOCABULARY, num_hidden_layers=6).to_dict()
    tower = {"model_type": "siglip_vision_model", "hidden_size": 32} if kind == "llava_onevision" else {}
    return CONFIGS[kind](text_config=text, vision_config=tower)


# -- settings ----------------------------------------------------------------------------------------------------------
@every_model
def test_settings_come_as_they_do_elsewhere(kind, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("method: vidcom2\nretention_ratio: 0.4\n")
    name = settings.resolve("vidcom2", config(kind))
    assert name.method.name == "vidcom2" and name.method.retention_ratio == 0.25 and name.head is None
    for said in (
        str(path),
        {"method": "vidcom2", "retention_ratio": 0.4},
        [{"method": "vidcom2", "retention_ratio": 0.4}],
    ):
        found = settings.resolve(said, config(kind))
        assert found.method.retention_ratio == 0.4
        assert found.count((8, 3, 5)) == found.method.budget((8, 3, 5)) == 48
    assert name.version == vidcompress.__version__


@every_model
def test_settings_travel_to_other_processes(kind):
    said = {"method": "infomerge", "retention_ratio": 0.07}
    made = (
        settings.resolve(said, config(kind))
        if kind != "llava_onevision"
        else settings.resolve({**said, "siglip_head": "a/folder"}, config(kind))
    )
    other = config(kind)
    assert settings.Serving.of(other) is None
    setattr(other, settings.RESOLVED, made.to_dict())
    assert settings.Serving.of(other) == made
    assert settings.Serving.of(other).fingerprint == made.fingerprint
    assert "infomerge" in str(made) and "retention_ratio=0.07" in str(made)


def test_all_that_decides_is_in_the_fingerprint():
    base = {"method": "infomerge", "retention_ratio": 0.1, "siglip_head": "a/folder"}
    said = [base, {**base, "retention_ratio": 0.11}, {**base, "siglip_head": "b/folder"}, {**base, "temperature": 2.0}]
    prints = [settings.resolve(each, config("llava_onevision")).fingerprint for each in said]
    assert len(set(prints)) == 4 and settings.resolve(base, config("llava_onevision")).fingerprint == prints[0]


def test_another_version_on_another_host_is_refused():
    cfg = config("qwen2_vl")
    resolved = settings.resolve("vidcom2", cfg).to_dict() | {"version": "0.0.9"}
    setattr(cfg, settings.RESOLVED, resolved)
    with pytest.raises(RuntimeError, match=r"this host has vidcompress .*started by one with 0\.0\.9"):
        settings.Serving.of(cfg)


@every_model
def test_every_method_is_served_or_refused_by_name(kind):
    head = {"siglip_head": "a/folder"} if kind == "llava_onevision" else {}
    served = set()
    for name, cls in list_methods().items():
        said = {"method": name} | (head if hasattr(cls(), "siglip_head") else {})
        try:
            found = settings.resolve(said, config(kind))
        except ValueError as error:
            assert str(error).startswith(f"{name} cannot be served: it "), error
        else:
            served.add(name)
            assert found.method.sites(28) == [vidcompress.Site.projector()]
            assert found.method.needs <= settings.SIGNALS and found.method.exact
    assert served == set(settings.servable(28)) >= {"infomerge", "fastvid", "vidcom2", "tome", "divprune", "random"}
    assert not served & {"fastv", "cdpruner", "hieravid", "unified", "visionzip", "framefusion", "llava_scissor"}


def test_the_page_names_what_is_served():
    page = (Path(__file__).parent.parent / "docs/serving.md").read_text(encoding="utf-8")
    (listed,) = re.findall(r"^Methods: ([^.]*)\.", page, re.MULTILINE)
    assert tuple(re.findall(r"`(\w+)`", listed)) == settings.servable(28)


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ("cdpruner", "needs text_hidden: what the encoder gives is cached and shared without the prompt"),
        ("streamingllm", r"acts at decoder\[2\]: a server keeps one KV length for all layers"),
        ("llava_scissor", "keeps a number of tokens that depends on the video"),
        ({"method": "vidcom2", "official": True}, "keeps a number of tokens that depends on the video"),
        ("visionzip", "needs saliency.received, tower_keys, which a served tower does not give"),
        (["vidcom2", "fastv"], "fastv cannot be served"),
        ("infomrege", r"did you mean 'infomerge'\?"),
        ({"method": "vidcom2", "retention_ratio": 0}, r"retention_ratio must be in \(0, 1"),
        ({"method": "vidcom2", "retention_ratio": 1.2}, r"retention_ratio must be in \(0, 1"),
        ({"method": "vidcom2", "ratio": 0.1}, "has no setting 'ratio'"),
        ({"retention_ratio": 0.1}, "must name its `method`"),
        ({"method": "infomerge", "siglip_head": "a/b"}, "is no SigLIP"),
    ],
    ids=str,
)
def test_what_cannot_be_served_says_why(said, reason):
    with pytest.raises(ValueError, match=reason):
        settings.resolve(said, config("qwen2_vl"))


def test_models_that_cannot_be_served():
    with pytest.raises(ValueError, match=r"cannot compress 'qwen3_vl' in a server.*llava_onevision, qwen2_vl"):
        settings.resolve("vidcom2", Qwen3VLConfig())
    sliding = config("qwen2_vl")
    sliding.get_text_config().layer_types = ["full_attention", "sliding_attention"]
    with pytest.raises(ValueError, match="sliding-window"):
        settings.resolve("vidcom2", sliding)


def test_positions_are_what_the_server_does(tmp_path):
    one, three = config("llava_onevision"), config("qwen2_vl")
    for said in ("vidcom2", {"method": "vidcom2", "positions": "renumber"}):
        assert settings.resolve(said, one).method.positions == "renumber"
    assert settings.resolve("vidcom2", three).method.positions == "keep"
    assert settings.resolve({"method": "vidcom2", "positions": "renumber"}, three).method.positions == "renumber"
    path = tmp_path / "mine.yaml"
    path.write_text("method: vidcom2\npositions: keep\n")
    for said in ({"method": "vidcom2", "positions": "keep"}, str(path), [{"method": "vidcom2", "positions": "keep"}]):
        with pytest.raises(ValueError, match="numbers its tokens consecutively"):
            settings.resolve(said, one)


def test_the_head_is_found_or_asked_for():
    tiny, real = config("llava_onevision"), LlavaOnevisionConfig()
    assert settings.resolve("infomerge", real).head == "google/siglip-so400m-patch14-384"
    assert settings.resolve({"method": "infomerge", "siglip_head": "a/folder"}, tiny).head == "a/folder"
    assert settings.resolve("vidcom2", tiny).head is None
    for said, reason in (("auto", "no published SigLIP head fits"), ("none", "siglip_head is 'none'")):
        with pytest.raises(ValueError, match=f"{reason}.*Set siglip_head"):
            settings.resolve({"method": "fastvid", "siglip_head": said}, tiny)
    for name, value in (("vision_feature_layer", [-2, -1]), ("vision_feature_select_strategy", "default")):
        odd = LlavaOnevisionConfig(**{name: value})
        assert settings.resolve("vidcom2", odd).head is None
        with pytest.raises(ValueError, match=f"fastvid cannot be served: the pooling head.*{name}"):
            settings.resolve("fastvid", odd)


# -- the plugin, with a stand-in for vLLM ------------------------------------------------------------------------------
def engine(kind: str, said: Any, **changes: Any) -> Any:
    """As much of a VllmConfig as the plugin looks at; `changes` by attribute, dots included."""
    cfg = config(kind)
    cfg.architectures = ["Stock"]
    if said is not None:
        cfg.vidcompress = said
    media = SimpleNamespace(video_pruning_rate=None, mm_encoder_tp_mode="weights")
    model = SimpleNamespace(
        hf_config=cfg,
        uses_mrope=kind != "llava_onevision",
        multimodal_config=media,
        model_impl="auto",
        runner_type="generate",
    )
    found = SimpleNamespace(
        model_config=model,
        compilation_config=SimpleNamespace(cudagraph_mm_encoder=False, compile_mm_encoder=False),
        parallel_config=SimpleNamespace(pipeline_parallel_size=1),
    )
    for path, value in changes.items():
        *parents, name = path.split("__")
        owner = found
        for parent in parents:
            owner = getattr(owner, parent)
        setattr(owner, name, value)
    return found


@pytest.fixture
def fake_vllm(monkeypatch):
    """Modules of vLLM with what the plugin takes hold of; `.registered` and `.said` fill."""
    seen = SimpleNamespace(registered={}, said=[], version=VLLM_0_32)

    class VllmConfig:
        def try_verify_and_update_config(self) -> str:
            return "verified"

    class Logger:
        info = warning = staticmethod(lambda text, *values: seen.said.append(text % values if values else text))

    def module(name: str, **members: Any) -> None:
        made = types.ModuleType(name)
        vars(made).update(members)
        monkeypatch.setitem(sys.modules, name, made)

    registry = SimpleNamespace(register_model=lambda name, where: seen.registered.__setitem__(name, where))
    module("vllm", __version__=VLLM_0_32, ModelRegistry=registry)
    module("vllm.config", VllmConfig=VllmConfig)
    module("vllm.logger", init_logger=lambda name: Logger)
    module("vllm.platforms", current_platform=SimpleNamespace(is_cpu=lambda: False))
    seen.config = VllmConfig
    return seen


def started(fake: Any, made: Any) -> Any:
    """The stand-in after vLLM looked at its config."""
    for name, value in vars(made).items():
        setattr(fake.config, name, value)
    assert fake.config().try_verify_and_update_config() == "verified"
    return made.model_config.hf_config


def test_the_entry_point_is_there():
    (found,) = [e for e in entry_points(group="vllm.general_plugins") if e.name == "vidcompress"] or pytest.skip(
        "the package is not installed, only on the path"
    )
    assert found.value == "vidcompress.serving:register"


def test_registration(fake_vllm):
    from vidcompress.serving import register

    register()
    register()
    assert set(fake_vllm.registered) == set(plugin.ARCHITECTURES.values())
    assert set(plugin.ARCHITECTURES) == set(settings.MODEL_TYPES)
    assert all(where == f"vidcompress.serving.models:{name}" for name, where in fake_vllm.registered.items())


@every_model
def test_a_config_is_turned_once_into_a_compressed_one(kind, fake_vllm):
    plugin.install()
    made = engine(kind, {"method": "vidcom2", "retention_ratio": 0.2})
    for _ in range(2):
        found = started(fake_vllm, made)
    assert found.architectures == [plugin.ARCHITECTURES[kind]]
    assert settings.Serving.of(found).method.retention_ratio == 0.2
    assert bool(made.model_config.multimodal_config.video_pruning_rate) == (kind != "llava_onevision")
    (line,) = fake_vllm.said
    assert "is active (config): vidcom2(retention_ratio=0.2" in line


def test_stock_models_stay_stock(fake_vllm):
    plugin.install()
    found = started(fake_vllm, engine("qwen2_vl", None))
    assert found.architectures == ["Stock"] and not hasattr(found, settings.RESOLVED) and not fake_vllm.said


@pytest.mark.parametrize("version", ["0.31.9", "0.33.0", "1.0.0", "0.5", "dev"])
def test_other_releases_of_vllm(version, fake_vllm, monkeypatch):
    monkeypatch.setattr(sys.modules["vllm"], "__version__", version)
    plugin.install()
    assert not fake_vllm.registered
    (line,) = fake_vllm.said
    assert f"from 0.32 on, below 0.33, and this is {version}" in line
    assert started(fake_vllm, engine("qwen2_vl", None)).architectures == ["Stock"]
    with pytest.raises(ValueError, match="those that ask for it are refused"):
        started(fake_vllm, engine("qwen2_vl", "vidcom2"))


def test_the_range_is_that_of_the_extra():
    assert plugin.unsupported("0.32.0") is plugin.unsupported("0.32.5.dev1+cpu") is None
    text = (Path(__file__).parent.parent / "pyproject.toml").read_text()
    low, high = (".".join(map(str, bound)) for bound in plugin.SUPPORTED)
    assert f'vllm = ["vllm>={low},<{high}"]' in text


def test_a_vllm_that_cannot_be_guarded(fake_vllm):
    del fake_vllm.config.try_verify_and_update_config
    with pytest.raises(RuntimeError, match="try_verify_and_update_config"):
        plugin.install()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model_config__multimodal_config__video_pruning_rate": 0.5}, "--video-pruning-rate"),
        ({"model_config__model_impl": "transformers"}, "--model-impl transformers"),
        ({"model_config__runner_type": "pooling"}, "--runner pooling"),
        ({"compilation_config__cudagraph_mm_encoder": True}, "cudagraph_mm_encoder"),
        ({"compilation_config__compile_mm_encoder": True}, "compile_mm_encoder: infomerge"),
        ({"model_config__multimodal_config__mm_encoder_tp_mode": "data"}, "--mm-encoder-tp-mode data: infomerge"),
        ({"parallel_config__pipeline_parallel_size": 2}, "pipeline parallelism"),
    ],
    ids=str,
)
def test_options_that_do_not_go_together(changes, reason, fake_vllm):
    plugin.install()
    with pytest.raises(ValueError, match=f"cannot be served together with {reason}"):
        started(fake_vllm, engine("qwen2_vl", "infomerge", **changes))


# -- rotary positions --------------------------------------------------------------------------------------------------
def by_hand(length: int, media: list[Medium]) -> list[tuple[int, int, int]]:
    """Token by token, nothing compressed."""
    rows, following, column = [], 0, 0
    for medium in media:
        for _ in range(medium.offset - column):
            rows.append((following,) * 3)
            following += 1
        t, h, w = medium.grid
        own = [(int(f * medium.seconds), r, c) for f in range(t) for r in range(h) for c in range(w)]
        rows += [tuple(following + x for x in place) for place in own]
        following += max(max(place) for place in own) + 1
        column = medium.offset + len(own)
    return rows + [(following + i,) * 3 for i in range(length - column)]


MEDIA = [Medium(2, 6, (1, 2, 3)), Medium(10, 24, (6, 2, 2), 1.5), Medium(35, 8, (2, 2, 2), 2.0)]


def test_positions_of_a_prompt():
    found, delta = positions.of_prompt(50, MEDIA)
    rows = by_hand(50, MEDIA)
    assert [tuple(p) for p in found.T.tolist()] == rows
    assert 50 + delta == rows[-1][0] + 1
    assert positions.of_prompt(5, [])[0].tolist() == [[0, 1, 2, 3, 4]] * 3
    assert positions.of_prompt(5, [])[1] == 0
    assert positions.renumbered(4)[0].tolist() == [[0, 1, 2, 3]] * 3 and positions.renumbered(4)[1] == 0
    # a prompt that ends in a medium
    assert positions.of_prompt(8, [Medium(2, 6, (1, 2, 3))])[1] == 2 + 3 - 8


def shortened_prompt(kept: list[torch.Tensor]) -> tuple[list[Medium], torch.Tensor, torch.Tensor]:
    """MEDIA with the videos cut to what is kept, [N] which columns hold media, and [3, N] where they must stand."""
    media, rows, gone = [], by_hand(50, MEDIA), 0
    kept = [torch.arange(6), *kept]
    for medium, keep in zip(MEDIA, kept, strict=True):
        media.append(Medium(medium.offset - gone, len(keep), medium.grid, medium.seconds))
        gone += medium.count - len(keep)
    stays = torch.ones(50, dtype=torch.bool)
    for medium, keep in zip(MEDIA, kept, strict=True):
        stays[medium.offset : medium.offset + medium.count] = False
        stays[medium.offset + keep] = True
    is_medium = torch.zeros(50, dtype=torch.bool)
    for medium in MEDIA:
        is_medium[medium.offset : medium.offset + medium.count] = True
    return media, is_medium[stays], torch.tensor(rows).T[:, stays]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("chunk", [100, 7, 3, 1])
def test_survivors_are_placed_whole_or_in_chunks(chunk, dtype):
    kept = [torch.tensor([0, 3, 4, 9, 17, 23]), torch.tensor([1, 6])]
    media, is_medium, expected = shortened_prompt(kept)
    now, delta = positions.of_prompt(len(is_medium), media)
    assert torch.equal(now[:, ~is_medium], expected[:, ~is_medium]), "text is right before anything is encoded"
    assert len(is_medium) + delta == int(expected.max()) + 1
    width, features = 4, []
    for number, medium in enumerate(media):
        own = torch.ones(medium.count, width, dtype=dtype)
        if number:
            places = positions.of_grid(medium.grid, medium.seconds)[:, kept[number - 1]]
            own = torch.cat([own, positions.packed(places, dtype)], 1)
        features.append(own)
    for first in range(0, len(is_medium), chunk):
        inside = []
        for medium, own in zip(media, features, strict=True):
            begin, end = max(first - medium.offset, 0), min(first + chunk - medium.offset, medium.count)
            if begin < end:
                inside.append(own[begin:end])
        now = positions.placed(now, is_medium, inside, first, width)
        end = min(first + chunk, len(is_medium))
        assert torch.equal(now[:, first:end], expected[:, first:end])
    again = positions.placed(now, is_medium, features, 0, width)
    assert torch.equal(again, expected), "a second time, as after preemption"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_positions_travel_exactly(dtype):
    large = torch.tensor([0, 255, 256, 257, 511, 65535, 65536, 2**24 - 1])
    mixed = torch.stack([large, large.flip(0), torch.arange(8)])
    channels = positions.packed(mixed, dtype)
    assert channels.shape == (8, positions.CHANNELS) and channels.dtype == dtype
    assert torch.equal(positions.unpacked(channels), mixed)
    with pytest.raises(ValueError, match="from 0 to 16777215, got 16777216"):
        positions.packed(torch.tensor([[2**24], [0], [0]]), dtype)


# -- one video ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["infomerge", "fastvid", "vidcom2", "tome", "dycoke_outer"])
def test_a_video_is_reduced_as_by_the_method(name):
    grid, generator = (6, 3, 4), torch.Generator().manual_seed(0)
    features = torch.randn(72, 16, generator=generator)
    signals = {"saliency.head": torch.rand(72, generator=generator)}
    method = vidcompress.load(name, retention_ratio=0.5)
    kept, places = reduce.shortened(method, features, grid, signals)
    assert kept.shape == (method.budget(grid), 16) and places.diff().min() > 0
    seen = {**signals, "frame_features": features.view(6, 12, 16).mean(1)}
    tokens = vidcompress.VideoTokens(features, grid, None, {need: seen[need] for need in method.needs})
    expected = method.decide(tokens, vidcompress.Site.projector())
    assert torch.equal(places, expected.keep) and torch.equal(kept, expected.apply(features))


def test_all_is_kept_bit_by_bit():
    features = torch.randn(24, 8).to(torch.bfloat16)
    kept, places = reduce.shortened(vidcompress.load("vidcom2", retention_ratio=1.0), features, (2, 3, 4), {})
    assert torch.equal(kept, features) and places.tolist() == list(range(24))


def test_a_video_of_nan_keeps_its_count(caplog):
    features = torch.randn(24, 8)
    features[3] = torch.nan
    method = vidcompress.load("infomerge", retention_ratio=0.3)
    with caplog.at_level("ERROR"):
        kept, places = reduce.shortened(method, features, (2, 3, 4), {"saliency.head": torch.rand(24)})
    assert len(kept) == method.budget((2, 3, 4)) == len(places.unique()) and "NaN" in caplog.text


# -- the benchmark -----------------------------------------------------------------------------------------------------
def test_the_benchmark_without_vllm(monkeypatch, tmp_path):
    script = runpy.run_path(str(Path(__file__).parent.parent / "scripts" / "bench_serving.py"))
    quantile = script["quantile"]
    assert [quantile([4.0, 1.0, 3.0, 2.0], q) for q in (0.25, 0.5, 0.75, 0.99)] == [1.0, 2.0, 3.0, 4.0]
    assert quantile([7.0], 0.5) == 7.0 and quantile([], 0.5) != quantile([], 0.5)
    clips = script["make_clips"](tmp_path, 3, 4, 32)
    assert len({clip.read_bytes() for clip in clips}) == 3
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ImportError, match=r'vllm.*pip install "vidcompress-transformers\[vllm\]"'):
        script["main"](["--model", "tiny"])
