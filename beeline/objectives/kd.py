"""Knowledge distillation (Luhman & Luhman 2021): the student maps the noise of a pair to its image, in one step.

    E |N(x0, sigma_max) - x1|^2

This is lines matching only at sigma_max, with squared pixel distance: the control that shows what the lines add.
"""

from __future__ import annotations

import dataclasses

import torch

from beeline.objectives import Batch, Context, Needs, Objective, ObjectiveConfig
from beeline.objectives.learner import Learner
from beeline.objectives.perceptual import l2
from beeline.sampling.few_step import FewStep
from beeline.schedule import SIGMA_MAX
from beeline.settings import Steps


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistillationConfig(ObjectiveConfig):
    """Knowledge distillation."""

    num_steps: Steps = 18
    """Levels of the schedule; the student is sampled at the first."""

    def needs(self) -> Needs:
        """Only pairs."""
        return Needs(pairs=True)

    def sampling(self) -> FewStep:
        """Sampling in one step from pure noise."""
        return FewStep(num_steps=self.num_steps, trained_steps=(0,))

    def about(self) -> str:
        """Describe the objective for the report."""
        return "end points alone: knowledge distillation, L2"

    def build(self, context: Context) -> Distillation:
        """Build the objective."""
        return Distillation()


class Distillation(Objective):
    """Training step of knowledge distillation."""

    def backward(
        self, student: Learner, critic: Learner | None, batch: Batch, generator: torch.Generator
    ) -> dict[str, torch.Tensor]:
        """Compute gradients. Figure: "distillation"."""
        assert batch.x1 is not None
        assert batch.noise is not None
        sigma = torch.full((batch.size,), SIGMA_MAX, device=batch.x1.device)
        loss = l2(student(SIGMA_MAX * batch.noise, sigma, batch.labels), batch.x1).mean()
        (batch.weight * loss).backward()
        return {"distillation": loss.detach()}
