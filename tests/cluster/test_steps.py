"""Step schedules that each student of a recipe is measured at."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from methods import ConsistencyConfig

from beeline.errors import BeelineError
from beeline.objectives import ObjectiveConfig
from beeline.objectives.kd import DistillationConfig
from beeline.objectives.lmm import LinesMatchingConfig
from beeline.objectives.maps.progressive import ProgressiveConfig, rounds
from beeline.objectives.rectified_flow import RectifiedFlowConfig
from beeline.objectives.scores.dmd import DMDConfig
from beeline.recipes import RECIPES
from beeline.sampling.few_step import FewStep, parse_steps
from cluster.planning.workspace import Workspace
from cluster.rehearse import all_steps
from cluster.steps import check_recipe, models, steps

DIGITS = RECIPES["digits"](0)


class Solved(ConsistencyConfig):
    """A method whose students are sampled by a solver."""

    def sampling(self) -> FewStep | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        return None


def schedules(objective: ObjectiveConfig, few: tuple[str, ...], own: tuple[str, ...] = ("0",)) -> tuple[str, ...]:
    phase = replace(DIGITS.main.phases["reconstruction"], objective=objective)
    student = replace(DIGITS.main, name="tried", phases={"alone": phase})
    recipe = replace(DIGITS, students={"tried": student}, few_steps=few, evaluate=replace(DIGITS.evaluate, steps=own))
    return models(recipe)["students/tried"]


def sot(*steps: int) -> LinesMatchingConfig:
    return LinesMatchingConfig(num_steps=18, distance="l2", steps=steps)


FEW = ("0", "0,8", "0,0.821", "0,6,12,15")


def test_students_of_all_levels_are_measured_at_few_steps() -> None:
    for objective in (ConsistencyConfig(num_steps=18), RectifiedFlowConfig(), LinesMatchingConfig(num_steps=18, distance="l2")):
        assert schedules(objective, FEW, ("0", "0,1")) == FEW


def test_students_of_some_steps_are_measured_at_what_they_know() -> None:
    """They are few_steps and evaluate.steps in order, each once; noise levels fit if they are those of trained steps."""
    assert schedules(DistillationConfig(num_steps=18), FEW) == ("0",)
    assert schedules(sot(0, 8), FEW) == ("0", "0,8")
    assert schedules(sot(0, 1, 8), FEW, ("0,1", "0", "0,1,8", "0,2")) == ("0", "0,8", "0,1", "0,1,8")
    assert schedules(sot(0, 8), ("80.0", "80.0,8", "80.0,0.5")) == ("80.0", "80.0,8", "0", "0,8")


def test_without_a_fitting_schedule_all_trained_steps_are_taken() -> None:
    assert schedules(sot(0, 3, 9), ("0,8", "0,1"), ("0,1,2",)) == ("0,3,9",)


def test_students_of_a_level_of_their_own_are_measured_at_it() -> None:
    """1.0 is a trained level of this student, but no second step after it."""
    assert schedules(DMDConfig(start_levels=(1.0,)), ("0", "0,1.0", "0,8")) == ("0",)
    assert schedules(DMDConfig(start_levels=(80.0, 1.0)), ("0", "0,1.0", "0,8")) == ("0", "0,1.0", "0,1")


@pytest.mark.parametrize("name", RECIPES)
def test_the_recipes_measure_students_as_they_may_be_sampled(name: str) -> None:
    recipe = RECIPES[name](0)
    check_recipe(recipe)
    phases = {folder: phase for student in recipe.students.values() for folder, phase in student.models().items()}
    for folder, measured in models(recipe).items():
        sampling = phases[folder].objective.sampling() if folder in phases else None
        if sampling is not None:
            assert measured
            assert all(sampling.check(parse_steps(steps)) for steps in measured)


def test_students_sampled_by_solvers_have_no_schedules() -> None:
    """`evaluate.nfe` holds for them; what they get here is ignored."""
    assert schedules(Solved(), FEW, ("0", "0,1")) == ("0", "0,1")


@pytest.mark.parametrize(
    ("few", "message"),
    [
        (("80.0,0.821",), None),
        (("0,0.5,17",), None),
        (("0,18",), "the last step in few_steps is 18; expected a whole number from 0 to 17"),
        (("0,0.5,8",), "few_steps of students/lmm/reconstruction: steps are"),
        (("79.0",), "few_steps of students/lmm/reconstruction: steps are"),
    ],
)
def test_schedules_are_checked_before_any_work(few: tuple[str, ...], message: str | None) -> None:
    recipe = replace(DIGITS, few_steps=few)
    if message is None:
        check_recipe(recipe)
        return
    with pytest.raises(BeelineError, match=message):
        check_recipe(recipe)


def test_students_of_some_steps_ignore_the_others_schedules() -> None:
    """A schedule beyond their levels is none of theirs."""
    students = {"kd": RECIPES["digits_methods"](0).students["kd"]}
    check_recipe(replace(DIGITS, students=students, few_steps=("0", "0,99")))


def test_a_student_of_single_levels_is_measured_at_them() -> None:
    """After each round of progressive distillation at its own steps; other students as the recipe says."""
    recipe = RECIPES["digits"](0)
    optimizer = recipe.main.phases["reconstruction"].optimizer
    phases = rounds(ProgressiveConfig(steps=32, num_steps=64), (1,) * 6, optimizer)
    recipe = replace(recipe, students=recipe.students | {"pd": replace(recipe.main, name="pd", phases=phases)})
    measured = models(recipe)
    assert measured["students/pd/steps-32"] == ("0", "0,8", "0,6,12")  # its own are too many
    assert measured["students/pd/steps-8"] == ("0", "0,8", "0,8,16,24,32,40,48,56")
    assert measured["students/pd/steps-2"] == ("0", "0,32")
    assert measured["students/pd"] == measured["students/sot"] == measured["teacher"] == ("0",)
    assert measured["students/l2"] == recipe.few_steps


def test_steps_of_a_set() -> None:
    """Parts side by side, and the set after them. It is measured as any student."""
    lmm = DIGITS.students["l2"]
    recipe = replace(DIGITS, students={"lmm": DIGITS.main, "msd": replace(lmm, name="msd", subsets=3), "l2": lmm})
    check_recipe(recipe)
    found = {step.name: step for step in steps("unused", recipe)}
    parts = [f"students/msd/{number}" for number in range(3)]
    assert [name for name in found if "msd" in name] == [*parts, "students/msd"]
    assert all(found[name].after == ("pairs", "teacher") and found[name].side_by_side for name in parts)
    assert found["students/msd"].after == tuple(parts)
    assert "students/msd" in found["evaluation"].after
    assert "evaluation/students/msd" in found["evaluation"].folders
    assert recipe.students["msd"].trainings == tuple(parts)
    assert lmm.trainings == ("students/l2",)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"subsets": 11}, "student 'msd' has 11 subsets of classes, but teacher has 10 classes"),
        ({"name": "l2", "init": "students/msd"}, "student 'l2' starts from students/msd, which is a set of students"),
    ],
)
def test_recipes_that_cannot_work(changes: dict[str, Any], said: str) -> None:
    msd = replace(DIGITS.students["l2"], name="msd", subsets=2)
    students = {"lmm": DIGITS.main, "msd": msd} | {changes.get("name", "msd"): replace(msd, **{"subsets": 1, **changes})}
    with pytest.raises(BeelineError, match=said):
        check_recipe(replace(DIGITS, students=students))


def test_a_rehearsal_resumes_a_part_of_a_set(tmp_path: Path) -> None:
    """And it does not try a set if one of its parts has failed."""
    recipe = replace(DIGITS, students={"lmm": replace(DIGITS.main, subsets=2)})
    there = Workspace(str(tmp_path), recipe)
    found = {step.name: step for step in all_steps(there, there.place / "rehearsal", recipe, lambda name: True, random=False)}
    names = ["students/lmm/0", "students/lmm/0 (resumed)", "students/lmm/1", "students/lmm", "evaluation/teacher"]
    assert [name for name in found if "lmm" in name or name == "evaluation/teacher"] == names
    assert found["students/lmm"].after == ("students/lmm/0", "students/lmm/1")
    assert not any(name.startswith("sweeps") for name in found)
