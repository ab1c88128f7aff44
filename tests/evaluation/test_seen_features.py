"""Figures in features that a student's own loss used are marked, on the page and in tables; others are not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from measured import ONE, TEACHER_WAYS, measure, trained

from beeline.recipes import RECIPES
from evaluation.compare import compare
from evaluation.models import SEEN, measured_models
from evaluation.page.render import render
from evaluation.page.tables import figures
from pipeline.storage import Folder

INDEPENDENT, USED = "fd_probe_1797", "fd_probe_losses_1797"
METRICS = (INDEPENDENT, USED, "recall_probe_losses_1797")


@pytest.fixture
def place(tmp_path: Path) -> Folder:
    """A teacher; students of pixels alone, of the losses' probe, and of pixels from the latter's weights."""
    place, students = Folder(str(tmp_path / "ws")), RECIPES["digits"](0).students
    pixels = students["l2"]
    measure(place, "teacher", TEACHER_WAYS, METRICS)
    trained(place, "lmm", students["lmm"])
    for name, student in {"l2": pixels, "tuned": replace(pixels, name="tuned", init="students/lmm")}.items():
        trained(place, name, student)
    for name in ("lmm", "lmm/reconstruction", "l2", "tuned"):
        measure(place, f"students/{name}", [ONE], METRICS)
    return place


def test_the_marks(place: Folder) -> None:
    models = {model.name: model for model in measured_models(place)}
    marked = {name for name, model in models.items() if model.mark(USED)}
    assert marked == {"students/lmm", "students/lmm/reconstruction", "students/tuned"}
    assert {name for name, model in models.items() if model.mark("recall_probe_losses_1797")} == marked
    assert not any(model.mark(INDEPENDENT) for model in models.values())


def test_tables_say_what_the_marks_mean(place: Folder, capsys: pytest.CaptureFixture[str]) -> None:
    models = measured_models(place)
    table = figures("All figures", models, METRICS)
    assert table.marked
    for row, model in zip(table.rows[2:], models[1:], strict=True):
        independent, used = row.cells[2:4]
        assert SEEN not in independent.text
        assert (SEEN in used.text) == bool(model.mark(USED))
    assert not figures("All figures", models, [INDEPENDENT]).marked
    page = render(place, "digits", models)
    assert (
        f"{SEEN}: in features that the student&#39;s own loss used" in page
        or f"{SEEN}: in features that the student's own" in page
    )
    compare((str(place),), metric=USED)
    lines = {line.split("|")[1].strip(): line for line in capsys.readouterr().out.splitlines()}
    assert SEEN in lines["lmm"]
    assert SEEN not in lines["l2"]
