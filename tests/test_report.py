"""Pages and pictures: what is drawn is what the trace says was done, and bad input is refused before any work."""

from __future__ import annotations

import base64
import json
import re
import sys
import zlib
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from checkpoint import make_clip
from report_samples import result, sample, side, step, steps_of
from tiny import compress, llava, llava_inputs
from torch import Tensor

from vidcompress.cli import main
from vidcompress.config import load
from vidcompress.method import Pipeline
from vidcompress.report import Side, TokenMap, choose, collect, render, write_picture
from vidcompress.report import page as pages
from vidcompress.report.drawing import overlay, runs
from vidcompress.report.frames import Field, field_of, frames_of, thumbnails
from vidcompress.report.picture import draw
from vidcompress.tokens import Reduction
from vidcompress.trace import Prompt

GRID = (4, 3, 5)


def matrices(steps: list) -> list[tuple[Tensor, Tensor]]:
    """(places [K], weights [K, N]) after every step, by carrying the steps out on the unit matrix."""
    features, places, found = torch.eye(steps[0].before), torch.arange(steps[0].before), []
    for taken in steps:
        features, places = taken.reduction.apply(features), places[taken.reduction.keep]
        found.append((places, features))
    return found


# -- what became of every token ----------------------------------------------------------------------------------------
def test_a_hand_worked_map() -> None:
    """Of 6 tokens 0, 2, 4 stay, 2 takes in half of 3, 5 goes; then 2 is taken in by 0, and 4 goes."""
    merged = Reduction.merging(
        torch.tensor([0, 2, 4]), 6, [(torch.tensor([2, 2]), torch.tensor([2, 3]), torch.tensor([0.5, 0.5]))]
    )
    again = Reduction.merging(
        torch.tensor([0]), 3, [(torch.tensor([0, 0]), torch.tensor([0, 1]), torch.tensor([0.75, 0.25]))]
    )
    tokens = TokenMap.of([step(merged, (2, 1, 3)), step(Reduction.identity(3), (2, 1, 3)), step(again, (2, 1, 3))])
    assert len(tokens.stages) == 2  # where nothing happened is no stage
    assert tokens.place.tolist() == [2, 0, 1, 0, 1, 0]
    assert tokens.content.tolist() == [2, 0, 2, 2, 1, 0]
    assert tokens.fate(0).tolist() == [0] * 6
    assert tokens.fate(1).tolist() == [0, 2, 0, 1, 0, 2]
    assert tokens.fate(2).tolist() == [0, 2, 1, 1, 2, 2]
    assert tokens.counts(1).tolist() == [[2, 0, 1], [1, 1, 1]] and tokens.counts(2).tolist() == [[1, 1, 1], [0, 1, 2]]
    assert tokens.sources(2, 1) == {2: 0.5, 3: 0.5} and tokens.sources(4, 1) == {4: 1.0}
    assert tokens.sources(0, 2) == {0: 0.75, 2: 0.125, 3: 0.125}


def test_a_kept_place_may_have_lost_its_content() -> None:
    other = Reduction.merging(torch.tensor([0]), 2, [(torch.tensor([0]), torch.tensor([1]), torch.tensor([1.0]))])
    tokens = TokenMap.of([step(other, (1, 1, 2))])
    assert tokens.fate(1).tolist() == [0, 1] and tokens.sources(0, 1) == {1: 1.0}
    naught = Reduction.merging(
        torch.tensor([0]), 2, [(torch.tensor([0, 0]), torch.tensor([0, 1]), torch.tensor([1.0, 0.0]))]
    )
    assert TokenMap.of([step(naught, (1, 1, 2))]).fate(1).tolist() == [0, 2]  # a weight of nothing carries nothing


@pytest.mark.parametrize("seed", range(4))
def test_maps_equal_what_the_steps_do(seed: int) -> None:
    steps = steps_of(GRID, seed)
    tokens = TokenMap.of(steps)
    changed = [m for taken, m in zip(steps, matrices(steps), strict=True) if not taken.reduction.is_identity]
    for stage, (places, weights) in enumerate(changed, 1):
        fate = torch.where((weights != 0).any(0), 1, 2)
        fate[places] = 0
        assert torch.equal(tokens.fate(stage), fate)
        for place, row in zip(places.tolist(), weights, strict=True):
            mixed = tokens.sources(place, stage)
            assert sorted(mixed) == row.nonzero().squeeze(1).tolist()
            torch.testing.assert_close(torch.tensor([mixed[i] for i in sorted(mixed)]), row[row != 0])


