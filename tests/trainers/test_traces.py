"""The losses of all students on digits, step by step, equal traces.json, up to the rounding of other CPUs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import small

from beeline.checkpoint import dump
from beeline.recipes import RECIPES
from beeline.recipes.digits_methods import LONG
from pipeline.model_folders import require_model
from pipeline.storage import Folder
from trainers import loop
from trainers.log import read_log
from trainers.student import student_training

STUDENTS = RECIPES["digits"](0).students | {
    name: student for name, student in RECIPES["digits_methods"](0).students.items() if not name.endswith(LONG)
}
TRACES: dict[str, list[dict[str, Any]]] = json.loads((Path(__file__).parent / "traces.json").read_text())


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    place = small.workspace(tmp_path_factory.mktemp("traces") / "ws")
    weak, _ = require_model(place, "teacher", "digits")
    for parameter in weak.parameters():
        parameter.mul_(0.9)
    small.finished(place, "students/weak", {}, dump(weak, {}))
    return place


def test_every_student_has_a_trace() -> None:
    assert TRACES.keys() == STUDENTS.keys()


@pytest.mark.parametrize("name", TRACES)
def test_the_losses_are_what_they_were(name: str, workspace: Folder, tmp_path: Path) -> None:
    student = STUDENTS[name]
    phases = {key: replace(phase, iterations=4) for key, phase in student.phases.items()}
    config = replace(student, init="teacher", pairs="teacher", batch_size=12, ema_half_lives=(3.0, 30.0), phases=phases)
    session = loop.Session(folder=Folder(str(tmp_path)))
    task = student_training(session=session, workspace=workspace, recipe="digits", config=config, **small.plans(workspace))
    loop.run(task, session, loop.Cadence(log_every=1, checkpoint_every=3))
    rows = read_log(session.folder)
    assert len(rows) == len(TRACES[name]) == task.iterations
    other = {"phase", "skipped", "images_per_s", "data_wait", "peak_mb", "seconds"}
    for row, wanted in zip(rows, TRACES[name], strict=True):
        assert row.keys() - other == wanted.keys()
        assert {key: row[key] for key in wanted} == pytest.approx(wanted, rel=2e-3)
