"""The step schedules at which the pipeline measures students."""

from __future__ import annotations

from dataclasses import replace

from beeline.objectives.progressive import ProgressiveConfig, rounds
from beeline.recipes import RECIPES
from cluster.steps import models


def test_a_student_of_single_levels_is_measured_at_them() -> None:
    """After each round of progressive distillation at its own steps; other students as the recipe says."""
    recipe = RECIPES["digits"](0)
    optimizer = recipe.main.phases["reconstruction"].optimizer
    phases = rounds(ProgressiveConfig(steps=32, num_steps=64), (1,) * 6, optimizer)
    recipe = replace(recipe, students=recipe.students | {"pd": replace(recipe.main, name="pd", phases=phases)})
    measured = models(recipe)
    assert measured["students/pd/steps-32"] == ("0",)  # too long for a file's name
    assert measured["students/pd/steps-8"] == ("0", "0,8,16,24,32,40,48,56")
    assert measured["students/pd/steps-2"] == ("0", "0,32")
    assert measured["students/pd"] == measured["students/kd"] == measured["teacher"] == ("0",)
    assert measured["students/rf"] == recipe.few_steps