def test_the_map_of_a_real_prompt_is_its_trace() -> None:
    model = llava()
    trace = compress(model, load("unified", retention_ratio=0.3)).trace
    with torch.no_grad():
        model(**llava_inputs([[5, "V", 7, 8]], 6))
    record = trace.last
    assert record is not None and len(record.steps) == 2
    tokens = TokenMap.of(record.steps)
    last = len(tokens.stages)
    assert int(tokens.counts(last)[:, 0].sum()) == record.after and int(tokens.counts(0).sum()) == record.before
    places, weights = matrices(record.steps)[-1]
    assert (tokens.place == last).nonzero().squeeze(1).tolist() == places.tolist()
    assert torch.equal(tokens.content == last, (weights != 0).any(0) | (tokens.place == last))


def test_steps_of_one_video_are_asked_for() -> None:
    with pytest.raises(ValueError, match="not compressed"):
        TokenMap.of([])
    kept = Reduction.identity(4)
    with pytest.raises(ValueError, match="several videos"):
        TokenMap.of([step(kept, (1, 2, 2)), replace(step(kept, (1, 2, 2)), video=1)])


def test_models_without_a_record_are_refused() -> None:
    model = llava(layers=1)
    with pytest.raises(ValueError, match="is not compressed"):
        Side.of(model, result())
    handle = compress(model, load("random"))
    with pytest.raises(ValueError, match="no video yet"):
        Side.of(model, result())
    with pytest.raises(ValueError, match="compressed already"):
        collect(model, None, sample().video, "What?", choose("random"))
    handle.trace.prompts.append(Prompt())
    with pytest.raises(ValueError, match="nothing is recorded"):
        Side.of(model, result())
    handle.trace.clear()
    handle.trace.enabled = False
    with pytest.raises(ValueError, match="it is off"):
        Side.of(model, result())


# -- the frames --------------------------------------------------------------------------------------------------------
def test_which_frames_share_their_tokens() -> None:
    assert [list(frames_of(r, (4, 2, 2), 4)) for r in range(4)] == [[0], [1], [2], [3]]
    assert [list(frames_of(r, (3, 2, 2), 5)) for r in range(3)] == [[0, 1], [2, 3], [4]]  # the last one was repeated
    assert list(frames_of(0, (1, 2, 2), 1)) == [0]


def test_what_of_a_frame_is_seen() -> None:
    siglip = SimpleNamespace(vision_config=SimpleNamespace(image_size=384, patch_size=14))
    share = 378 / 384  # 27 patches of 14 pixels; 9, 14 and 27 tokens see all of them, 13 tokens 26
    for n, seen in ((9, share), (14, share), (27, share), (13, 26 * 14 / 384)):
        field = field_of(None, siglip, (1, n, n), 480, 640)
        assert (field.left, field.top) == (0, 0) and field.width == field.height == pytest.approx(seen)
    qwen = SimpleNamespace(vision_config=SimpleNamespace(patch_size=14))
    assert field_of(None, qwen, (2, 5, 11), 272, 640) == Field() and Field().whole
    from transformers import LlavaNextVideoVideoProcessor, LlavaOnevisionVideoProcessor

    clip = SimpleNamespace(vision_config=SimpleNamespace(image_size=224, patch_size=14))
    for processor, width in ((LlavaNextVideoVideoProcessor(), 272 / 640), (LlavaOnevisionVideoProcessor(), 1)):
        field = field_of(SimpleNamespace(video_processor=processor), clip, (1, 8, 8), 272, 640)
        assert field.width == pytest.approx(width, abs=1e-3) and field.left == pytest.approx((1 - width) / 2, abs=1e-3)
        assert (field.top, field.height) == (0, 1)


def test_pictures_fit() -> None:
    from io import BytesIO

    from PIL import Image

    video = sample((8, 3, 5)).video
    large = thumbnails(video)
    assert (large.width, large.height) == (60, 36)  # never enlarged
    picture = Image.open(BytesIO(base64.b64decode(large.uris[2].partition(",")[2])))
    assert picture.size == (60, 36) and picture.format == "WEBP"
    wide = replace(video, frames=np.repeat(np.repeat(video.frames, 10, 1), 10, 2))
    full = thumbnails(wide)
    assert (full.width, full.height) == (360, 216)
    small = thumbnails(wide, full.bytes - 1)
    assert small.width < 360 and small.bytes < full.bytes and len(small.uris) == 8


