"""Knowledge distillation (Luhman & Luhman 2021): the student maps the noise of a pair to its image, in one step, by L2.

It is what lines matching is without lines: the same pairs, the end points alone. The control for what the lines bring.
"""

from __future__ import annotations

import torch

from beeline.config import LmmConfig, PhaseConfig
from beeline.learner import Learner
from beeline.objectives import Batch, Needs, Setting
from beeline.perceptual import l2
from beeline.samplers import FewStep
from beeline.schedule import SIGMA_MAX


class Distillation:
    """E |N(x0, sigma_max) - x1|^2 over the pairs. Of the phase's settings it follows those of the optimiser alone."""

    critic = None

    @staticmethod
    def needs(config: LmmConfig, phase: PhaseConfig) -> Needs:
        """Pairs."""
        return Needs(pairs=True)

    def __init__(self, setting: Setting) -> None:
        self.config = setting.config

    @property
    def few_step(self) -> FewStep:
        """One step from pure noise."""
        return FewStep(num_steps=self.config.num_steps, trained_steps=(0,))

    def backward(
        self, student: Learner, critic: Learner | None, batch: Batch, generator: torch.Generator
    ) -> dict[str, torch.Tensor]:
        assert batch.x1 is not None
        assert batch.noise is not None
        sigma = torch.full((len(batch.x1),), SIGMA_MAX, device=batch.x1.device)
        loss = l2(student(SIGMA_MAX * batch.noise, sigma, batch.labels), batch.x1).mean()
        (batch.weight * loss).backward()
        return {"distillation": loss.detach()}
