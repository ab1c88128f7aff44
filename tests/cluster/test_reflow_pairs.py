"""Steps of recipes whose students depend on each other."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from beeline.config import Recipe
from beeline.errors import BeelineError
from beeline.objectives.kd import DistillationConfig
from beeline.recipes import RECIPES
from cluster.planning.stages import stages
from cluster.planning.workspace import Workspace
from cluster.rehearsal.shrink import shrunk, verification
from cluster.steps import check_recipe, steps


def with_reflow() -> Recipe:
    """The digits, with a student that distils the rectified flow's own pairs, another on the same pairs, and a chained one."""
    recipe = RECIPES["digits"](0)
    baselines = RECIPES["digits_methods"](0).students
    recipe = replace(recipe, students=recipe.students | {name: baselines[name] for name in ("kd", "rf")})
    kd = recipe.students["kd"]
    more = {
        "rf_distilled": replace(kd, name="rf_distilled", init="students/rf", pairs="students/rf"),
        "kd_reflowed": replace(kd, name="kd_reflowed", pairs="students/rf"),
        "chained": replace(kd, name="chained", init="students/kd_reflowed"),
    }
    return replace(recipe, students=recipe.students | more)


def test_pairs_are_made_after_their_model_and_before_the_first_student_that_reads_them() -> None:
    recipe = with_reflow()
    check_recipe(recipe)
    order = {step.name: step for step in steps("ws", recipe)}
    names = list(order)
    first = names.index("students/rf/pairs")
    assert names[first - 1 : first + 4] == [
        "students/rf", "students/rf/pairs", "students/rf_distilled", "students/kd_reflowed", "students/chained",
    ]  # fmt: skip
    assert names.count("students/rf/pairs") == 1
    assert order["students/rf/pairs"].after == ("students/rf",)
    assert order["students/rf_distilled"].after == ("students/rf/pairs", "students/rf")
    assert order["students/kd"].after == ("pairs", "teacher")
    alone = {"students/lmm"}
    assert {name for name in names if name.startswith("students/") and not order[name].side_by_side} == alone


def test_reflow_is_planned_and_rehearsed(tmp_path: Path) -> None:
    recipe = with_reflow()
    (stage,) = (
        stage for stage in stages(recipe, Workspace(str(tmp_path), recipe), "train") if stage.name == "students/rf/pairs"
    )
    assert stage.work == "2,500 pairs of 15 evaluations"
    assert stage.jobs[0].need.stage == "students/rf/pairs"
    small = shrunk(recipe, cpu=True)
    made = small.pairs_of("students/rf")
    assert (made.model, made.count, made.num_steps) == ("students/rf", small.pairs.count, 3)
    assert verification(made).model == "students/rf"
    calibrated = replace(recipe, pairs=replace(recipe.pairs, solver="calibrated"))
    assert calibrated.pairs_of("students/rf").solver == "heun"
    assert calibrated.pairs_of("teacher") == calibrated.pairs


def test_students_that_cannot_be_made_in_this_order_are_refused() -> None:
    recipe = with_reflow()
    backwards = replace(recipe, students=dict(reversed(recipe.students.items())))
    with pytest.raises(BeelineError, match=r"'chained' needs students/kd_reflowed, which the recipe does not train before it"):
        check_recipe(backwards)
    endless = recipe.students | {"kd": replace(recipe.students["kd"], pairs="students/kd")}
    with pytest.raises(BeelineError, match="'kd' needs students/kd"):
        check_recipe(replace(recipe, students=endless))
    last = replace(recipe.students["kd_reflowed"], pairs="students/kd")
    assert isinstance(next(iter(last.phases.values())).objective, DistillationConfig)
    with pytest.raises(BeelineError, match="follows no ODE"):
        check_recipe(replace(recipe, students=recipe.students | {"kd_reflowed": last}))
