"""The training loop alone: what it counts, and when it gives up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from beeline.errors import BeelineError
from pipeline import shards
from pipeline.storage import Folder
from trainers import checkpoints, loop
from trainers.log import read_log


class Task:
    """Reads one batch per step; the steps in `bad` have gradients that are not finite."""

    name, images_per_step = "task", 4

    def __init__(self, session: loop.Session, bad: range, iterations: int, phase_ends: Sequence[int] = ()) -> None:
        self.bad, self.iterations, self.published = bad, iterations, False
        self.phase_ends = phase_ends or (iterations,)
        self.reader = session.read(session.folder, {"count": 8, "shard_size": 8}, seed=0)

    def step(self, step: int) -> dict[str, float]:
        self.reader.batch(4 * step, 4)
        return {"loss": 1.0, "skipped": float(step in self.bad)}

    def validate(self, step: int) -> dict[str, float]:
        self.judged = [*getattr(self, "judged", []), step]
        return {"fd": 1 / step}

    def state_dict(self) -> loop.State:
        return {"task": {"steps": 0}}

    def load_state_dict(self, state: loop.State) -> None: ...

    def publish(self) -> None:
        self.published = True


@pytest.fixture
def session(tmp_path: Path) -> loop.Session:
    data = shards.encode("image", np.zeros((8, 1, 4, 4), np.uint8), np.zeros(8, np.int32), range(8), {})
    Folder(str(tmp_path)).write(shards.shard_name(0), data)

    return loop.Session(folder=Folder(str(tmp_path)))


def test_the_log_counts_waiting_memory_and_skipped_steps(session: loop.Session) -> None:
    task = Task(session, range(5, 5 + loop.MAX_SKIPPED - 1), iterations=150)
    loop.run(task, session, loop.Cadence(log_every=50, checkpoint_every=1000))
    assert task.published
    rows = read_log(session.folder)
    assert [row["skipped"] for row in rows] == [45, 95, 99]
    assert all(0 <= row["data_wait"] <= 1 for row in rows)
    assert sum(row["data_wait"] for row in rows) > 0
    assert all(row["peak_mb"] > 50 for row in rows)


class Phases(Task):
    """A task with three figures: the phase, the step, and one that only every third step has."""

    def step(self, step: int) -> dict[str, float]:
        figures = super().step(step) | {"phase": float(sum(step >= end for end in self.phase_ends)), "loss": float(step)}
        return figures | ({"rare": float(step)} if step % 3 == 0 else {})


@pytest.mark.parametrize(
    ("ends", "steps"),
    [
        ((10,), [4, 8, 10]),
        ((6, 10), [4, 6, 8, 10]),
        ((4, 5, 10), [4, 5, 8, 10]),
        ((1, 2, 3, 10), [1, 2, 3, 4, 8, 10]),
    ],
)
def test_a_row_ends_at_a_phase_change(session: loop.Session, ends: Sequence[int], steps: list[int]) -> None:
    """No row mixes two phases, and a figure's mean covers the steps since the last row that had it."""
    task = Phases(session, range(0), iterations=10, phase_ends=ends)
    loop.run(task, session, loop.Cadence(log_every=4, checkpoint_every=1000))
    rows = read_log(session.folder)
    assert [row["step"] for row in rows] == steps
    for row, first in zip(rows, [0, *steps], strict=False):
        seen = range(first, row["step"])
        assert row["phase"] == sum(first >= end for end in ends)
        assert row["loss"] == pytest.approx(sum(seen) / len(seen))
        rare = [step for step in seen if step % 3 == 0]
        assert row.get("rare") == (pytest.approx(sum(rare) / len(rare)) if rare else None)


def test_means_go_on_after_a_checkpoint_in_the_middle_of_a_row(session: loop.Session) -> None:
    cadence = loop.Cadence(log_every=5, checkpoint_every=2, keep=10)
    timed = {"seconds", "images_per_s", "data_wait", "peak_mb"}

    def rows() -> list[dict[str, Any]]:
        return [{key: value for key, value in row.items() if key not in timed} for row in read_log(session.folder)]

    loop.run(Phases(session, range(0), iterations=10, phase_ends=(7, 10)), session, cadence)
    wanted = rows()
    assert [row["step"] for row in wanted] == [5, 7, 10]
    for step in (2, 4, 6, 8):
        restored = checkpoints.load(session.folder, step)
        again = replace(session, restored=restored)
        loop.run(Phases(again, range(0), iterations=10, phase_ends=(7, 10)), again, cadence)
        assert rows() == wanted


def test_training_that_has_diverged_ends(session: loop.Session) -> None:
    task = Task(session, range(7, 1000), iterations=1000)
    with pytest.raises(BeelineError, match="100 steps in a row, up to step 107, are not finite"):
        loop.run(task, session, loop.Cadence(log_every=50, checkpoint_every=1000))
    assert not task.published


def test_the_two_generators_of_a_step_draw_different_numbers(tmp_path: Path) -> None:
    session = loop.Session(folder=Folder(str(tmp_path)))
    explicit = torch.rand(8, generator=session.generator(0, 5))
    assert not torch.equal(torch.rand(8), explicit)
    again = torch.rand(8, generator=session.generator(0, 5))
    assert torch.equal(again, explicit)
