"""Rectified flow on the teacher's pairs (Liu et al. 2023): reflow that straightens the teacher's ODE.

Between image x1 and unit-variance noise z, x_t = (1 - t) x1 + t z has the velocity z - x1, which the network predicts for t
uniform in (0, 1) (their eq. 1). Divided by 1 - t, x_t is x1 + sigma z with sigma = t / (1 - t). That is a denoiser's input,
whose output N implies the velocity (x_t - N) / t. So

    E |v(x_t, t) - (z - x1)|^2 = E |N(x1 + sigma z, sigma) - x1|^2 / t^2

and Euler's method on the velocity is the sampling rule "line". t ends where sigma is sigma_max.
"""

from __future__ import annotations

import dataclasses

import torch

from beeline.objectives import Batch, Context, Needs, Objective, ObjectiveConfig, lines
from beeline.objectives.learner import Learner
from beeline.objectives.perceptual import l2
from beeline.sampling.few_step import FewStep
from beeline.schedule import SIGMA_MAX, SIGMA_MIN
from beeline.settings import Steps


@dataclasses.dataclass(frozen=True, kw_only=True)
class RectifiedFlowConfig(ObjectiveConfig):
    """Rectified flow."""

    num_steps: Steps = 18
    """Levels of the schedule to which the indices of few-step schedules refer."""

    def needs(self) -> Needs:
        """Only pairs."""
        return Needs(pairs=True)

    def sampling(self) -> FewStep:
        """Sampling by Euler's method, at any levels."""
        return FewStep(num_steps=self.num_steps, rule="line", line="ve", trained_steps=None)

    def about(self) -> str:
        """Describe the objective for the report."""
        return "rectified flow on the same pairs"

    def build(self, context: Context) -> RectifiedFlow:
        """Build the objective."""
        return RectifiedFlow()


class RectifiedFlow(Objective):
    """Training step of velocity matching on straight lines."""

    def backward(
        self, student: Learner, critic: Learner | None, batch: Batch, generator: torch.Generator
    ) -> dict[str, torch.Tensor]:
        """Compute gradients. Figure: "velocity"."""
        assert batch.x1 is not None
        assert batch.noise is not None
        first, last = (sigma / (1 + sigma) for sigma in (SIGMA_MIN, SIGMA_MAX))
        t = first + (last - first) * torch.rand(batch.size, generator=generator, device=batch.x1.device)
        sigma = t / (1 - t)
        images = student(lines.point(batch.x1, batch.noise, sigma, "ve"), sigma, batch.labels)
        loss = (l2(images, batch.x1) / t.square()).mean()
        (batch.weight * loss).backward()
        return {"velocity": loss.detach()}
