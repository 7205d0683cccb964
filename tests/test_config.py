"""From what a user writes to a method: every form of it, what wins over what, and what is refused in which words."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from vidcompress.config import list_presets, load, preset_for, shipped
from vidcompress.method import DEPTH, Method, Pipeline, list_methods, setting
from vidcompress.methods.fastvid import FastVID
from vidcompress.methods.hieravid import HieraVid
from vidcompress.methods.infomerge import InfoMerge
from vidcompress.methods.pyramiddrop import PyramidDrop
from vidcompress.methods.random import Random
from vidcompress.tokens import Site

NAMES = sorted(list_methods())


@dataclass(kw_only=True)
class Inner(Method):
    """A method inside the decoder, to stand beside one before it."""

    layer: int = setting(2, "where it acts", low=0)

    def sites(self, depth: int = DEPTH) -> list[Site]:
        return [Site.decoder(self.layer)]


@pytest.fixture
def written(tmp_path: Path) -> Callable[[str], Path]:
    """Writes a YAML file."""

    def write(text: str, name: str = "mine.yaml") -> Path:
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return path

    return write


# -- every form --------------------------------------------------------------------------------------------------------
def test_by_name() -> None:
    method = load("fastvid")
    assert type(method) is FastVID
    assert method.settings().items() >= {"retention_ratio": 0.1, "dyseg_c": 8, "dyseg_tau": 0.9, "beta": 0.6}.items()


@pytest.mark.parametrize("name", NAMES)
def test_every_shipped_file_loads_and_is_what_a_name_means(name: str) -> None:
    method, content = load(name), shipped(name)
    assert type(method) is list_methods()[name]
    values = {k: v for k, v in content.items() if k not in ("method", "paper", "differs", "presets")}
    row = preset_for(content.get("presets") or {}, method.retention_ratio)
    assert method.settings().items() >= (values | row).items()


def test_by_name_with_overrides() -> None:
    method = load("fastvid", retention_ratio=0.2, dyseg_c=4, positions="renumber")
    assert (method.retention_ratio, method.dyseg_c, method.positions, method.beta) == (0.2, 4, "renumber", 0.6)


def test_by_mapping() -> None:
    given = {"method": "fastvid", "retention_ratio": 0.3, "beta": 0.5}
    before = dict(given)
    method = load(given, beta=0.7)
    assert (method.retention_ratio, method.beta, method.dyseg_c) == (0.3, 0.7, 8)
    assert given == before


@pytest.mark.parametrize("kind", [str, Path])
def test_by_file(kind: type, written: Callable[..., Path]) -> None:
    path = written("method: random\nseed: 7\nretention_ratio: 0.5\npaper: {title: notes are allowed}\n")
    method = load(kind(path), retention_ratio=0.25)
    assert type(method) is Random and (method.seed, method.retention_ratio) == (7, 0.25)


def test_by_file_name_alone(written: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(written("method: random\nseed: 3\n", "here.yml").parent)
    assert load("here.yml").seed == 3


def test_by_path_without_a_suffix(written: Callable[..., Path]) -> None:
    path = written("method: random\nseed: 3\n", "here")
    assert load(path).seed == load(str(path)).seed == 3


def test_by_method() -> None:
    method = FastVID(beta=0.5)
    assert load(method) is method
    other = load(method, beta=0.4)
    assert (other.beta, method.beta) == (0.4, 0.5) and other.dyseg_c == method.dyseg_c


def test_by_list(written: Callable[..., Path]) -> None:
    inner = Inner(layer=3)
    outer = written("method: random\nseed: 3\n")
    for entry in ("random", {"method": "random"}, Random(), outer, str(outer)):
        pipeline = load([entry, inner])
        assert isinstance(pipeline, Pipeline) and pipeline.name == "random+Inner"
        assert pipeline.stages() == {Site.projector(): pipeline.methods[0], Site.decoder(3): inner}
    assert load((inner,)).methods == (inner,)
    assert load(pipeline) is pipeline
    assert load([pipeline, Inner(layer=5)]).name == "random+Inner+Inner"


def test_by_file_with_a_list(written: Callable[..., Path]) -> None:
    pipeline = load(written("- {method: infomerge, retention_ratio: 0.05}\n"))
    assert isinstance(pipeline, Pipeline)
    (method,) = pipeline
    assert (method.retention_ratio, method.temperature) == (0.05, 2.0)


def test_numbers_are_taken_as_the_field_wants_them() -> None:
    method = load("fastvid", retention_ratio=1, beta=0, dyseg_c=3)
    assert isinstance(method.retention_ratio, float) and isinstance(method.beta, float)
    assert isinstance(method.dyseg_c, int)


@pytest.mark.parametrize("name", NAMES)
def test_settings_survive_yaml(name: str, written: Callable[..., Path]) -> None:
    # The ratio is one where a preset would change other settings if they were not written down.
    least = {f.name: f.metadata["low"] for f in fields(list_methods()[name])}["retention_ratio"]
    ratios = (least, 0.3) if least else (0.05, 0.15)
    for method in (load(name), load(name, retention_ratio=ratios[0]), list_methods()[name](retention_ratio=ratios[1])):
        text = yaml.safe_dump({"method": name} | method.settings())
        assert load(written(text)) == method
        assert load(yaml.safe_load(text)) == method


def test_settings_that_are_none_survive_yaml(written: Callable[..., Path]) -> None:
    method = load("fastvid", siglip_head=None)
    assert method.siglip_head is None
    assert load(written(yaml.safe_dump({"method": "fastvid"} | method.settings()))) == method


# -- presets -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("ratio", "temperature", "static_ratio"),
    [
        (0.05, 2.0, 0.05),
        (0.10, 1.2, 0.10),
        (0.15, 1.2, 0.09),
        (0.01, 2.0, 0.05),
        (0.07, 2.0, 0.05),
        (0.08, 1.2, 0.10),
        (0.125, 1.2, 0.10),  # between two rows: the smaller
        (0.075, 2.0, 0.05),
        (0.13, 1.2, 0.09),
        (0.9, 1.2, 0.09),
        (1, 1.2, 0.09),
    ],
)
def test_the_nearest_preset(ratio: float, temperature: float, static_ratio: float) -> None:
    method = load("infomerge", retention_ratio=ratio)
    assert (method.retention_ratio, method.temperature, method.static_ratio) == (ratio, temperature, static_ratio)
    assert load({"method": "infomerge", "retention_ratio": ratio}) == method


def test_the_shipped_ratio_picks_its_preset() -> None:
    assert load("infomerge") == load("infomerge", retention_ratio=0.10)


def test_an_explicit_setting_wins_over_the_preset(written: Callable[..., Path]) -> None:
    for method in (
        load("infomerge", retention_ratio=0.05, temperature=1.5),
        load({"method": "infomerge", "temperature": 1.5}, retention_ratio=0.05),
        load(written("method: infomerge\nretention_ratio: 0.05\ntemperature: 1.5\n")),
    ):
        assert (method.temperature, method.static_ratio) == (1.5, 0.05)


def test_presets_of_the_users_own_file(written: Callable[..., Path]) -> None:
    path = written(
        """
        method: infomerge
        penalty_strength: 3.0
        presets:
          0.2: {temperature: 9.0}
          0.4: {temperature: 8.0, penalty_strength: 5.0}
        """
    )
    assert load(path).temperature == 9.0  # the shipped ratio, 0.10
    high = load(path, retention_ratio=0.5)
    assert (high.temperature, high.penalty_strength) == (8.0, 3.0)  # what the file sets outside the rows wins
    assert high.static_ratio == InfoMerge().static_ratio  # its rows replace the shipped ones
    assert load(path, retention_ratio=0.5, temperature=1.0).temperature == 1.0


def test_preset_for() -> None:
    rows = {0.1: {"a": 1}, 0.3: {"a": 2}}
    assert preset_for(rows, 0.2) == {"a": 1} and preset_for(rows, 0.20001) == {"a": 2}
    assert preset_for({0.3: {"a": 2}, 0.1: {"a": 1}}, 0.2) == {"a": 1}  # the order of the rows does not matter
    assert preset_for({0.05: {"a": 1}, 0.1: {"a": 2}, 0.15: {"a": 3}}, 0.125) == {"a": 2}  # 0.15 - 0.125 < 0.125 - 0.1
    assert preset_for({}, 0.2) == {}
    preset_for(rows, 0.1)["a"] = 5
    assert rows[0.1] == {"a": 1}


@pytest.mark.parametrize(
    "presets",
    [
        "{0.1: {temprature: 2.0}}",
        "{0.1: {temperature: high}}",
        "{low: {temperature: 2.0}}",
        "{0.1: 2.0}",
        "[0.1, 0.2]",
        "0.1",
    ],
)
def test_presets_that_cannot_be_used(presets: str, written: Callable[..., Path]) -> None:
    with pytest.raises((ValueError, TypeError), match=r"infomerge|presets") as refusal:
        load(written(f"method: infomerge\npresets: {presets}\n"), retention_ratio=0.1)
    assert any(word in str(refusal.value) for word in ("preset", "temprature", "temperature"))


def test_a_key_given_twice(written: Callable[..., Path]) -> None:
    with pytest.raises(ValueError, match=r"line 3: 'seed' is given twice"):
        load(written("method: random\nseed: 1\nseed: 2\n"))


# -- named presets -----------------------------------------------------------------------------------------------------
PRESETS = sorted(list_presets())


def test_named_presets_are_called_after_their_methods() -> None:
    assert list_presets().items() >= {f"hieravid-{ratio}": "hieravid" for ratio in (10, 20, 30)}.items()
    assert not set(list_presets()) & set(NAMES)
    assert list_presets() == {name: shipped(name)["method"] for name in PRESETS}


@pytest.mark.parametrize("name", PRESETS)
def test_by_the_name_of_a_preset(name: str, written: Callable[..., Path]) -> None:
    method, content = load(name), shipped(name)
    assert type(method) is list_methods()[list_presets()[name]]
    assert method.settings().items() >= {k: v for k, v in content.items() if k != "method"}.items()
    for given in ({"method": name}, written(f"method: {name}\n")):
        assert load(given) == method
    pipeline = load([name, Inner(layer=9)])
    assert pipeline.methods[0] == method and pipeline.name == f"{method.name}+Inner"
    # What it does not say is as in the method's own file, but for a ratio that follows from what it says.
    own = load(list_presets()[name]).settings()
    assert all(method.settings()[key] == own[key] for key in own.keys() - content.keys() - {"retention_ratio"})


def test_a_preset_with_settings_of_ones_own(written: Callable[..., Path]) -> None:
    for method in (
        load("hieravid-20", beta=0.7),
        load({"method": "hieravid-20", "beta": 0.7}),
        load({"method": "hieravid-20", "beta": 0.1}, beta=0.7),
        load(written("method: hieravid-20\nbeta: 0.7\n")),
    ):
        assert method == HieraVid(retention_ratio=0.2, first=0.545, q=0.355, beta=0.7)
    # What the preset says gives way as well, but for its ratio.
    assert load("hieravid-20", q=0.5).q == load({"method": "hieravid-20", "q": 0.5}).q == 0.5
    with pytest.raises(ValueError, match=r"hieravid has no setting 'bta' \(did you mean 'beta'\?\)"):
        load("hieravid-20", bta=0.7)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_fixes_its_ratio(name: str, written: Callable[..., Path]) -> None:
    says = rf"{name} fixes retention_ratio; use '{list_presets()[name]}' with one of your own"
    for given, overrides in (
        (name, {"retention_ratio": 0.5}),
        ({"method": name}, {"retention_ratio": 0.1}),
        ({"method": name, "retention_ratio": 0.1}, {}),
        ([{"method": name, "retention_ratio": 0.1}], {}),
        (written(f"method: {name}\nretention_ratio: 0.1\n"), {}),
    ):
        with pytest.raises(ValueError, match=says):
            load(given, **overrides)


def test_a_preset_that_is_misspelt() -> None:
    for wrong, right in {"hieravid-31": "hieravid-30", "hiera-vid": "hieravid", "hieravid_20": "hieravid-20"}.items():
        with pytest.raises(ValueError, match=rf"unknown compression '{wrong}' \(did you mean '{right}'") as refusal:
            load(wrong)
        assert all(name in str(refusal.value) for name in [*NAMES, *PRESETS])


@pytest.mark.parametrize("ratio", [0.01, 0.02, 0.05, 0.1])
def test_unified_keeps_half_inside(ratio: float) -> None:
    method = load("unified", retention_ratio=ratio)
    assert (method.retention_ratio, method.keep_ratio) == (ratio, 0.5)
    assert load("unified", retention_ratio=ratio, keep_ratio=0.25).keep_ratio == 0.25


# -- lists as settings -------------------------------------------------------------------------------------------------
def test_settings_that_are_lists(written: Callable[..., Path]) -> None:
    path = written("method: pyramiddrop\nlayers: [3, 9]\nratios: [0.5, 1.0e-1]\n")
    for method in (
        load(path),
        load("pyramiddrop", layers=(3, 9), ratios=[0.5, 0.1]),
        PyramidDrop(layers=[np.int64(3), 9], ratios=[np.float32(0.5), 0.1]),
    ):
        assert method.layers == (3, 9) and method.ratios == (0.5, 0.1)
        assert {type(value) for value in (*method.layers, *method.ratios)} == {int, float}
        assert method.settings()["layers"] == [3, 9]
        assert load(yaml.safe_load(yaml.safe_dump({"method": "pyramiddrop"} | method.settings()))) == method
    assert load("pyramiddrop", layers=None).layers is None


# -- what is refused: names --------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("unifed", "unified"),
        ("pyramid_drop", "pyramiddrop"),
        ("infomerg", "infomerge"),
        ("fast_vid", "fastvid"),
        ("uniform_token", "uniform_tokens"),
        ("randm", "random"),
    ],
)
def test_unknown_method_with_the_nearest_name(wrong: str, right: str) -> None:
    for given in (wrong, {"method": wrong}, [wrong]):
        with pytest.raises(ValueError, match=rf"unknown compression '{wrong}' \(did you mean '{right}'\?\)") as refusal:
            load(given)
        assert all(name in str(refusal.value) for name in NAMES)


@pytest.mark.parametrize("wrong", ["zzzzz", "", "42"])
def test_unknown_method_like_none(wrong: str) -> None:
    with pytest.raises(ValueError, match=rf"unknown compression '{wrong}'; available: .*fastvid") as refusal:
        load(wrong)
    assert "did you mean" not in str(refusal.value)


def test_unknown_setting_with_the_nearest_name(written: Callable[..., Path]) -> None:
    says = r"infomerge has no setting 'temprature' \(did you mean 'temperature'\?\); it has: .*retention_ratio.*dyseg_c"
    for given, overrides in (
        ("infomerge", {"temprature": 1.0}),
        ({"method": "infomerge", "temprature": 1.0}, {}),
        (written("method: infomerge\ntemprature: 1.0\n"), {}),
        (InfoMerge(), {"temprature": 1.0}),
    ):
        with pytest.raises(ValueError, match=says):
            load(given, **overrides)


def test_unknown_setting_like_none(written: Callable[..., Path]) -> None:
    with pytest.raises(ValueError, match="random has no setting 'layer'; it has:"):
        load("random", layer=2)
    with pytest.raises(ValueError, match="random has no setting 1; it has:"):
        load(written("method: random\n1: 2\n"))
    with pytest.raises(ValueError, match="random has no setting 'method'"):
        load("random", method="fastvid")


@pytest.mark.parametrize(
    "given", [{}, {"retention_ratio": 0.1}, {"method": None}, {"method": 3}, {"method": ["random"]}]
)
def test_a_mapping_without_a_method(given: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"this mapping must name its `method` \(one of: .*fastvid.*\), got"):
        load(given)


@pytest.mark.parametrize("given", [None, 3, 0.1, True, FastVID, object()])
def test_no_compression_at_all(given: Any) -> None:
    with pytest.raises(
        TypeError,
        match=r"compression must be a method's name, a YAML path, .* got (NoneType|int|float|bool|type|object)",
    ):
        load(given)


# -- what is refused: values -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("ratio", [0, 0.0, -0.1, -1, 1.0001, 2, 15, math.nan, math.inf, -math.inf, 1e-400])
@pytest.mark.parametrize("name", NAMES)
def test_ratios_out_of_range(name: str, ratio: float) -> None:
    with pytest.raises(ValueError, match=rf"{name}: retention_ratio must be .*1.*got ") as refusal:
        load(name, retention_ratio=ratio)
    assert f"got {ratio!r}" in str(refusal.value) or f"got {float(ratio)!r}" in str(refusal.value)
    with pytest.raises(ValueError, match="retention_ratio must be"):
        list_methods()[name](retention_ratio=ratio)


@pytest.mark.parametrize("ratio", ["0.1", "ten percent", "", None, True, False, [0.1], {"a": 1}, 1j])
@pytest.mark.parametrize("name", ["infomerge", "random"])
def test_ratios_of_another_type(name: str, ratio: Any) -> None:
    with pytest.raises(TypeError, match=rf"{name}: retention_ratio must be (of type float|given), got ") as refusal:
        load(name, retention_ratio=ratio)
    assert repr(ratio) in str(refusal.value)


def test_ratios_at_the_edge() -> None:
    assert load("random", retention_ratio=1).retention_ratio == 1.0
    assert load("random", retention_ratio=1e-9).retention_ratio == 1e-9


@pytest.mark.parametrize(
    ("setting_", "value", "error", "says"),
    [
        ("dyseg_c", 0, ValueError, "dyseg_c must be at least 1, got 0"),
        ("dyseg_c", 2.0, TypeError, r"dyseg_c must be of type int, got 2\.0"),
        ("dyseg_c", "8", TypeError, "dyseg_c must be of type int, got '8'"),
        ("dyseg_c", True, TypeError, "dyseg_c must be of type int, got True"),
        ("dyseg_c", None, TypeError, "dyseg_c must be given, got None"),
        ("dyseg_tau", math.nan, ValueError, "dyseg_tau must be finite, got nan"),
        ("context_share", 1.5, ValueError, r"context_share must be in \[0, 1\], got 1\.5"),
        ("context_share", -0.1, ValueError, r"context_share must be in \[0, 1\], got -0\.1"),
        ("temperature", -1, ValueError, "temperature must be at least 0, got -1"),
        ("temperature", math.inf, ValueError, "temperature must be at least 0, got inf"),
        ("tfd", 1, TypeError, "tfd must be of type bool, got 1"),
        ("tfd", "true", TypeError, "tfd must be of type bool, got 'true'"),
        ("penalty", "expp", ValueError, r"penalty must be one of 'exp', .*got 'expp' \(did you mean 'exp'\?\)"),
        ("penalty", 3, ValueError, "penalty must be one of 'exp', 'subtract', 'divide', got 3"),
        ("penalty", ["exp"], ValueError, r"penalty must be one of .*, got \['exp'\]"),
        ("penalty", None, TypeError, "penalty must be given, got None"),
        ("positions", "renumbered", ValueError, r"positions must be one of .* \(did you mean 'renumber'\?\)"),
        ("siglip_head", 3, TypeError, "siglip_head must be of type str, got 3"),
    ],
)
def test_values_that_are_refused(
    setting_: str, value: Any, error: type, says: str, written: Callable[..., Path]
) -> None:
    with pytest.raises(error, match=f"infomerge: {says}"):
        load("infomerge", **{setting_: value})
    with pytest.raises(error, match=f"infomerge: {says}"):
        InfoMerge(**{setting_: value})
    path = written(yaml.safe_dump({"method": "infomerge", setting_: value}))
    with pytest.raises(error, match=f"infomerge: {says}"):
        load(path)


def test_a_number_that_yaml_reads_as_text(written: Callable[..., Path]) -> None:
    with pytest.raises(TypeError, match=r"eps must be of type float, got '1e-6' .*with a dot: 1\.0e-6"):
        load(written("method: infomerge\neps: 1e-6\n"))
    assert load(written("method: infomerge\neps: 1.0e-6\n")).eps == 1e-6
    with pytest.raises(TypeError) as refusal:
        load("infomerge", eps="small")
    assert "with a dot" not in str(refusal.value)


def test_a_method_cannot_be_made_wrong_by_position() -> None:
    with pytest.raises(TypeError):
        FastVID(0.1)  # type: ignore[misc]


# -- what is refused: files --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("path", ["no/such.yaml", "nowhere.yml", "no/such/folder"])
def test_missing_file(path: str) -> None:
    with pytest.raises(FileNotFoundError, match=f"no such YAML file: {path}"):
        load(path)
    with pytest.raises(FileNotFoundError, match=f"no such YAML file: {path}"):
        load(Path(path))


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such YAML file"):
        load(tmp_path)


@pytest.mark.parametrize("text", ["", "# nothing\n", "infomerge\n", "3\n", "null\n", "true\n"])
def test_yaml_that_is_no_mapping(text: str, written: Callable[..., Path]) -> None:
    with pytest.raises(ValueError, match=r"mine\.yaml must hold a mapping with the key `method`"):
        load(written(text))


@pytest.mark.parametrize(
    "text", ["method: [random\n", "method: random\n\tseed: 3\n", "a: b: c\n", "!!python/object:os.x {}\n"]
)
def test_broken_yaml(text: str, written: Callable[..., Path]) -> None:
    with pytest.raises(ValueError, match=r"mine\.yaml is not YAML: "):
        load(written(text))


def test_binary_file(tmp_path: Path) -> None:
    path = tmp_path / "video.yaml"
    path.write_bytes(b"\x00\x00\x00\x20ftypisom\xff\xfe\x80")
    with pytest.raises(ValueError, match=r"video\.yaml is not YAML"):
        load(path)


def test_a_file_without_a_method_is_named(written: Callable[..., Path]) -> None:
    with pytest.raises(ValueError, match=r"mine\.yaml must name its `method` \(one of: .*fastvid.*\), got None"):
        load(written("retention_ratio: 0.1\n"))


@pytest.mark.parametrize("entry", ["3", "null", "0.5"])
def test_a_list_of_something_else(entry: str, written: Callable[..., Path]) -> None:
    with pytest.raises(TypeError, match="compression must be a method's name"):
        load(written(f"- random\n- {entry}\n"))


# -- what is refused: pipelines ----------------------------------------------------------------------------------------
def test_an_empty_pipeline(written: Callable[..., Path]) -> None:
    for given in ([], (), written("[]\n")):
        with pytest.raises(ValueError, match="at least one method"):
            load(given)


def test_two_methods_at_one_site() -> None:
    with pytest.raises(ValueError, match="fastvid and infomerge both act at projector"):
        load(["fastvid", "infomerge"])
    with pytest.raises(ValueError, match=r"Inner and Inner both act at decoder\[2\]"):
        load([Inner(), Inner()])


def test_methods_out_of_order() -> None:
    with pytest.raises(ValueError, match=r"random acts at projector, before Inner at decoder\[2\]; list the methods"):
        load([Inner(), "random"])
    with pytest.raises(ValueError, match=r"Inner acts at decoder\[2\], before Inner at decoder\[5\]; list the methods"):
        load([Inner(layer=5), Inner(layer=2)])
    assert [m.layer for m in load([Inner(layer=2), Inner(layer=5)])] == [2, 5]


def test_methods_beyond_the_depth() -> None:
    pipeline = load(["random", Inner(layer=40)])  # no model is at hand yet
    assert list(pipeline.stages(41)) == [Site.projector(), Site.decoder(40)]
    with pytest.raises(ValueError, match=r"Inner acts at the input of layer 40; this decoder has 40 layers, 0 to 39"):
        pipeline.stages(40)


def test_each_method_has_its_own_positions() -> None:
    pipeline = load([{"method": "random", "positions": "renumber"}, Inner(), Inner(layer=5, positions="renumber")])
    assert [m.positions for m in pipeline] == ["renumber", "keep", "renumber"]


def test_settings_beside_a_pipeline(written: Callable[..., Path]) -> None:
    for given in ([Random()], Pipeline([Random()]), written("- random\n")):
        with pytest.raises(ValueError, match=r"settings \['retention_ratio'\] are ambiguous for a pipeline"):
            load(given, retention_ratio=0.1)


def test_a_pipeline_needs_what_its_methods_need() -> None:
    pipeline = load(["infomerge", Inner(layer=1), Inner(layer=4)])
    assert pipeline.needs == InfoMerge.needs
    assert list(pipeline.stages()) == [Site.projector(), Site.decoder(1), Site.decoder(4)]


# -- discovery ---------------------------------------------------------------------------------------------------------
def test_list_methods_is_sorted_and_holds_classes() -> None:
    found = list_methods()
    assert list(found) == sorted(found) and all(issubclass(cls, Method) for cls in found.values())
    assert all(cls.name == name for name, cls in found.items())
    assert "Inner" not in found and "Method" not in found
    assert found["unified"] is not found["unified_pool"]  # a method that is made of others hides none of them


# -- presets follow the ratio ------------------------------------------------------------------------------------------
def test_a_new_ratio_moves_a_method_to_its_preset() -> None:
    moved = load(load("infomerge"), retention_ratio=0.05)
    assert (moved.temperature, moved.static_ratio) == (2.0, 0.05)
    chosen = load(load("infomerge", temperature=3.0), retention_ratio=0.05)
    assert (chosen.temperature, chosen.static_ratio) == (3.0, 0.05)
    assert load(load("infomerge"), retention_ratio=0.05, static_ratio=0.5).static_ratio == 0.5
    with pytest.raises(ValueError, match=r"retention_ratio must be in \(0, 1\], got 2"):
        load(load("infomerge"), retention_ratio=2)


def test_numbers_and_paths_of_other_types() -> None:
    method = load("infomerge", retention_ratio=np.float32(0.5), dyseg_c=np.int64(4), siglip_head=Path("a") / "b")
    assert type(method.retention_ratio) is float and type(method.dyseg_c) is int
    assert method.siglip_head == str(Path("a") / "b")
    with pytest.raises(TypeError, match=r"must be of type float, got '0.1'$"):
        load("infomerge", retention_ratio="0.1")
