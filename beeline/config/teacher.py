"""Settings of a teacher."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from beeline.config.networks import NetworkConfig
from beeline.config.serialization import to_dict
from beeline.config.training import PhaseConfig, TrainingConfig
from beeline.objectives.edm import EDMConfig
from beeline.objectives.optimizer import OptimizerConfig
from beeline.settings import Amount, Count, Share


@dataclasses.dataclass(frozen=True, kw_only=True)
class TeacherConfig(TrainingConfig):
    """EDM training of the teacher: one phase of denoising score matching, from random weights."""

    network: NetworkConfig
    iterations: Count
    """Training steps."""
    optimizer: OptimizerConfig
    ema_half_life: Amount
    """Half-life of the average of the weights, in iterations."""
    ema_ramp: Share = 0.05
    """Upper limit of the half-life, as a share of the iterations so far (EDM's ramp-up); 0 for no limit."""
    flip: bool = False
    """Mirror images at random, for data without a preferred side."""
    augment: Share = 0.0
    """Probability of each non-leaking augmentation; needs a network with augment_dim 9. 0 disables it."""

    @property
    def name(self) -> str:
        """Name of the teacher's folder."""
        return "teacher"

    @property
    def compiled(self) -> bool:
        """False: training of a teacher is never compiled."""
        return False

    @property
    def phase_switch(self) -> Literal["continue", "restart"]:
        """Unused: a teacher has one phase."""
        return "continue"

    @property
    def running(self) -> dict[str, PhaseConfig]:
        """The one phase."""
        objective = EDMConfig(flip=self.flip, augment=self.augment)
        return {"denoising": PhaseConfig(iterations=self.iterations, optimizer=self.optimizer, objective=objective)}

    @property
    def half_lives(self) -> tuple[float, ...]:
        """Half-life of the only average, which is the teacher."""
        return (self.ema_half_life,)

    def record(self, phase: str) -> dict[str, Any]:
        """All settings except resources."""
        return {"trained": to_dict(self, resources=False)}
