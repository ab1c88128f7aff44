"""Tables of the page: what a table is, and the tables of measured figures."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from beeline.metrics.measures import PAIR_RMS, is_frechet, rises
from beeline.sampling import Sampling
from evaluation.models import SEEN, Figure, Model, number
from evaluation.page.words import NONE


@dataclasses.dataclass(frozen=True, kw_only=True)
class Column:
    """A column: its title, or the metric that names it; `kind` holds its CSS classes: "n" for numbers, "long" for prose."""

    title: str = ""
    metric: str = ""
    kind: str = "n"
    unseen: bool = False
    """The title is for screen readers alone."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cell:
    """A cell: text, or a bar over `share` of the cell's width in the colour of the row's model."""

    text: str = ""
    share: float | None = None
    tip: str = ""
    """A longer text, shown when the pointer rests on the cell."""
    code: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """A row: its head, the number of the model that it belongs to (None for no model), and a cell for each further column."""

    head: str
    number: int | None = None
    cells: tuple[Cell, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Table:
    """A table; `label` names it for screen readers, `tight` sets its columns close together."""

    label: str
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    tight: bool = False

    @property
    def marked(self) -> bool:
        """Whether a figure is in features that the student's own loss used."""
        return any(cell.text.endswith(SEEN) for row in self.rows for cell in row.cells)


def texts(*values: str) -> tuple[Cell, ...]:
    """A cell for each text."""
    return tuple(Cell(text=value) for value in values)


MODEL, SAMPLED_BY = Column(title="model", kind=""), Column(title="sampled by", kind="")
NFE = Column(title="NFE")


def distances(models: Sequence[Model], metric: str, teacher: Figure | None) -> Table:
    """Every model and sampling in the main metric, also relative to the teacher's best figure."""
    titles = (
        Column(title="std", kind="n dim"),
        Column(title="best draw", kind="n dim"),
        Column(title="relative to the teacher"),
    )
    rows = []
    for model, sampling in _samplings(models):
        figure = model.figure(sampling.label, metric)
        cells = [NONE] * 4
        if figure:
            best = max(figure.draws) if rises(metric) else figure.min
            relative = f"{figure.mean / teacher.mean:.2f}×" if teacher and teacher.mean > 0 else NONE
            cells = [number(figure.mean) + model.mark(metric), figure.spread, number(best), relative]
        rows.append(_row(model, sampling.text, str(sampling.nfe), *cells))
    columns = (MODEL, SAMPLED_BY, NFE, Column(metric=metric), *titles)
    return Table(label="Distance by evaluations", columns=columns, rows=tuple(rows), tight=True)


def ingredients(models: Sequence[Model], metric: str, metrics: Sequence[str]) -> Table | None:
    """Every student at one evaluation: the main metric, distances in other features, and that to the teacher's images of the
    same noise."""
    measured = [
        (model, sampling, figure)
        for model, sampling in _samplings(models[1:])
        if sampling.nfe == 1 and sampling.plain and (figure := model.figure(sampling.label, metric))
    ]
    if not measured:
        return None
    largest = max((figure.mean for _, _, figure in measured if math.isfinite(figure.mean)), default=0.0)
    pair = pair_metric(metrics)
    beside = [other for other in metrics if is_frechet(other) and other != metric] + [pair] * bool(pair)
    rows = []
    for model, sampling, figure in measured:
        share = figure.mean / largest if 0 < figure.mean <= largest else None
        cells = [Cell(text=figure.text + model.mark(metric)), Cell(share=share)]
        for other in beside:
            found = model.figure(sampling.label, other)
            cells.append(Cell(text=number(found.mean) + model.mark(other) if found else NONE))
        iterations = " + ".join(f"{count:,}" for count in model.iterations) or NONE
        cells += texts(iterations, model.about or NONE)
        rows.append(Row(head=model.title, number=model.number, cells=tuple(cells)))
    columns = [Column(title="student", kind=""), Column(metric=metric), Column(title="bar", kind="bars", unseen=True)]
    columns += [Column(metric=other) for other in beside]
    columns += [Column(title="iterations"), Column(title="trained with", kind="long")]
    return Table(label="Ingredients", columns=tuple(columns), rows=tuple(rows), tight=True)


def pair_metric(metrics: Sequence[str]) -> str:
    """The metric of the distance to the teacher's images of the same noise; "" where it is not measured."""
    return next((metric for metric in metrics if metric.startswith(PAIR_RMS)), "")


def figures(label: str, models: Sequence[Model], metrics: Sequence[str]) -> Table:
    """Every model and sampling in several metrics."""
    rows = []
    for model, sampling in _samplings(models):
        measured = [(model.figure(sampling.label, metric), model.mark(metric)) for metric in metrics]
        shown = [figure.text + mark if figure else NONE for figure, mark in measured]
        rows.append(_row(model, sampling.text, str(sampling.nfe), *shown))
    columns = (MODEL, SAMPLED_BY, NFE, *(Column(metric=metric) for metric in metrics))
    return Table(label=label, columns=columns, rows=tuple(rows), tight=True)


def _samplings(models: Sequence[Model]) -> list[tuple[Model, Sampling]]:
    return [(model, sampling) for model in models for sampling in model.samplings]


def _row(model: Model, *values: str) -> Row:
    return Row(head=model.title, number=model.number, cells=texts(*values))