# -- the page ----------------------------------------------------------------------------------------------------------
def frames_in(html: str) -> dict[tuple[int, int], dict[str, int]]:
    """Tokens that the page draws and those that it counts, by (side, row)."""
    found = {}
    for chunk in html.split('<div class="frame"')[1:]:
        number, row = (int(re.search(rf'data-{name}="(\d+)"', chunk).group(1)) for name in ("side", "row"))
        drawn = dict.fromkeys("kmda", 0)
        for kind, d in re.findall(r'<path class="([kmda])" data-f="[\d ]+" d="([^"]*)"/>', chunk):
            drawn[kind] += sum(map(int, re.findall(r"v1h-(\d+)z", d)))
        counted = dict(re.findall(r'<span class="c ([kmd])"><i></i><b>(\d+)</b>', chunk))
        spoken = re.search(r'aria-label="[^"]*: (\d+) kept, (\d+) merged, (\d+) dropped"', chunk).groups()
        assert [*counted.values()] == [*spoken]
        found[number, row] = drawn | {f"counted {k}": int(n) for k, n in counted.items()}
    return found


def test_what_is_drawn_is_what_was_done() -> None:
    report = sample(GRID)
    frames = frames_in(render(report))
    assert sorted(frames) == [(s, r) for s in range(2) for r in range(GRID[0])]
    for number, shown in enumerate(report.sides):
        counts = shown.tokens.counts(len(shown.tokens.stages)).tolist()
        for row, expected in enumerate(counts):
            drawn = frames[number, row]
            assert [drawn[k] for k in "kmda"] == [*expected, 0] == [*(drawn[f"counted {k}"] for k in "kmd"), 0]
            assert sum(expected) == GRID[1] * GRID[2]
    plain = replace(report, sides=[side([step(Reduction.identity(60), GRID)])])
    assert all(drawn["a"] == 15 and drawn["counted k"] == 15 for drawn in frames_in(render(plain)).values())


def test_every_token_is_drawn_in_its_place() -> None:
    tokens = sample(GRID).sides[0].tokens
    for row in range(GRID[0]):
        places = torch.full(GRID[1:], -1)
        for place, content, d in overlay(tokens, row):
            for x, y, n in (map(int, m) for m in re.findall(r"M(\d+) (\d+)h(\d+)v1h-\d+z", d)):
                assert (places[y, x : x + n] == -1).all() and (n == 1 or place == 0)
                places[y, x : x + n] = 10 * place + content
        assert torch.equal(places, (10 * tokens.place + tokens.content).view(GRID)[row])


def unpacked(text: str, kind: type) -> Tensor:
    return torch.from_numpy(np.frombuffer(zlib.decompress(base64.b64decode(text)), kind).copy())


def test_the_script_is_given_the_trace() -> None:
    report = sample(GRID)
    data = json.loads(re.search(r'id="data">(.*?)</script>', render(report), re.DOTALL).group(1))
    assert data["grid"] == [*GRID] and not data["wide"] and data["field"] == [0, 0, 1, 1]
    assert data["rows"][1] == ["Frame 2", "0.2 s"]
    for given, shown in zip(data["sides"], report.sides, strict=True):
        tokens = shown.tokens
        assert torch.equal(unpacked(given["place"], np.uint8), tokens.place.byte())
        assert torch.equal(unpacked(given["content"], np.uint8), tokens.content.byte())
        assert len(given["merges"]) == len(given["stages"]) == len(tokens.stages)
        for packed, (survivor, source, weight) in zip(given["merges"], tokens.merges, strict=True):
            assert unpacked(packed[0], np.uint16).tolist() == sorted(survivor.tolist())  # one survivor after the other
            assert unpacked(packed[1], np.uint16).tolist() == source.tolist()
            assert torch.equal(unpacked(packed[2], np.int16).view(torch.bfloat16), weight.bfloat16())
    assert data["sides"][0]["stages"] == ["before the LLM", "at layer 2", "at layer 4"]


def test_long_videos_need_wider_numbers() -> None:
    grid = (1, 2, 33000)
    last = Reduction.merging(
        torch.tensor([65999]), 66000, [(torch.tensor([65999]), torch.tensor([65998]), torch.tensor([1.0]))]
    )
    report = replace(sample(), sides=[side([step(last, grid)])])
    given = pages._data(report, [])
    assert given["wide"] and unpacked(given["sides"][0]["merges"][0][1], np.int32).tolist() == [65998]


def test_nothing_that_was_typed_becomes_markup() -> None:
    evil = "</script><img src=x onerror=alert(1)>\"'&{{ 7 * 7 }}"
    html = render(replace(sample(prompt=evil, answer=evil), model=evil, note=evil))
    assert "<img" not in html and html.count("&lt;img src=x") >= 4 and "{{ 7 * 7 }}" in html
    assert html.count("</script>") == html.count("<script") == 2
    label = replace(sample().sides[0], label=evil)
    assert "<img" not in render(replace(sample(), sides=[label]))


