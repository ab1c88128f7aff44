"""Students of other methods than the main one, trained on the same pairs at the same cost."""

from __future__ import annotations

from dataclasses import replace

from beeline.config import (
    PhaseConfig,
    StudentConfig,
)
from beeline.objectives.kd import DistillationConfig
from beeline.objectives.rectified_flow import RectifiedFlowConfig


def controls(student: StudentConfig, phase: PhaseConfig, num_steps: int) -> dict[str, StudentConfig]:
    """Return students of other methods, on the same pairs at the cost of `phase`: knowledge distillation and rectified flow."""
    methods = {
        "kd": ("distillation", DistillationConfig(num_steps=num_steps)),
        "rf": ("flow", RectifiedFlowConfig(num_steps=num_steps)),
    }
    return {
        name: replace(student, name=name, phases={called: replace(phase, objective=objective)})
        for name, (called, objective) in methods.items()
    }
