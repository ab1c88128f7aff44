"""The network a student starts with: new weights (init "scratch") and dropout."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import small
import torch
from methods import ConsistencyConfig, JumpConfig

from beeline.checkpoint import build
from beeline.config import StudentConfig, from_dict, to_dict
from beeline.errors import SettingError
from beeline.objectives import Needs, ObjectiveConfig
from beeline.recipes import RECIPES
from cluster.steps import steps
from pipeline.storage import Folder
from trainers import loop
from trainers.student import start_from, student_training
from trainers.training import Training

DIGITS = RECIPES["digits"](0)


def config(objective: ObjectiveConfig, **changes: Any) -> StudentConfig:
    phase = replace(DIGITS.main.phases["reconstruction"], iterations=2, objective=objective)
    return replace(DIGITS.main, name="tried", batch_size=8, phases={"alone": phase}, **changes)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    return small.workspace(tmp_path_factory.mktemp("start") / "ws")


def training(workspace: Folder, folder: Path, settings: StudentConfig) -> Training:
    session = loop.Session(folder=Folder(str(folder)))
    return student_training(
        session=session, workspace=workspace, recipe="digits", config=settings, **small.plans(workspace)
    )  # fmt: skip


def weights(task: Training) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in task.model.state_dict().items()}


def equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_new_weights(workspace: Folder, tmp_path: Path) -> None:
    """They have the teacher's network and none of its weights, and are a function of the seed alone."""
    tasks = []
    for number, changes in enumerate(({"init": "teacher"}, {}, {}, {"seed": 1})):
        torch.manual_seed(number)
        task = training(workspace, tmp_path / str(number), config(ConsistencyConfig(), **{"init": "scratch", **changes}))
        tasks.append(task)
        assert task.model.network_config == small.NETWORK
        assert task.model.training
    teacher, one, again, other = map(weights, tasks)
    assert equal(one, again)
    for different in (teacher, other):
        trained = [name for name, tensor in one.items() if float(tensor.std(correction=0)) > 0]
        assert len(trained) > 10
        assert not any(torch.equal(one[name], different[name]) for name in trained)
    tasks[-1].step(0)
    assert not equal(weights(tasks[-1]), other)


def test_new_weights_are_those_of_a_new_network() -> None:
    """Layers that start at zero do so, unlike those of the teacher."""
    teacher = build(small.NETWORK)
    for parameter in teacher.parameters():
        torch.nn.init.normal_(parameter, 0, 0.1)
    torch.manual_seed(3)
    student = start_from(teacher, new=True, needs=Needs(second_level=True), dropout=0.2)
    torch.manual_seed(3)
    wanted = build(replace(small.NETWORK, second_level=True, dropout=0.2))
    assert equal(dict(student.state_dict()), dict(wanted.state_dict()))
    assert student.network_config == wanted.network_config


def test_scratch_reads_the_teachers_network() -> None:
    settings = config(JumpConfig(), init="scratch")
    assert (settings.start, config(JumpConfig(), init="students/lmm").start) == ("teacher", "students/lmm")
    recipe = replace(DIGITS, students={"tried": settings}, sweep=replace(DIGITS.sweep, init="teacher"))
    (step,) = (step for step in steps("nowhere", recipe) if step.name == "students/tried")
    assert step.after == ("pairs", "teacher")


def test_dropout(workspace: Folder, tmp_path: Path) -> None:
    """It is the student's alone: in its network, in its training steps, and not in its averages."""
    settings = config(ConsistencyConfig(), dropout=0.3)
    kept = to_dict(settings, resources=False)
    assert kept["dropout"] == 0.3
    task = training(workspace, tmp_path / "student", settings)
    assert task.model.network_config == replace(small.NETWORK, dropout=0.3)
    assert [average.training for average in task.averages] == [False]
    x, sigma, labels = torch.randn(4, 1, 8, 8), torch.full((4,), 2.0), torch.eye(small.CLASSES)
    with torch.no_grad():
        one, other = (task.model(x, sigma, labels) for _ in range(2))
        assert not torch.allclose(one, other, atol=1e-3)
        assert torch.equal(*(task.averages[0](x, sigma, labels) for _ in range(2)))
    assert task.student._drops
    task.step(0)


@pytest.mark.parametrize("dropout", [-0.1, 1.0, float("nan")])
def test_dropout_is_a_share(dropout: float) -> None:
    with pytest.raises(SettingError, match=r"StudentConfig\.dropout is"):
        config(JumpConfig(), dropout=dropout)


def test_old_records_have_neither() -> None:
    """A student's plan from before the setting is read as one without dropout."""
    values = to_dict(replace(DIGITS.main, phases={}))
    del values["dropout"]
    assert from_dict(StudentConfig, values).dropout == 0.0
