"""The table of a finished sweep, trials.parquet: writing it, reading it, and the trials that no other beats.

A row holds the trial's number, its step schedule and settings, and its results:

    step, stopped                how long it was trained, and whether the sweep stopped it early
    fd_probe_losses              its last validation, by which worse trials are stopped
    metric, distance, std        for finished trials: what the evaluation pool measured, mean and spread over draws
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from beeline.errors import reading
from beeline.files.layout import check_layout
from beeline.metrics.measures import VALIDATION
from pipeline.manifest import rows_of
from pipeline.storage import Folder

TRIALS = "trials.parquet"
ENDED: dict[str, Any] = {"trial": 0, "steps": str, "nfe": 1, "step": 0, "stopped": bool, VALIDATION: float}
"""What is known of a trial when it ends, before the finished ones are measured."""
LAYOUT = ENDED | {"metric?": str, "distance?": float, "std?": float}
COLUMNS = tuple(name.removesuffix("?") for name in LAYOUT)


def write_trials(folder: Folder, trials: Sequence[dict[str, Any]]) -> None:
    """Publish the table; all rows have the same keys."""
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(list(trials)), sink)
    folder.write(TRIALS, sink.getvalue())


def trials_in(folder: Folder) -> list[dict[str, Any]]:
    """The trials of a finished sweep. Raises BeelineError for a damaged table."""
    with table_of(folder):
        trials = rows_of(folder.read(TRIALS))
        if not trials:
            raise ValueError("it has no rows")
        check_layout(trials, [LAYOUT])
        return trials


def table_of(folder: Folder) -> Any:
    """A context that turns any error of reading the table into a BeelineError."""
    return reading(f"{folder}/{TRIALS} is not as expected", f"remove {folder} and sweep again")


def settings_of(trial: dict[str, Any]) -> dict[str, Any]:
    """The settings that a trial tried, without its step schedule."""
    return {name: value for name, value in trial.items() if name not in COLUMNS}


def is_judged(trial: dict[str, Any]) -> bool:
    """Whether the trial was finished and its distance is finite."""
    return trial["distance"] is not None and math.isfinite(trial["distance"])


def pareto(trials: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The judged trials that no other beats at the same or fewer evaluations, by evaluations."""
    front: list[dict[str, Any]] = []
    for trial in sorted(filter(is_judged, trials), key=lambda trial: (trial["nfe"], trial["distance"])):
        if not front or trial["distance"] < front[-1]["distance"]:
            front.append(trial)
    return front
