"""The objectives of all students of the method recipes, small enough for tests: in features of the probe, with short cycles."""

from __future__ import annotations

import dataclasses
from dataclasses import replace
from typing import Any

from beeline.config import PhaseConfig, StudentConfig
from beeline.objectives import ObjectiveConfig
from beeline.objectives.discriminator import DiscriminatorConfig
from beeline.objectives.maps.progressive import ProgressiveConfig
from beeline.objectives.optimizer import OptimizerConfig
from beeline.recipes import RECIPES

SMALL: dict[str, Any] = {"resize": 0, "solver_steps": 2, "fake_steps": 2, "queue": 64}
"""Replaces larger settings of objectives that have them."""


def objectives(*recipes: str) -> dict[str, ObjectiveConfig]:
    """The objectives that differ, by name: "<student>", or "<student>-<phase>" for students of several phases."""
    found: dict[ObjectiveConfig, str] = {}
    for recipe in recipes:
        for student in RECIPES[recipe](0).students.values():
            for name, phase in student.phases.items():
                label = student.name if len(student.phases) == 1 else f"{student.name}-{name}"
                found.setdefault(small(phase.objective), label)
    return {name: objective for objective, name in found.items()}


def small(objective: ObjectiveConfig) -> ObjectiveConfig:
    """The same objective in features of the probe, without networks that need downloads."""
    settings: dict[str, Any] = {field.name: getattr(objective, field.name) for field in dataclasses.fields(objective)}
    changes: dict[str, Any] = {name: value for name, value in SMALL.items() if settings.get(name, 0) > value}
    if str(settings.get("distance")).startswith(("lpips", "johnson")):
        changes["distance"] = "probe"
    if "networks" in settings:
        changes["networks"] = ("probe",)
    if isinstance(critic := settings.get("discriminator"), DiscriminatorConfig):
        changes["discriminator"] = replace(critic, networks=("probe", "scratch"), width=8)
    if isinstance(objective, ProgressiveConfig):
        changes |= {"steps": 2, "num_steps": 8}
    return replace(objective, **changes)


def training(objective: ObjectiveConfig, **changes: Any) -> StudentConfig:
    """A training of this objective alone on the workspace of small.py."""
    phase = PhaseConfig(iterations=100, optimizer=OptimizerConfig(lr=1e-3), objective=objective)
    init = "students/lmm" if objective.needs().guess else "teacher"
    return StudentConfig(
        **{"name": "tried", "init": init, "phases": {"only": phase}, "batch_size": 8, "ema_half_lives": (3.0, 30.0)} | changes
    )
