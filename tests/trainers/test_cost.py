"""What a student's training cost: its own evaluations, those of its pairs, and those of the students it builds on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import small
import torch
from measured import finished
from methods import ConsistencyConfig, Jump, JumpConfig

from beeline.config import StudentConfig
from beeline.objectives import Batch, Context, Needs, ObjectiveConfig
from beeline.objectives.kd import DistillationConfig
from beeline.objectives.learner import Learner
from beeline.recipes import RECIPES
from pipeline.records import cost_in, evaluations_of
from pipeline.storage import Folder
from trainers import train_lmm
from trainers.cost import training_cost

DIGITS = RECIPES["digits"](0)
PHASE = replace(DIGITS.main.phases["reconstruction"], objective=DistillationConfig(num_steps=4))
KD = {"training": 300, "phases": {"first": 100, "second": 200}, "pairs": 4000, "inherited": {}}


class Reading(JumpConfig):
    """A method of one's own that reads a value, which tensors without data do not have."""

    def needs(self) -> Needs:
        return Needs(pairs=True)

    def build(self, context: Context) -> Jump:
        return ReadingJump()


class ReadingJump(Jump):
    def backward(
        self, student: Learner, critic: Learner | None, batch: Batch, generator: torch.Generator
    ) -> dict[str, torch.Tensor]:
        assert batch.x1 is not None
        if float(batch.x1.mean()) > 0:
            raise ValueError("read\nsomething")
        return {}


class FromStudent(ConsistencyConfig):
    """Learns from another student."""

    def needs(self) -> Needs:
        return Needs(images=True, models=("teacher", "students/other"))


def student(*objectives: ObjectiveConfig, **changes: Any) -> StudentConfig:
    phases = {f"phase-{k}": replace(PHASE, iterations=10, objective=objective) for k, objective in enumerate(objectives)}
    return replace(DIGITS.main, **{"name": "tried", "batch_size": 6, "phases": phases, **changes})


@pytest.fixture
def place(tmp_path: Path) -> Folder:
    """A workspace with pairs that took 4,000 evaluations."""
    made = Folder(str(tmp_path / "ws"))
    finished(made, "pairs", {"pairs": {}}, {}, pairs=1000, shards=1, evaluations=4000)
    return made


def cost(place: Folder, config: StudentConfig) -> dict[str, Any]:
    return training_cost(place, "digits", config, small.NETWORK)


def write(place: Folder, name: str, record: Any) -> None:
    finished(place, f"students/{name}", {}, {}, images_seen=1, cost=record)


def test_phases_and_pairs(place: Folder) -> None:
    """Evaluations of a step times images; skipped phases cost nothing, and pairs count for those who train on them."""
    config = student(DistillationConfig(num_steps=4), ConsistencyConfig())
    config = replace(config, phases=config.phases | {"skipped": replace(PHASE, iterations=0)})
    found = cost(place, config)
    assert found["phases"] == {"phase-0": pytest.approx(3 * 60, rel=0.06), "phase-1": pytest.approx(5 * 60, rel=0.06)}
    assert found["training"] == sum(found["phases"].values())
    assert (found["pairs"], found["inherited"]) == (4000, {})
    assert cost(place, student(ConsistencyConfig()))["pairs"] == 0
    write(place, "tried", found)
    assert cost_in(place / "students/tried") == found


def test_pairs_of_a_student_count_in_addition_to_those_that_made_it(place: Folder) -> None:
    write(place, "base", KD)
    finished(place, "students/base/pairs", {"pairs": {}}, {}, pairs=10, shards=1, evaluations=70)
    found = cost(place, student(DistillationConfig(num_steps=4), pairs="students/base"))
    assert (found["pairs"], found["inherited"]) == (70, {"students/base": {"training": 300, "pairs": 4000}})


