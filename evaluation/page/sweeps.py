"""The finished sweeps of a workspace: a table of the trials, and a chart of the judged ones."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from beeline.files.names import SWEEPS
from beeline.metrics.measures import VALIDATION
from evaluation.models import number
from evaluation.page.charts import Chart, Series, chart
from evaluation.page.tables import NFE, Column, Row, Table, texts
from evaluation.page.words import NONE
from evaluation.sweep_table import is_judged, pareto, settings_of, table_of, trials_in
from pipeline.records import plan_in, success_in
from pipeline.storage import Folder

Trial = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sweep:
    """A sweep: the student that its trials start from, the metric of its finished trials ("" where none finished), its table
    and its chart."""

    name: str
    init: str
    metric: str
    table: Table
    chart: Chart | None


def sweeps(place: Folder) -> list[Sweep]:
    """Every finished sweep. Raises BeelineError for a damaged table."""
    found = []
    for name in (place / SWEEPS).folders():
        folder = place / SWEEPS / name
        if success_in(folder) is None:
            continue
        plan = plan_in(folder, {"sweep?": {"init?": str}}) or {}
        trials = trials_in(folder)
        with table_of(folder):
            found.append(_sweep(name, (plan.get("sweep") or {}).get("init") or "", trials))
    return found


def _sweep(name: str, init: str, trials: Sequence[Trial]) -> Sweep:
    metric = next((str(trial["metric"]) for trial in trials if trial["metric"]), "")
    settings = [name for name in settings_of(trials[0]) if len({trial[name] for trial in trials}) > 1]
    ordered = sorted(trials, key=lambda trial: (not is_judged(trial), trial["distance" if is_judged(trial) else VALIDATION]))
    columns = [Column(title="steps", kind=""), NFE, *([Column(metric=metric)] if metric else [])]
    columns += [Column(title=setting.replace("_", " ")) for setting in settings]
    columns += [Column(title="trained for"), Column(metric=VALIDATION)]
    rows = [_row(trial, settings, with_metric=bool(metric)) for trial in ordered]
    table = Table(label=f"Trials of {name}", columns=tuple(columns), rows=tuple(rows))
    return Sweep(name=name, init=init, metric=metric, table=table, chart=_chart(trials, metric))


def _row(trial: Trial, settings: Sequence[str], *, with_metric: bool) -> Row:
    cells = [str(trial["nfe"])]
    if with_metric:
        spread = f"{number(trial['distance'])} ± {number(trial['std'], like=trial['distance'])}" if is_judged(trial) else NONE
        cells.append(spread)
    cells += [f"{trial[name]:g}" if isinstance(trial[name], float) else str(trial[name]) for name in settings]
    cells += [f"{trial['step']:,}{', stopped' if trial['stopped'] else ''}", number(trial[VALIDATION])]
    return Row(head=trial["steps"], cells=texts(*cells))


def _chart(trials: Sequence[Trial], metric: str) -> Chart | None:
    """The judged trials by evaluations, and the front that no other beats with the same or fewer."""
    judged = sorted(filter(is_judged, trials), key=lambda trial: (trial["nfe"], trial["distance"]))

    def series(name: str, number: int, shown: Sequence[Trial], *, joined: bool) -> Series:
        x, y = [trial["nfe"] for trial in shown], [trial["distance"] for trial in shown]
        return Series(name=name, number=number, x=x, y=y, error=[trial["std"] for trial in shown], joined=joined)

    both = [
        series("finished trials", 2, judged, joined=False),
        series("best at the same or fewer evaluations", 1, pareto(trials), joined=True),
    ]
    ticks = sorted({trial["nfe"] for trial in judged})
    return chart(both, x="network evaluations per image", y=metric, alt="Trials by evaluations", ticks=ticks)
