"""Results of a stage of a rehearsal, read from its own records: a training log, a manifest, `_SUCCESS`."""

from __future__ import annotations

import dataclasses
import re
import statistics
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from beeline.files.names import maker_of_pairs
from cluster.planning.workspace import Workspace
from evaluation.evaluate import PER_EVALUATION, PER_LOOK
from pipeline.manifest import read_manifest, seconds_per_pair
from pipeline.runtime import find_user_error
from pipeline.training_log import data_wait, images_per_second, read_log
from trainers.trials import folder_name

# Counters in a stage's `_SUCCESS`, of which the first that exists is used, and the unit of each.
COUNTED = {
    "images_seen": "image",
    "evaluations": "evaluation",
    "pairs": "pair",
    "images": "image",
    "trials": "trial",
    "iterations": "iteration",
}
WRAPPED = ("health_check_failure", "controller_failure", "cause", "__cause__")  # where Ray's errors keep their causes
LONGEST = 300  # characters of a reason


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """Result of a stage. Memory is in MB, `data_wait` a share of the time; estimate.py uses `speeds` (planning/speeds.py)."""

    stage: str
    ok: bool
    reason: str = ""
    note: str = ""
    seconds: float = 0.0
    """Total time, including starting processes and loading networks."""
    unit: str = ""
    units: int = 0
    seconds_per_unit: float | None = None
    """Without the first units, if the records show them."""
    peak_mb: float | None = None
    gpu_mb: float | None = None
    data_wait: float | None = None
    speeds: tuple[dict[str, Any], ...] = ()


def with_figures(row: Outcome, folders: Sequence[str], here: Workspace) -> Outcome:
    """Add the figures in the records of a successful stage, from its folders in the rehearsal's workspace."""
    folder = here.place / folders[0]
    records = [record for name in folders if (record := here.complete(name))]
    key = next((key for key in COUNTED if records and key in records[0]), None)
    log = read_log(folder if key != "trials" else folder / folder_name(0))
    if key is None or (key == "images_seen" and not log):  # a set of students is joined here, and trained elsewhere
        return row
    done, units = records[0], sum(int(record[key]) for record in records)
    row = replace(row, unit=COUNTED[key], units=units, seconds_per_unit=row.seconds / max(1, units))
    if log:
        each = [1 / rate for rate in images_per_second(log).values()]
        note = f"phases {' and '.join(map(_seconds, each))}" if len(each) > 1 else row.note
        row = replace(row, seconds_per_unit=statistics.fmean(each), data_wait=data_wait(log), note=note)
        if key == "trials":
            row = replace(row, unit="image", units=units * here.recipe.sweep.iterations * here.recipe.main.batch_size)
    elif PER_EVALUATION in done:
        each, looking = (statistics.median(record[name] for record in records) for name in (PER_EVALUATION, PER_LOOK))
        row = replace(row, seconds_per_unit=each, note=f"{_seconds(looking)} for the features of a sample")
    elif "reading_seconds" in done:  # of all actors, from opening images to published shards
        row = replace(row, seconds_per_unit=done["reading_seconds"] / done["images"])
    elif maker_of_pairs(row.stage):
        note = f"{done['evaluations'] / done['pairs']:g} evaluations each"
        row = replace(
            row, unit="pair", units=done["pairs"], seconds_per_unit=seconds_per_pair(read_manifest(folder)), note=note
        )
    speeds = tuple(
        dataclasses.asdict(speed.task) | {"flops_per_s": speed.rate(), "on_gpu": speed.on_gpu}
        for name in folders
        for speed in here.speeds(name)
    )
    return replace(row, speeds=speeds)


def reason(error: BaseException) -> str:
    """Return the cause of an error in one line, unwrapped from Ray's errors."""
    user = find_user_error(error)
    if user is not None:
        return " ".join(str(user).split())
    root = error
    while True:
        failures = getattr(root, "worker_failures", None)
        inner = next(iter(failures.values()), None) if isinstance(failures, dict) else None
        inner = inner or next((cause for name in WRAPPED if (cause := getattr(root, name, None))), None)
        if not isinstance(inner, BaseException):
            break
        root = inner
    lines = [line.strip() for line in str(root).splitlines() if line.strip()] or [""]
    raised = [line for line in lines if re.match(r"[\w.]*(Error|Exception|Interrupt)\b", line)]  # below a traceback's text
    line = raised[-1] if raised else f"{type(root).__name__}: {lines[0]}"
    return line if len(line) <= LONGEST else f"{line[:LONGEST]} ..."


def text(row: Outcome, width: int = 0) -> str:
    """Format the stage's line."""
    if not row.ok:
        return f"FAILED  {row.stage:<{width}}  {row.reason}"
    parts = []
    if row.seconds_per_unit is not None:
        parts.append(f"{_seconds(row.seconds_per_unit)} per {row.unit}, {row.units:,} in {row.seconds:,.0f} s")
    else:
        parts.append(f"{row.seconds:,.1f} s")
    parts += [f"process {row.peak_mb:,.0f} MB"] if row.peak_mb else []
    parts += [f"GPU {row.gpu_mb:,.0f} MB"] if row.gpu_mb else []
    parts += [f"waited for data {100 * row.data_wait:.1f} %"] if row.data_wait is not None else []
    return f"works   {row.stage:<{width}}  {'; '.join([*parts, *([row.note] if row.note else [])])}"


def _seconds(value: float) -> str:
    return f"{value:.3g} s" if value >= 0.1 else f"{1000 * value:.3g} ms"