def test_the_probe_of_the_workspace_is_counted(tmp_path: Path) -> None:
    """Also with dropout, which counts as nothing."""
    place = small.workspace(tmp_path / "ws")  # its pairs have no record of their evaluations
    lines = DIGITS.main.phases["reconstruction"].objective
    plain, probed = (
        training_cost(place, "digits", student(objective, init="scratch", dropout=0.1), small.NETWORK)
        for objective in (DistillationConfig(num_steps=4), lines)
    )
    assert probed["training"] > plain["training"] > 0
    assert plain["pairs"] is None


def test_what_is_inherited_counts_once(place: Folder) -> None:
    write(place, "base", KD)
    grown = {
        "training": 50,
        "phases": {"only": 50},
        "pairs": 0,
        "inherited": {"students/base": {"training": 100, "pairs": 4000}},
    }
    write(place, "other", grown)
    entry = {"training": 100, "pairs": 4000}
    of = "students/base/first"
    assert cost(place, student(ConsistencyConfig(), init=of))["inherited"] == {"students/base": entry}
    # Its pairs are the same as those of the student, and two ways lead to students/base; the longer one contains the other.
    pairs = student(DistillationConfig(num_steps=4), FromStudent(), init=of)
    assert cost(place, pairs)["inherited"] == {
        "students/base": {"training": 100, "pairs": 0}, "students/other": {"training": 50, "pairs": 0},
    }  # fmt: skip
    longer = student(FromStudent(), init="students/base/ema-50")
    assert cost(place, longer)["inherited"] == {
        "students/base": {"training": 300, "pairs": 4000}, "students/other": {"training": 50, "pairs": 0},
    }  # fmt: skip


def test_models_of_the_teacher_are_not_inherited(place: Folder) -> None:
    assert cost(place, student(ConsistencyConfig(), init="scratch"))["inherited"] == {}
    assert cost(place, student(ConsistencyConfig()))["inherited"] == {}


def test_students_without_a_record_are_unknown(place: Folder) -> None:
    write(place, "older", None)
    write(place, "damaged", 3)
    for name in ("older", "damaged", "missing"):
        found = cost(place, student(ConsistencyConfig(), init=f"students/{name}"))
        assert found["inherited"] == {f"students/{name}": {"training": None, "pairs": None}}
        assert found["training"] > 0


def test_what_cannot_be_counted_is_null(place: Folder, capsys: pytest.CaptureFixture[str]) -> None:
    """One line says why, and the other phases are counted."""
    found = cost(place, student(Reading(), ConsistencyConfig()))
    assert found["phases"] == {"phase-0": None, "phase-1": pytest.approx(300, rel=0.06)}
    assert (found["training"], found["pairs"]) == (None, 4000)
    printed = capsys.readouterr().out
    assert printed.startswith("students/tried: the cost of phase 'phase-0' is not counted: ")
    assert printed.count("\n") == 1
    assert training_cost(place, "digits", student(ConsistencyConfig()), None)["training"] is None
    write(place, "tried", found)
    assert cost_in(place / "students/tried") == found


def test_evaluations_of_a_phase() -> None:
    assert [evaluations_of(KD, name) for name in ("first", "second", "", "ema-50")] == [100, 300, 300, 300]
    unknown = KD | {"phases": {"first": 100, "second": None}}
    assert [evaluations_of(unknown, name) for name in ("first", "second", "")] == [100, None, None]


def test_a_training_ends_with_its_cost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command counts after the training processes have ended, in its own process."""
    place, order = small.workspace(tmp_path / "ws"), []
    monkeypatch.setattr(train_lmm, "launch", lambda *_, **__: order.append("trained"))
    counted = train_lmm.training_cost
    monkeypatch.setattr(train_lmm, "training_cost", lambda *arguments: (order.append("counted"), counted(*arguments))[1])
    settings = student(ConsistencyConfig(), init="students/lmm")
    train_lmm.train_lmm(str(tmp_path / "ws"), "digits", settings)
    found = cost_in(place / "students/tried")
    assert found is not None
    assert found["training"] == pytest.approx(5 * 60, rel=0.1)
    assert found["inherited"] == {"students/lmm": {"training": None, "pairs": None}}
    train_lmm.train_lmm(str(tmp_path / "ws"), "digits", settings)  # complete
    assert order == ["trained", "counted"]
