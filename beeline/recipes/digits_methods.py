"""All methods on digits: each trains from the same teacher, at the same cost, and is compared with the others."""

from __future__ import annotations

from dataclasses import replace

from beeline.config import PhaseConfig, Recipe, StudentConfig
from beeline.recipes.digits import digits
from beeline.recipes.methods import baselines

LONG = "_3x"
"""Suffix of the students that train three times as long."""


def digits_methods(seed: int = 0) -> Recipe:
    """Digits with a student of every method, at a short budget and, with the suffix _3x, at three times that."""
    recipe = digits(seed)
    short = _students(recipe.students["l2"])
    long = {f"{name}{LONG}": three_times(student) for name, student in short.items()}
    return replace(recipe, name="digits_methods", students=short | long)


def three_times(student: StudentConfig) -> StudentConfig:
    """The same student with three times the iterations of each phase."""

    def longer(phase: PhaseConfig) -> PhaseConfig:
        return replace(phase, iterations=3 * phase.iterations)

    phases = {name: longer(phase) for name, phase in student.phases.items()}
    return replace(student, name=f"{student.name}{LONG}", phases=phases)


def _students(base: StudentConfig) -> dict[str, StudentConfig]:
    (phase,) = base.phases.values()
    return baselines(base, replace(phase, iterations=250))
