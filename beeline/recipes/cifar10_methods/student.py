"""A student of one phase, with the optimiser that most of the papers share."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from beeline.config import OptimizerConfig, PhaseConfig, StudentConfig
from beeline.objectives import ObjectiveConfig
from beeline.objectives.discriminator import DiscriminatorConfig
from beeline.objectives.lmm import LinesMatchingConfig


def student(
    base: StudentConfig,
    name: str,
    objective: ObjectiveConfig,
    iterations: int,
    *,
    lr: float,
    decay: float = 0.9999,
    optimizer: dict[str, Any] | None = None,
    **changes: Any,
) -> StudentConfig:
    """Build a student of one phase, RAdam without clipping unless `optimizer` says otherwise, and an average with this decay
    per iteration."""
    settings = OptimizerConfig(**({"kind": "radam", "lr": lr, "clip": 0} | (optimizer or {})))
    phase = PhaseConfig(iterations=iterations, optimizer=settings, objective=objective)
    half_life = round(math.log(0.5) / math.log(decay), 1)
    return replace(base, name=name, phases={"training": phase}, ema_half_lives=(half_life,), **changes)


def discriminator_of(base: StudentConfig) -> DiscriminatorConfig:
    """Return the discriminator of the main student: CTM's."""
    adversarial = base.phases["adversarial"].objective
    assert isinstance(adversarial, LinesMatchingConfig)
    return adversarial.discriminator
