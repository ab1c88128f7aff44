"""The trainings of a workspace: a table, and a chart of losses for each kind of loss."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from beeline.errors import reading
from beeline.files.names import LOG, STUDENTS, TEACHER
from beeline.objectives.learner import SKIPPED
from beeline.objectives.lmm import LOSS, loss_label
from evaluation.models import LINES, Model, phases_of, student_folders
from evaluation.page.charts import Chart, Series, chart
from evaluation.page.tables import Column, Row, Table, texts
from evaluation.page.words import NONE
from pipeline.records import TRAINING_DONE, plan_in, success_in
from pipeline.storage import Folder
from pipeline.training_log import DATA_WAIT, PHASE, REMOVE, STEP, log_in, loss_of, seconds_of

Log = Sequence[Mapping[str, Any]]
TITLES = ("iterations", "images seen", "seconds", "images/s", "waiting for data", "steps skipped")


@dataclasses.dataclass(frozen=True)
class Trainings:
    """A table of all trainings, and the charts of their losses, each with the kind of the loss."""

    table: Table
    losses: tuple[tuple[str, Chart], ...]


def trainings(place: Folder, models: Sequence[Model]) -> Trainings | None:
    """The teacher's and the students' trainings that have a log; None where none has.

    A measured model has the same colour as in the other sections.
    """
    rows: list[Row] = []
    curves: dict[str, list[Series]] = {}
    numbers = {model.name: model.number for model in models}
    for folder in [TEACHER, *student_folders(place)]:
        number = numbers.setdefault(folder, len(numbers))
        log = log_in(place / folder)
        if not log:
            continue
        title = folder.removeprefix(f"{STUDENTS}/")
        plan, done = plan_in(place / folder, {}) or {}, success_in(place / folder, TRAINING_DONE) or {}
        with reading(f"{place / folder}/{LOG} is not readable", REMOVE):
            rows.append(Row(head=title, cells=texts(*_facts(log, done.get("images_seen")))))
            losses = _losses(log, None if folder == TEACHER else _phases(plan))
        for kind, points in losses.items():
            steps, values = zip(*points, strict=True)
            curves.setdefault(kind, []).append(Series(name=title, number=number, x=steps, y=values, marked=False))
    if not rows:
        return None
    charts = [
        (kind, chart(series, x="iteration", y="loss", alt=f"{kind} by iteration", log="y")) for kind, series in curves.items()
    ]
    columns = (Column(title="model", kind=""), *(Column(title=title) for title in TITLES))
    return Trainings(
        table=Table(label="Training", columns=columns, rows=tuple(rows)),
        losses=tuple((kind, drawn) for kind, drawn in charts if drawn is not None),
    )


def _facts(log: Log, images: int | None) -> list[str]:
    """The cells of a training, as TITLES names them."""
    seconds = seconds_of(log)
    waits = [row[DATA_WAIT] for row in log if row.get(DATA_WAIT) is not None]
    return [
        f"{log[-1][STEP]:,}",
        NONE if images is None else f"{images:,}",
        f"{seconds:,.0f}",
        NONE if not images or not seconds else f"{images / seconds:,.0f}",
        f"{100 * sum(waits) / len(waits):.2f} %" if waits else NONE,
        f"{log[-1].get(SKIPPED) or 0:,}",
    ]


def _losses(log: Log, phases: Sequence[Mapping[str, Any]] | None) -> dict[str, list[tuple[int, float]]]:
    """The objective's first figure by step, for each kind of loss; `phases` holds a student's settings, None for a teacher."""
    curves: dict[str, list[tuple[int, float]]] = {}
    for row in log:
        loss = loss_of(row)
        if loss is None:
            continue
        kind, value = loss
        if phases is None:
            kind = "EDM loss"
        elif phases:
            objective = phases[int(row.get(PHASE) or 0)]["objective"]
            if objective.get("method") == LINES and kind == LOSS:
                kind = loss_label(objective)
        curves.setdefault(kind, []).append((int(row[STEP]), value))
    return curves


def _phases(plan: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The settings of a student's phases. The plan of a promoted trial holds them in the plan of its sweep."""
    student = plan.get("student") or (plan.get("sweep") or {}).get("student")
    return list(phases_of({"trained": student}).values())