def test_the_page_asks_nobody() -> None:
    html = render(sample())
    assert "default-src 'none'" in html
    assert set(re.findall(r"https?://[^\"'\s<)]*", html)) == {"http://www.w3.org/2000/svg"}  # a name, not an address
    assert all(link.startswith(("#", "data:")) for link in re.findall(r'(?:href|src)="([^"]*)"', html))
    inner = set(re.findall(r'href="#([^"]+)"', html)) | set(
        re.findall(r'aria-(?:labelledby|describedby)="(\S+)"', html)
    )
    ids = re.findall(r'\bid="([^"]+)"', html)
    assert inner <= set(ids) and len(ids) == len(set(ids))


def test_stages_segments_and_layers_are_told() -> None:
    report = sample(GRID)
    html = render(report)
    text = " ".join(re.sub(r"<[^>]+>", " ", html).split())
    assert "layers 0–1: 39" in text and "layers 2–3: 29" in text and "layers 4–5: 21" in text
    assert html.count("in 2 segments") == 3  # they stay in force for the same method's later stages
    rows = re.findall(r'<th scope="row">.*?A</span> (.*?)</th>(.*?)</tr>', html)
    cells = [(name, [int(n) for n in re.findall(r"<td>(\d+)</td>", row)]) for name, row in rows]
    assert [name for name, _ in cells] == ["before the LLM", "at layer 1", "at layer 2", "at layer 4"]
    counted = [report.sides[0].tokens.counts(stage).sum(0).tolist() for stage in (1, 1, 2, 3)]
    assert [numbers[1:4] for _, numbers in cells] == counted
    assert runs([5, 5, 3, 5]) == [(0, 1, 5), (2, 2, 3), (3, 3, 5)]


def test_spans_are_read_by_any_of_their_names() -> None:
    kept, spans = Reduction.identity(4), torch.tensor([[0, 1], [1, 2]])
    for name in ("segments", "windows", "scenes"):
        assert step(replace(kept, notes={name: spans}), (2, 1, 2)).spans == [(0, 1), (1, 2)]
    assert step(replace(kept, notes={"counts": [1]}), (2, 1, 2)).spans is None


def test_frames_that_share_tokens_share_a_drawing() -> None:
    html = render(sample((3, 2, 4), frames=5))
    assert html.count("<image ") == 5 and "Frames 1–2" in html and ">Frame 5 " in html
    assert html.count('<g id="t0-1">') == 1 and html.count('href="#t0-1"') >= 1  # frame 4 repeats the tokens of frame 3
    assert len(frames_in(html)) == 6


def test_a_long_video_stays_small() -> None:
    report = sample((256, 7, 7))
    html = render(report)
    assert len(html) < 3e6 and html.count('<div class="frame"') == 512
    assert html.count('tabindex="0"') == len(report.sides) + 2  # a stop for each side, and the two tables


# -- the picture -------------------------------------------------------------------------------------------------------
def test_the_picture_shows_kept_tokens_as_they_are() -> None:
    report = sample((2, 3, 5))
    figure = draw(report)
    pictures = [axes.images[0].get_array() for axes in figure.axes if axes.images]
    assert len(pictures) == 4
    for number, shown in enumerate(report.sides):
        fate = shown.tokens.fate(len(shown.tokens.stages)).view(2, 3, 5)
        for row in range(2):
            cell = np.ones((12, 12), bool)
            kept, dropped = (np.kron(fate[row] == wanted, cell).astype(bool) for wanted in (0, 2))
            drawn, true = np.asarray(pictures[2 * number + row]), report.video.frames[row] / 255
            np.testing.assert_allclose(drawn[kept], true[kept], atol=1e-6)
            np.testing.assert_allclose(drawn[dropped], true[dropped] * 0.16 + 0.84, atol=1e-6)
            outlines = [axes for axes in figure.axes if axes.images][2 * number + row].collections[0]
            assert len(outlines.get_paths()) == int((fate[row] == 0).sum())


def test_pictures_are_written_in_the_format_of_their_name(tmp_path) -> None:
    assert write_picture(sample(prompt="$x_1$ \t?"), tmp_path / "a.png", dpi=40) == (tmp_path / "a.png").stat().st_size
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(ValueError, match=r"ends in \.png, \.webp, \.pdf, \.svg, got '.gif'"):
        write_picture(sample(), tmp_path / "a.gif")


# -- the command -------------------------------------------------------------------------------------------------------
def test_choices() -> None:
    one, two, named = choose("infomerge@0.02, random,hieravid-30", 0.3)
    assert [c.label for c in (one, two, named)] == ["infomerge @ 0.02", "random @ 0.3", "hieravid-30"]
    assert one.compression == load("infomerge", retention_ratio=0.02)


