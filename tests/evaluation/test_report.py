"""The report is one file that opens anywhere and shows all results."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import Page, browser, find
from measured import FRESH, ONE, TEACHER_WAYS, TWO, finished, measure, trained, with_pairs, with_sweep
from methods import JumpConfig
from PIL import Image

from beeline.config import to_dict
from beeline.errors import BeelineError
from beeline.recipes import RECIPES
from evaluation.models import number
from evaluation.page import paper
from evaluation.page.strips import Sheet
from evaluation.page.training import trainings
from evaluation.report import report
from pipeline.sheet import sheet_png
from pipeline.storage import Folder

ODD = '_<b>&"$x$'


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete digits workspace, including a student with an unusual name, and its report."""
    path = tmp_path_factory.mktemp("report") / "ws"
    place, recipe = Folder(str(path)), RECIPES["digits"](0)
    students = recipe.students | {"kd": RECIPES["digits_methods"](0).students["kd"]}
    images = {"count": 1797, "resolution": 8, "channels": 1, "num_classes": 10, "source": "digits"}
    finished(place, "images", {"images": images}, {}, images=1797)
    finished(place, "teacher", {"teacher": {}}, {"train.jsonl": b'{"step": 9, "loss": 0.5, "seconds": 7}'}, images_seen=900)
    for name in ("lmm", "l2", "kd"):
        trained(place, name, students[name], loss="distillation" if name == "kd" else "lines")
    measure(place, "teacher", TEACHER_WAYS)
    for name in ("lmm", "l2", "kd", ODD):
        measure(place, f"students/{name}", [ONE])
    measure(place, "students/lmm/reconstruction", [ONE, TWO, FRESH])
    measure(place, "students/lmm/adversarial", [ONE])
    with_pairs(place)
    with_sweep(place)
    report(str(path), "digits")
    return path


