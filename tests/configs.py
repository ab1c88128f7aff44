"""Restore configs from JSON."""

from __future__ import annotations

import importlib
import json
from typing import Any

from beeline.config import PhaseConfig, Recipe, StudentConfig, from_dict, to_dict
from beeline.objectives import ObjectiveConfig


def restored(config: Any) -> Any:
    """Restore `config` from its JSON."""
    return from_dict(type(config), with_objectives(config, json.loads(json.dumps(to_dict(config)))))


def with_objectives(config: Any, values: dict[str, Any]) -> dict[str, Any]:
    """Convert `values`, those of `config`, to the form that `from_dict` expects: JSON only names the classes of objectives, so
    they are built here."""
    if isinstance(config, Recipe):
        students = {name: with_objectives(student, values["students"][name]) for name, student in config.students.items()}
        return values | {"students": students}
    if isinstance(config, StudentConfig):
        phases = {name: with_objectives(phase, values["phases"][name]) for name, phase in config.phases.items()}
        return values | {"phases": phases}
    if isinstance(config, PhaseConfig):
        kind = type(config.objective)
        return values | {"objective": from_dict(kind, with_objectives(config.objective, values["objective"]))}
    if isinstance(config, ObjectiveConfig):
        module, _, name = values["method"].partition(":")
        assert getattr(importlib.import_module(module), name) is type(config)
        return {key: value for key, value in values.items() if key != "method"}
    return values
