"""Distance by training cost: what each student's training cost in network evaluations, and how good the student is."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from beeline.config.student import student_folder
from beeline.metrics.measures import is_frechet, rises
from beeline.sampling import Sampling
from evaluation.models import Figure, Model, number
from evaluation.page.charts import Chart, Series, chart
from evaluation.page.tables import MODEL, Cell, Column, Row, Table, texts
from evaluation.page.words import NONE, plural
from pipeline.records import cost_in, evaluations_of
from pipeline.storage import Folder

COUNTS = (1, 2, 4)  # evaluations per image
MILLION = 1e6
UNITS = ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingCost:
    """A chart and a table; `pairs` says whether any student was trained on pairs."""

    chart: Chart | None
    table: Table
    pairs: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Student:
    """A student, what its training cost in evaluations (None if it is not known), and its best figure by evaluations per
    image."""

    model: Model
    training: float | None
    inherited: float | None
    pairs: float | None
    figures: dict[int, Figure]

    @property
    def alone(self) -> float | None:
        """All trainings, without pairs."""
        return _sum([self.training, self.inherited])

    @property
    def total(self) -> float | None:
        return _sum([self.alone, self.pairs])

    def rank(self, metric: str) -> tuple[float, ...]:
        """Sort key: better figures first, at the fewest evaluations first; missing ones last."""
        sign = -1 if rises(metric) else 1
        return tuple(sign * self.figures[count].mean if count in self.figures else math.inf for count in COUNTS)


def training_cost(place: Folder, models: Sequence[Model], metric: str, teacher: Figure | None) -> TrainingCost | None:
    """Every student by its training cost; None if no student has a record of it. `teacher` is the teacher's best figure."""
    students = [student_of(place, model, metric) for model in models[1:] if not model.is_average]
    if all(student.total is None for student in students):
        return None
    students.sort(key=lambda student: (student.rank(metric), student.model.number))
    return TrainingCost(
        chart=_chart(students, metric, teacher), table=_table(students), pairs=any(student.pairs for student in students)
    )


def student_of(place: Folder, model: Model, metric: str) -> Student:
    """Read a student's record. A model published after an earlier phase cost that phase and those before it."""
    _, name, *part = model.name.split("/")
    cost = cost_in(place / student_folder(name))
    figures: dict[int, Figure] = {}
    for figure in model.of(metric):
        best = figures.get(figure.nfe)
        better = best is None or (figure.mean > best.mean if rises(metric) else figure.mean < best.mean)
        if math.isfinite(figure.mean) and better:
            figures[figure.nfe] = figure
    if cost is None:
        return Student(model=model, training=None, inherited=None, pairs=None, figures=figures)
    others = cost["inherited"].values()
    return Student(
        model=model,
        training=evaluations_of(cost, part[0] if part else ""),
        inherited=_sum([entry.get("training") for entry in others]),
        pairs=_sum([cost.get("pairs"), *(entry.get("pairs") for entry in others)]),
        figures=figures,
    )


def _sum(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) if len(known) == len(values) else None


def _table(students: Sequence[Student]) -> Table:
    titles = ("training", "inherited", "pairs", "total")
    columns = [MODEL, *(Column(title=title) for title in titles)]
    columns += [Column(title=plural(count, "evaluation")) for count in COUNTS]
    rows = [
        Row(
            head=student.model.title,
            number=student.model.number,
            cells=(
                *texts(*map(short, (student.training, student.inherited, student.pairs, student.total))),
                *(_cell(student, count) for count in COUNTS),
            ),
        )
        for student in students
    ]
    return Table(label="Distance by training cost", columns=tuple(columns), rows=tuple(rows), tight=True)


def _cell(student: Student, count: int) -> Cell:
    if (figure := student.figures.get(count)) is None:
        return Cell(text=NONE)
    return Cell(text=number(figure.mean) + student.model.mark(figure.metric), tip=Sampling.parse(figure.sampler).text)


def short(evaluations: float | None) -> str:
    """Evaluations with three digits: "96.0 k" or "1.20 G"."""
    if evaluations is None:
        return NONE
    for size, unit in UNITS:
        if evaluations >= size:
            value = evaluations / size
            return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f}{unit}"
    return f"{evaluations:.0f}"


def _chart(students: Sequence[Student], metric: str, teacher: Figure | None) -> Chart | None:
    """A series for each number of evaluations, because one for each student would be too many to tell apart."""
    known = [(student, student.alone, student.total) for student in students]
    series: list[Series] = []
    for count in COUNTS:
        points = [
            (total / MILLION, student.figures[count].mean, alone / MILLION, student.model.title)
            for student, alone, total in known
            if count in student.figures and alone and total
        ]
        if points:
            x, y, left, names = zip(*points, strict=True)
            best = _unbeaten(x, y, metric)
            labels = [name if k in best else "" for k, name in enumerate(names)]
            text = plural(count, "evaluation")
            first: dict[str, Any] = {} if series else {"left": left, "labels": labels}  # once each is enough
            series.append(Series(name=text, number=COUNTS.index(count) + 1, x=x, y=y, joined=False, **first))
    if not series:
        return None
    if teacher:
        ends = [min(min(s.left or s.x) for s in series), max(max(s.x) for s in series)]
        text = f"teacher, {plural(teacher.nfe, 'evaluation')}"
        series.append(Series(name=text, number=0, x=ends, y=[teacher.mean] * 2, marked=False))
    log = "xy" if is_frechet(metric) else "x"
    alt = f"{metric} by training cost in network evaluations"
    return chart(series, x="training cost, millions of network evaluations", y=metric, alt=alt, log=log)


def _unbeaten(costs: Sequence[float], values: Sequence[float], metric: str) -> set[int]:
    """Points that no cheaper point beats."""
    sign, best, found = -1 if rises(metric) else 1, math.inf, set[int]()
    for k in sorted(range(len(costs)), key=lambda k: (costs[k], sign * values[k])):
        if sign * values[k] < best:
            best = sign * values[k]
            found.add(k)
    return found