class Parsed(HTMLParser):
    """The page's elements, its text, and its tables as rows of texts."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text, self.tables, self._open = "", [], []
        self.feed(page)
        self.ids = [value["id"] for _, value in self.elements if "id" in value]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
        if tag in ("td", "th", "script", "style"):
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if self._open and tag == self._open[-1]:
            self._open.pop()

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] in ("td", "th"):
            self.tables[-1][-1][-1] += data
        if not self._open or self._open[-1] not in ("script", "style"):
            self.text += data

    def pictures(self) -> list[str]:
        return [str(given["src"]) for tag, given in self.elements if tag == "img"]


@pytest.fixture(scope="module")
def page(workspace: Path) -> str:
    return (workspace / "report.html").read_text()


@pytest.fixture(scope="module")
def parsed(page: str) -> Parsed:
    return Parsed(page)


def test_nothing_is_fetched_from_anywhere(page: str, parsed: Parsed) -> None:
    for tag, given in parsed.elements:
        for key in ("src", "href", "xlink:href", "srcset", "poster", "data", "action"):
            value = given.get(key)
            assert value is None or value.startswith(("data:image/", "#")), (tag, key, value[:80])
        assert tag not in ("link", "iframe", "object", "embed"), tag
    assert "@import" not in page
    assert all(found == "#" for found in re.findall(r"url\((.)", page))
    assert len(page) < 5e6


def test_links_inside_lead_somewhere(parsed: Parsed) -> None:
    assert len(parsed.ids) == len(set(parsed.ids))
    inside = [str(given["href"])[1:] for tag, given in parsed.elements if tag == "a" and str(given["href"]).startswith("#")]
    assert len(inside) > 9
    assert set(inside) <= set(parsed.ids)


def test_everything_is_shown(workspace: Path, page: str, parsed: Parsed) -> None:
    for file in workspace.glob("evaluation/**/metrics.json"):
        for row in json.loads(file.read_text())["rows"]:
            assert number(row["mean"]) in page, row
    text = " ".join(parsed.text.split())
    for expected in (
        "1,797 real images, 8×8, grey, 10 classes",
        "end points alone: knowledge distillation, L2",
        "lines, perceptual distance (probe)",
        "Fréchet distance (probe), queue of 2048",
        "300 + 200 + 120",
        "2,500 pairs of 35 evaluations: 87,500 evaluations of the teacher, in 34.5 actor-seconds",
        "paid back after 2,574 images",
        "The paper has no figures for digits",
        "unevenness",
        "fd_probe_losses_1797, which is not a metric of the sections above",
        "20, stopped",
        "ab" * 32,
    ):
        assert expected in text, expected
    assert "undefined" not in page.lower()
    strips = 2 + 5 + 3
    assert len(parsed.pictures()) == 2 * strips
    assert all(given.get("alt") for tag, given in parsed.elements if tag == "img")


def test_odd_names_are_text(page: str, parsed: Parsed) -> None:
    assert "<b>&" not in page
    assert f"students/{ODD}" in parsed.text
    assert any(row and row[0] == ODD for table in parsed.tables for row in table)


def test_the_papers_layout_for_other_data_has_ours_alone(parsed: Parsed) -> None:
    table = next(table for table in parsed.tables if table[0][0] == "steps" and "L2" in table[0][2])
    assert table[0][2:] == [f"{name}ours, fd_probe_1797" for name in paper.OWN.values()]
    assert [row[:2] for row in table[1:]] == [["(0)", "1"], ["(0, 8)", "2"]]
    assert table[1][4] == "—"
    assert table[1][5].startswith(number(1 + len("students/lmm/adversarial") / 100 + 0.0004))
    assert table[2][2] == "—"
    assert not any(str(figure) in parsed.text for figure in (1.575, 3.124, 1.389))


def test_a_teacher_and_one_student_are_enough(tmp_path: Path) -> None:
    place = Folder(str(tmp_path))
    measure(place, "teacher", TEACHER_WAYS, ["fd_probe_100"])
    with pytest.raises(BeelineError, match="no student is measured"):
        report(str(tmp_path), "cifar10")
    measure(place, "students/mine", [ONE], ["fd_probe_100"])
    report(str(tmp_path), "cifar10")
    page = Parsed((tmp_path / "report.html").read_text())
    assert {"samples", "distance", "straightness"} <= set(page.ids)
    assert not {"sweep", "training"} & set(page.ids)
    assert "actor-seconds" not in page.text
    assert "5.125" in page.text
    assert "No student with the paper's ingredients is measured in fid_50k" in " ".join(page.text.split())


def test_a_method_of_ones_own_is_shown(tmp_path: Path) -> None:
    """The method has three phases and unknown figures."""
    place, kd = Folder(str(tmp_path)), RECIPES["digits_methods"](0).students["kd"]
    (phase,) = kd.phases.values()
    own = dataclasses.replace(phase, objective=JumpConfig())
    phases = {"first": phase, "left-out": dataclasses.replace(own, iterations=0), "own": own, "last": own}
    trained(place, "own", dataclasses.replace(kd, name="own", phases=phases), loss="lines")
    measure(place, "teacher", TEACHER_WAYS)
    measure(place, "students/own", [ONE])
    measure(place, "students/own/first", [ONE])
    report(str(tmp_path), "digits")
    text = " ".join(Parsed((tmp_path / "report.html").read_text()).text.split())
    assert "jumps to level 0" in text
    assert "end points alone: knowledge distillation, L2" in text  # after its first phase
    assert "250 + 250 + 250" in text


def test_losses_of_different_kinds_have_charts_of_their_own(tmp_path: Path) -> None:
    """The promoted trial of a sweep says in its plan, within the sweep's, how it was trained."""
    place, recipe = Folder(str(tmp_path)), RECIPES["digits"](0)
    log = {"train.jsonl": b'{"step": 1, "phase": 0.0, "lines": 2.0, "skipped": 0, "seconds": 1}'}
    finished(place, "teacher", {"teacher": {}}, {"train.jsonl": b'{"step": 9, "loss": 0.5, "seconds": 7}'}, images_seen=900)
    trained(place, "kd", RECIPES["digits_methods"](0).students["kd"], loss="distillation")
    trained(place, "l2", recipe.students["l2"])
    finished(place, "students/tuned", {"promoted": {}, "sweep": {"student": to_dict(recipe.students["l2"])}}, log)
    finished(place, "students/own", {"promoted": {}}, log)
    found = trainings(place, [])
    assert found is not None
    assert [row.head for row in found.table.rows] == ["teacher", "kd", "l2", "own", "tuned"]
    names = {kind: [series.name for series in chart.keys] for kind, chart in found.losses}
    assert names == {
        "EDM loss": ["teacher"], "distillation": ["kd"], "lines: pixel distance (L2)": ["l2", "tuned"], "lines": ["own"],
    }  # fmt: skip


