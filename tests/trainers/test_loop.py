"""The loop by itself: what it counts, and when it gives up."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from beeline.errors import BeelineError
from pipeline import shards
from pipeline.storage import Folder
from trainers import loop


class Task:
    """Reads a batch a step; the steps in `bad` have gradients that are not finite."""

    name, images_per_step = "task", 4

    def __init__(self, session: loop.Session, bad: range, iterations: int) -> None:
        self.bad, self.iterations, self.published = bad, iterations, False
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
    rows = loop.read_log(session.folder)
    assert [row["skipped"] for row in rows] == [45, 95, 99]
    assert all(0 <= row["data_wait"] <= 1 for row in rows)
    assert sum(row["data_wait"] for row in rows) > 0
    assert all(row["peak_mb"] > 50 for row in rows)


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
