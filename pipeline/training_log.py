"""The log of a training, train.jsonl: its columns, and reading it. trainers/log.py writes it.

A row holds the means of the figures since the row before: those of the objective, the norms of gradients, at some steps the
figure of a validation, and the columns named here.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from beeline.errors import reading
from beeline.files.layout import check_layout
from beeline.files.names import LOG
from beeline.objectives.learner import GRAD_NORM, SKIPPED
from pipeline.storage import Folder

STEP, PHASE = "step", "phase"  # steps so far; the number of a student's phase, from 0
IMAGES_PER_S, DATA_WAIT, PEAK_MB = "images_per_s", "data_wait", "peak_mb"  # data_wait: share of the time
SECONDS = "seconds"  # since the run started or resumed
CRITIC_GRAD_NORM = f"critic_{GRAD_NORM}"
COLUMNS = (STEP, PHASE, SKIPPED, GRAD_NORM, CRITIC_GRAD_NORM, IMAGES_PER_S, DATA_WAIT, PEAK_MB, SECONDS)
"""Columns that the training loop adds to a row. Other columns are figures of the objective or of a validation."""
LAYOUT = {STEP: 0, f"{PHASE}?": float, f"{SECONDS}?": float, f"{DATA_WAIT}?": float, f"{SKIPPED}?": 0}
REMOVE = "remove it to leave its curves out"


def log_in(folder: Folder) -> list[dict[str, Any]]:
    """The rows of the log in a training's folder; [] where there is none. Raises BeelineError for a damaged log."""
    try:
        data = folder.read(LOG)
    except FileNotFoundError:
        return []
    with reading(f"{folder}/{LOG} is not readable", REMOVE):
        rows = [json.loads(line) for line in data.splitlines()]
        check_layout(rows, [LAYOUT])
        return rows


def read_log(folder: Folder) -> list[dict[str, Any]]:
    """The rows of the log; [] where there is none. A damaged file gives the rows before the damage and prints a line."""
    rows: list[dict[str, Any]] = []
    try:
        for line in folder.read(LOG).splitlines():
            row = json.loads(line)
            if not isinstance(row, dict) or not isinstance(row.get(STEP), int):
                raise ValueError("not a row with a step")
            rows.append(row)
    except FileNotFoundError:
        return []
    except ValueError as error:
        print(f"{folder}/{LOG} is damaged after row {len(rows)} ({error}); later rows are left out", flush=True)
    return rows


def loss_of(row: Mapping[str, Any]) -> tuple[str, float] | None:
    """The objective's first figure in a row, as (name, value); None where the row has no such number."""
    name = next((key for key in row if key not in COLUMNS), None)
    value = row[name] if name is not None else None
    return (name, float(value)) if name is not None and isinstance(value, int | float) else None


def seconds_of(rows: Sequence[Mapping[str, Any]]) -> float:
    """Seconds of training over all restarts: the column starts at 0 after each of them."""
    total, last = 0.0, 0.0
    for row in rows:
        now = float(last if row.get(SECONDS) is None else row[SECONDS])
        total, last = total + (now if now < last else now - last), now
    return total


def images_per_second(rows: Sequence[Mapping[str, Any]]) -> dict[int, float]:
    """Images per second of each phase in a log, all ranks together: the median over its rows."""
    speeds: dict[int, list[float]] = {}
    for row in _warm(rows):
        if isinstance(row.get(IMAGES_PER_S), int | float) and row[IMAGES_PER_S] > 0:
            speeds.setdefault(int(row.get(PHASE, 0)), []).append(row[IMAGES_PER_S])
    return {phase: statistics.median(rates) for phase, rates in speeds.items()}


def data_wait(rows: Sequence[Mapping[str, Any]]) -> float:
    """Share of the time in which steps waited for data, the mean over a log's rows."""
    return statistics.fmean(row[DATA_WAIT] for row in _warm(rows))


def _warm(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The rows without the first one of each phase, which compiles and allocates, unless it is the only one."""
    phases: dict[Any, list[Mapping[str, Any]]] = {}
    for row in rows:
        if isinstance(row.get(PHASE, 0), int | float):
            phases.setdefault(row.get(PHASE, 0), []).append(row)
    return [row for found in phases.values() for row in (found[1:] or found)]