def test_models_that_were_measured_otherwise_are_named(tmp_path: Path) -> None:
    place = Folder(str(tmp_path))
    measure(place, "teacher", TEACHER_WAYS)
    measure(place, "students/lmm", [ONE], reference_sha256="cd" * 32)
    report(str(tmp_path), "digits")
    page = " ".join(Parsed((tmp_path / "report.html").read_text()).text.split())
    assert "Not all models were measured in the same way" in page
    assert "students/lmm: reference_sha256" in page


@pytest.mark.parametrize(
    ("devices", "expected"),
    [
        ({"NVIDIA H200": 12.0}, "12.0 GPU-seconds (NVIDIA H200)"),
        ({"CPU": 34.5}, "34.5 CPU-seconds"),
        (None, "34.5 actor-seconds"),
    ],
)
def test_seconds_have_a_kind(tmp_path: Path, devices: dict[str, float] | None, expected: str) -> None:
    place = Folder(str(tmp_path))
    measure(place, "teacher", TEACHER_WAYS)
    measure(place, "students/lmm", [ONE])
    with_pairs(place, device_seconds=devices)
    report(str(tmp_path), "digits")
    page = (tmp_path / "report.html").read_text()
    assert expected in page
    assert ("not on record" in page) == (devices is None)


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda found: found["rows"][0].pop("nfe"), r"metrics.json is not as expected .*rows\[0\] lacks 'nfe'"),
        (lambda found: found.pop("order"), "metrics.json is not as expected .*lacks 'order'"),
        (lambda found: found["rows"][0].update(mean="much"), r"rows\[0\].mean is 'much'; expected a number"),
        (lambda found: found["straightness"]["own"].pop(), "metrics.json is not as expected .*curves of"),
        (lambda found: found["order"].pop(), "order names 1 samplings, rows 2"),
    ],
)
def test_damaged_metrics_are_an_error_that_says_so(tmp_path: Path, damage: Any, complaint: str) -> None:
    place = Folder(str(tmp_path))
    measure(place, "teacher", TEACHER_WAYS)
    measure(place, "students/lmm", [ONE, TWO])
    file = tmp_path / "evaluation/students/lmm/metrics.json"
    found = json.loads(file.read_text())
    damage(found)
    file.write_text(json.dumps(found))
    with pytest.raises(BeelineError, match=complaint) as caught:
        report(str(tmp_path), "digits")
    assert "measure again with" in str(caught.value)
    assert not (tmp_path / "report.html").exists()
    file.write_text("{")
    with pytest.raises(BeelineError, match="is not valid JSON"):
        report(str(tmp_path), "digits")


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("lines", [1, 2])
def test_a_sheet_cut_into_pictures_gives_the_images_back(lines: int, channels: int) -> None:
    shown, rows = 12, 3
    values = np.arange(rows * lines * shown, dtype=np.uint8).reshape(rows, lines, shown) * 2
    images = np.broadcast_to(values.reshape(-1, 1, 1, 1), (values.size, channels, 8, 8))
    if channels == 3:
        images = images + np.array([0, 1, 0], np.uint8).reshape(1, 3, 1, 1)
    sheet = Sheet(sheet_png(np.ascontiguousarray(images), columns=shown), rows, lines, "there")
    pictures = sheet.pictures(lossless=True)
    assert len(pictures) == rows
    for r, picture in enumerate(pictures):
        found = Image.open(io.BytesIO(base64.b64decode(picture.src.split(",")[1]))).convert("RGBA")
        assert found.size == (picture.width, picture.height)
        pixels = np.asarray(found)
        for line in range(lines):
            for j in range(shown):
                block, column = divmod(j, 10)
                top = block * (lines * 44 + (8 if lines > 1 else 0)) + line * 44
                part = pixels[top : top + 40, column * 44 : column * 44 + 40]
                assert (part[..., 0] == values[r, line, j]).all()
                assert (part[..., 1] - part[..., 0] == (channels == 3)).all()
                assert (part[..., 3] == 255).all()
        assert picture.shown == lines * 44 - 4
    with pytest.raises(BeelineError, match="does not hold 7 lines of square images"):
        dataclasses.replace(sheet, rows=7, lines=1).pictures(lossless=True)


