"""Charts of measured figures: the main metric by evaluations, and straightness by noise level."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from beeline.metrics.measures import is_frechet
from evaluation.models import Figure, Model, number
from evaluation.page.charts import Chart, Series, chart
from evaluation.page.tables import MODEL, Column, Row, Table, texts

APART = 1.045  # factor on the x axis between models with the same number of evaluations
LEAST = 1e-4  # foot of a logarithmic axis of residuals


def by_evaluations(models: Sequence[Model], metric: str) -> Chart | None:
    """The main metric by evaluations, with the spread over noise seeds."""
    figures: dict[str, list[Figure]] = {}
    for model in models:
        plain = {sampling.label for sampling in model.samplings if sampling.steps is None or sampling.plain}
        figures[model.name] = [figure for figure in model.of(metric) if figure.sampler in plain]
    counts = sorted({figure.nfe for found in figures.values() for figure in found})
    sharing = {nfe: [name for name, found in figures.items() if nfe in {figure.nfe for figure in found}] for nfe in counts}

    def position(figure: Figure) -> float:
        """Models with the same number of evaluations stand side by side."""
        names = sharing[figure.nfe]
        return figure.nfe * APART ** (names.index(figure.model) - (len(names) - 1) / 2)

    series = [
        Series(
            name=model.title, number=model.number, x=[position(figure) for figure in figures[model.name]],
            y=[figure.mean for figure in figures[model.name]], error=[figure.std for figure in figures[model.name]],
        )
        for model in models
    ]  # fmt: skip
    log = "xy" if is_frechet(metric) else "x"
    alt = f"{metric} by network evaluations per image"
    return chart(series, x="network evaluations per image", y=metric, alt=alt, log=log, ticks=counts)


@dataclasses.dataclass(frozen=True)
class Straightness:
    """A table of means, charts by noise level with their titles, the number of pairs, and the models without figures."""

    table: Table
    charts: tuple[tuple[str, Chart], ...]
    pairs: str
    left_out: tuple[str, ...]


CURVES = {
    "values": ("relative residual", "y", "Straightness along the teacher's lines"),
    "own": ("relative residual", "y", "Straightness along own trajectories"),
    "speed": ("unevenness of speed", "", "Unevenness of speed along own trajectories"),
}
"""By the curve's name in metrics.json: the label of the y axis, whether it is logarithmic, and the title."""
MEANS = {
    "mean": "along the teacher's lines\u00a0↓",
    "own_mean": "along own trajectories\u00a0↓",
    "speed_mean": "unevenness of speed\u00a0↓",
}


def straightness(models: Sequence[Model]) -> Straightness | None:
    """Straightness and speed of the models that have such figures; None where none has."""
    measured = [(model, model.straightness) for model in models if model.straightness is not None]
    if not measured:
        return None
    rows = (
        Row(head=model.title, number=model.number, cells=texts(*(number(found[key]) for key in MEANS)))
        for model, found in measured
    )
    columns = (MODEL, *(Column(title=title) for title in MEANS.values()))
    charts = []
    for key, (label, log, title) in CURVES.items():
        series = [Series(name=m.title, number=m.number, x=found["sigmas"], y=found[key]) for m, found in measured]
        alt = f"{title}, by noise level"
        drawn = chart(series, x="noise level σ", y=label, alt=alt, log=f"x{log}", least=LEAST if log else 0)
        if drawn:
            charts.append((title, drawn))
    return Straightness(
        table=Table(label="Straightness", columns=columns, rows=tuple(rows), tight=True),
        charts=tuple(charts),
        pairs=str(measured[0][1].get("pairs", "")),
        left_out=tuple(model.title for model in models if model.straightness is None),
    )
