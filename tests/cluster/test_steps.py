"""Step schedules that each student of a recipe is measured at."""

from __future__ import annotations

from dataclasses import replace

import pytest
from methods import ConsistencyConfig

from beeline.errors import BeelineError
from beeline.objectives import ObjectiveConfig
from beeline.objectives.kd import DistillationConfig
from beeline.objectives.lmm import LinesMatchingConfig
from beeline.objectives.maps.progressive import ProgressiveConfig, rounds
from beeline.objectives.rectified_flow import RectifiedFlowConfig
from beeline.recipes import RECIPES
from beeline.sampling.few_step import FewStep
from cluster.steps import check_recipe, models

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