def test_choices_take_files_and_heads(tmp_path) -> None:
    path = tmp_path / "two.yaml"
    path.write_text("- method: infomerge\n  retention_ratio: 0.2\n- method: fastv\n")
    pipeline, head, none = choose(f"{path},infomerge,fastv", siglip_head="some/folder")
    assert isinstance(pipeline.compression, Pipeline) and [m.name for m in pipeline.compression] == [
        "infomerge",
        "fastv",
    ]
    assert [m.siglip_head for m in [*pipeline.compression][:1] + [head.compression]] == ["some/folder"] * 2
    assert none.compression == load("fastv")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("infomreg@0.1", "did you mean 'infomerge'"),
        ("infomerge@much", "a retention ratio in (0, 1], got 'much'"),
        ("infomerge@1.5", "retention_ratio"),
        ("none", "'none' is no compression"),
        (" , ", "names 0 compressions"),
        (",".join(["random"] * 7), "accepted: 1 to 6"),
        ("no/such.yaml", "no such YAML file"),
    ],
)
def test_bad_choices(text: str, message: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=re.escape(message)):
        choose(text)


@pytest.fixture
def vidcompress(monkeypatch, capsys):
    """Runs the command line; returns (exit code, stdout, stderr)."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["vidcompress", *map(str, arguments)])
        try:
            main()
            code = 0
        except SystemExit as end:
            code = end.code or 0
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def test_the_command(vidcompress, tmp_path) -> None:
    clip, page, picture = make_clip(tmp_path / "clip.mp4"), tmp_path / "a.html", tmp_path / "a.webp"
    code, out, err = vidcompress(
        "report", clip, "What <b>moves</b>?", "--compression", "infomerge@0.2,random@1", "--num-frames", 4,
        "--max-new-tokens", 2, "--out", page, "--png", picture,
    )  # fmt: skip
    assert code == 0, err
    html = page.read_text(encoding="utf-8")
    assert "What &lt;b&gt;moves&lt;/b&gt;?" in html and "understands nothing" in html
    frames = frames_in(html)
    kept, total = map(int, re.search(r"A infomerge @ 0.2: (\d+) of (\d+) video tokens", " ".join(out.split())).groups())
    assert kept == total // 5 == sum(frames[0, row]["k"] for row in range(4))
    assert all(frames[1, row] == frames[1, 0] and 4 * frames[1, row]["counted k"] == total for row in range(4))
    assert picture.read_bytes()[8:12] == b"WEBP"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "TMP/no/such/a.html"], "there is no folder"),
        (["--out", "TMP"], "is a folder"),
        (["--out", "TMP/file/a.html"], "there is no folder"),
        (["--out", "TMP/" + 300 * "a"], "cannot be written: File name too long"),
        (["--out", "TMP/a.html", "--png", "TMP/a.gif"], "accepted: .png, .webp, .pdf, .svg"),
        (["--out", "TMP/a.png", "--png", "TMP/a.png"], "give two names"),
        (["--out", "TMP/a.html", "--png", "TMP/no/a.png"], "there is no folder"),
        (["--out", "TMP/a.html", "--compression", "infomreg"], "did you mean 'infomerge'"),
        (["--out", "TMP/a.html", "--dtype", "int4"], "int4"),
        (["--out", "TMP/a.html"], "is damaged or not a video file"),
    ],
)
def test_mistakes_are_refused_before_any_work(arguments, message, vidcompress, tmp_path) -> None:
    """The video cannot be read, so that whatever is refused before it is reached is refused first."""
    (tmp_path / "file").touch()
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"no frames" * 99)
    code, out, err = vidcompress("report", broken, "?", *(a.replace("TMP", str(tmp_path)) for a in arguments))
    assert code == 2 and out == "" and message in err and "Traceback" not in err
    assert not [*tmp_path.glob("a.*")]


def test_what_is_there_is_left_alone_until_the_end(vidcompress, tmp_path) -> None:
    page = tmp_path / "a.html"
    page.write_text("before")
    assert vidcompress("report", tmp_path / "no.mp4", "?", "--out", page)[0] == 2
    assert page.read_text() == "before"


@pytest.mark.parametrize("module", ["jinja2", "matplotlib", "PIL"])
def test_what_is_not_installed_is_named(module, vidcompress, monkeypatch, tmp_path) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    code, _, err = vidcompress("report", "no.mp4", "?", "--out", tmp_path / "a.html")
    assert code == 2 and f"{module} not installed" in err and "vidcompress-transformers[viz]" in err
