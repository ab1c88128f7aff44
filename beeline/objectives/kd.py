"""Knowledge distillation (Luhman & Luhman 2021): the student maps the noise of a pair to its image, in one step.

    E |N(x0, sigma_max) - x1|^2

It is lines matching at sigma_max alone, in squared pixel distance: the control for what the lines bring.
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
    """Levels of the schedule whose first level the student is sampled at."""

    def needs(self) -> Needs:
        """Pairs."""
        return Needs(pairs=True)

    def sampling(self) -> FewStep:
        """One step from pure noise."""
        return FewStep(num_steps=self.num_steps, trained_steps=(0,))

    def about(self) -> str:
        """As the report shows it."""
        return "end points alone: knowledge distillation, L2"

    def build(self, context: Context) -> Distillation:
        """The objective."""
        return Distillation()


class Distillation(Objective):
    """A step of knowledge distillation."""

    def backward(
        self, student: Learner, critic: Learner | None, batch: Batch, generator: torch.Generator
    ) -> dict[str, torch.Tensor]:
        """The figure "distillation"."""
        assert batch.x1 is not None
        assert batch.noise is not None
        sigma = torch.full((batch.size,), SIGMA_MAX, device=batch.x1.device)
        loss = l2(student(SIGMA_MAX * batch.noise, sigma, batch.labels), batch.x1).mean()
        (batch.weight * loss).backward()
        return {"distillation": loss.detach()}