@pytest.fixture(scope="module")
def tab() -> Iterator[Page]:
    path = find()
    if path is None:
        pytest.skip("no chromium, chromium-browser or google-chrome on this machine: the page is not opened")
    with browser(path) as page:
        yield page


CONTRAST = """(() => {
  const canvas = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
  const light = (colour) => {
    canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
    const [r, g, b] = [...canvas.getImageData(0, 0, 1, 1).data].map((v) => v / 255)
      .map((v) => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
    return .2126 * r + .7152 * g + .0722 * b;
  };
  const paper = light(getComputedStyle(document.body).backgroundColor);
  const against = (ink) => (Math.max(ink, paper) + .05) / (Math.min(ink, paper) + .05);
  const of = (selector, key) => against(light(getComputedStyle(document.querySelector(selector))[key]));
  return {paper, body: of("body", "color"), soft: of("p.soft", "color"), card: of(".cards b", "color"),
          axis: of("svg.chart text", "fill"), curve: of("svg.swatch", "fill")};
})()"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(("width", "height"), [(1280, 900), (390, 844)])
def test_in_a_browser(tab: Page, workspace: Path, scheme: str, width: int, height: int) -> None:
    """Opened from disk, the page loads without errors, complete, within the window's width, and readable."""
    tab.errors.clear()
    tab.requests.clear()
    tab.size(width, height, phone=width < 500)
    tab.scheme(scheme)
    url = (workspace / "report.html").as_uri()
    tab.open(url)
    tab.value("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
    assert tab.value("Promise.all([...document.images].map((one) => one.decode())).then(() => document.images.length)") == 18
    assert tab.value("[...document.images].every((one) => one.complete && one.naturalWidth > 0)")
    assert tab.value("[...document.querySelectorAll('svg.chart')].every((one) => one.getBoundingClientRect().height > 100)")
    assert tab.value("document.querySelectorAll('svg.chart').length") >= 6
    assert tab.value("document.documentElement.scrollWidth") <= width
    contrast = tab.value(CONTRAST)
    assert (contrast.pop("paper") > 0.5) == (scheme == "light")
    assert contrast.pop("body") >= 7
    assert contrast.pop("curve") >= 3
    assert min(contrast.values()) >= 4.5, contrast
    assert tab.errors == []
    assert {asked for asked in tab.requests if not asked.startswith("data:")} == {url}


def test_a_click_enlarges_and_escape_closes(tab: Page, workspace: Path) -> None:
    tab.errors.clear()
    tab.size(1280, 900)
    tab.open((workspace / "report.html").as_uri())
    shown, picture = "document.querySelector('dialog').open", "document.querySelector('dialog img')"
    assert not tab.value(shown)
    tab.click("#samples button.zoom")
    assert tab.value(shown)
    small = "document.querySelector('#samples button.zoom img')"
    assert tab.value(f"{picture}.decode().then(() => {picture}.height / {small}.height)") > 4
    first = tab.value("document.querySelector('dialog p').textContent")
    assert first == "teacher, 35 evaluations (heun 18)"
    tab.press("ArrowRight")
    assert tab.value("document.querySelector('dialog p').textContent") == "teacher, 3 evaluations (euler 3)"
    tab.press("Escape")
    assert not tab.value(shown)
    # By keys alone: the strip has the focus again, Enter opens it.
    tab.press("Enter")
    assert tab.value(shown)
    tab.click("dialog [data-by='0']")
    assert not tab.value(shown)
    assert tab.errors == []
