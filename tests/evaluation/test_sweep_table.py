"""The table of a sweep: what is written is read back, and trials without a finite distance are never the best."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from measured import finished

from beeline.errors import BeelineError
from beeline.metrics.measures import VALIDATION
from evaluation.page.sweeps import sweeps
from evaluation.sweep_table import TRIALS, pareto, settings_of, trials_in, write_trials
from pipeline.storage import Folder

FINISHED = {"trial": 0, "steps": "0", "nfe": 1, "lr": 1e-4, "step": 40, "stopped": False, VALIDATION: 0.09}
FINISHED |= {"metric": "fd_probe_100", "distance": 0.08, "std": 0.003}
DIVERGED = FINISHED | {"trial": 1, "lr": 1e-2, "distance": math.nan, "std": math.nan}
STOPPED = FINISHED | {"trial": 2, "step": 20, "stopped": True, VALIDATION: math.nan}
STOPPED |= {"metric": None, "distance": None, "std": None}


@pytest.mark.parametrize("trials", [[FINISHED, DIVERGED, STOPPED], [STOPPED, DIVERGED, FINISHED], [STOPPED]])
def test_a_table_is_read_as_it_was_written(tmp_path: Path, trials: list[dict]) -> None:
    folder = Folder(str(tmp_path))
    write_trials(folder, trials)
    assert repr(trials_in(folder)) == repr(trials)  # NaN differs from itself


def test_trials_without_a_distance_are_shown_and_not_the_best(tmp_path: Path) -> None:
    trials = [STOPPED, DIVERGED, FINISHED]
    assert pareto(trials) == [FINISHED]
    assert settings_of(FINISHED) == {"lr": 1e-4}
    place = Folder(str(tmp_path))
    write_trials(place / "sweeps/sot", trials)
    finished(place, "sweeps/sot", {"sweep": {}}, {}, trials=3)
    (sweep,) = sweeps(place)
    assert [row.cells[1].text for row in sweep.table.rows] == ["0.0800 ± 0.0030", "—", "—"]
    assert [column.title for column in sweep.table.columns if column.title == "lr"] == ["lr"]
    assert {row.cells[-1].text for row in sweep.table.rows} == {"0.0900", "not finite"}


def test_a_damaged_table_is_refused(tmp_path: Path) -> None:
    folder = Folder(str(tmp_path))
    write_trials(folder, [FINISHED])
    (tmp_path / TRIALS).write_bytes((tmp_path / TRIALS).read_bytes()[:-9])
    with pytest.raises(BeelineError, match="sweep again"):
        trials_in(folder)
