"""The finished sweeps of a workspace, as a table of their trials and a chart of those that were judged."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from beeline.errors import reading
from beeline.files.layout import check_layout
from evaluation.models import number
from evaluation.page.charts import Chart, Series, chart
from pipeline.manifest import rows_of
from pipeline.records import plan_in, success_in
from pipeline.storage import Folder

TRIALS = "trials.parquet"
TRIAL = {
    "trial": 0, "steps": str, "nfe": 1, "step": 0, "stopped": bool, "metric?": str, "distance?": float, "std?": float,
}  # fmt: skip
FIXED = ("trial", "steps", "nfe", "step", "stopped", "metric", "distance", "std")  # of a trial; what else it has was tried


@dataclasses.dataclass(frozen=True)
class Sweep:
    """`tried` are the settings that differ between trials, `quick` the measure that stopped the worse ones, `metric` that of
    the finished ones. A row is (steps, NFE, settings, trained for, quick measure, metric)."""

    name: str
    init: str
    tried: tuple[str, ...]
    quick: str
    metric: str
    rows: tuple[tuple[str, int, tuple[str, ...], str, str, str], ...]
    chart: Chart | None


def sweeps(place: Folder) -> list[Sweep]:
    """Every finished sweep. Raises BeelineError for tables that are not as sweep_lmm.py leaves them."""
    made = []
    for name in (place / "sweeps").folders():
        folder = place / "sweeps" / name
        if success_in(folder) is None:
            continue
        plan = plan_in(folder, {"sweep?": {"init?": str}}) or {}
        trials = trials_in(folder)
        with reading(f"{folder}/{TRIALS} is not as expected", f"remove {folder} and sweep again"):
            made.append(_sweep(name, (plan.get("sweep") or {}).get("init") or "", trials))
    return made


def trials_in(folder: Folder) -> list[dict[str, Any]]:
    """The trials of a finished sweep, as rows. Raises BeelineError where the table is not as sweep_lmm.py leaves it."""
    with reading(f"{folder}/{TRIALS} is not as expected", f"remove {folder} and sweep again"):
        trials = rows_of(folder.read(TRIALS))
        check_layout(trials, [TRIAL])
        return trials


def _sweep(name: str, init: str, trials: list[dict[str, Any]]) -> Sweep:
    quick = next(key for key in trials[0] if key.startswith("fd_"))
    metric = next((str(trial["metric"]) for trial in trials if trial["metric"]), "")
    tried = [key for key in trials[0] if key not in (*FIXED, quick)]
    tried = [key for key in tried if len({trial[key] for trial in trials}) > 1]
    trials.sort(key=lambda trial: (not _is_judged(trial), trial["distance"] if _is_judged(trial) else trial[quick]))
    rows = [
        (
            str(trial["steps"]),
            int(trial["nfe"]),
            tuple(f"{trial[key]:g}" if isinstance(trial[key], float) else str(trial[key]) for key in tried),
            f"{trial['step']:,}{', stopped' if trial['stopped'] else ''}",
            number(trial[quick]),
            f"{number(trial['distance'])} ± {number(trial['std'], like=trial['distance'])}" if _is_judged(trial) else "—",
        )
        for trial in trials
    ]
    return Sweep(name, init, tuple(tried), quick, metric, tuple(rows), _chart(trials, metric))


def _is_judged(trial: dict[str, Any]) -> bool:
    return trial["distance"] is not None and math.isfinite(trial["distance"])


def _chart(trials: Sequence[dict[str, Any]], metric: str) -> Chart | None:
    """The judged trials by evaluations, and the front that no other beats with as few."""
    shown = sorted((trial for trial in trials if _is_judged(trial)), key=lambda trial: (trial["nfe"], trial["distance"]))
    front: list[dict[str, Any]] = []
    for trial in shown:
        if not front or trial["distance"] < front[-1]["distance"]:
            front.append(trial)

    def series(name: str, color: int, those: Sequence[dict[str, Any]], **look: Any) -> Series:
        x, y = [trial["nfe"] for trial in those], [trial["distance"] for trial in those]
        return Series(name=name, number=color, x=x, y=y, error=[trial["std"] for trial in those], **look)

    ticks = sorted({trial["nfe"] for trial in shown})
    both = [series("finished trials", 2, shown, joined=False), series("none is nearer with as few", 1, front)]
    return chart(both, x="network evaluations per image", y=metric, alt="Trials by evaluations", ticks=ticks)
