"""Steps that run in parallel, on the session's Ray: each starts after the steps whose results it reads."""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from harness import ROOT, Head
from ray import cloudpickle

from cluster.run_pipeline import run_together
from cluster.steps import Step


@pytest.fixture
def joined(head: Head) -> Iterator[None]:
    cloudpickle.register_pickle_by_value(sys.modules[__name__])  # Ray's processes cannot import a test
    ray.init(address=head.address, log_to_driver=False, runtime_env={"env_vars": {"PYTHONPATH": str(ROOT)}})
    yield
    ray.shutdown()


def write(folder: Path, name: str, inputs: tuple[str, ...]) -> None:
    """Fail unless the inputs are there, and appear late."""
    assert all((folder / other).exists() for other in inputs)
    time.sleep(0.3)
    (folder / name).touch()


def fail() -> None:
    raise ValueError("no such teacher")


def step(folder: Path, name: str, *after: str) -> Step:
    return Step(name=name, run=functools.partial(write, folder, name, after), after=("elsewhere", *after), side_by_side=True)


@pytest.mark.usefixtures("joined")
def test_each_starts_after_its_inputs(tmp_path: Path) -> None:
    names = [f"step-{n}" for n in range(8)]
    run_together(
        [step(tmp_path, "last", *names, "second"), step(tmp_path, "second", "step-3"), *(step(tmp_path, n) for n in names)]
    )
    assert {path.name for path in tmp_path.iterdir()} == {"last", "second", *names}


@pytest.mark.usefixtures("joined")
def test_a_failure_ends_the_group(tmp_path: Path) -> None:
    failing = Step(name="failing", run=fail, side_by_side=True)
    with pytest.raises(ValueError, match="no such teacher"):
        run_together([failing, step(tmp_path, "after", "failing")])
    assert not (tmp_path / "after").exists()
