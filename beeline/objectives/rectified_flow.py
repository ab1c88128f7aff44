"""Rectified flow on the teacher's pairs (Liu et al. 2023): reflow, with the teacher's ODE as the flow that is straightened.

Between image x1 and unit-variance noise z, x_t = (1 - t) x1 + t z has the velocity z - x1, which is to be predicted for t
uniform in (0, 1) (eq. 1 there). Divided by 1 - t, x_t is x1 + sigma z with sigma = t / (1 - t): a denoiser's input, whose
output N implies the velocity (x_t - N) / t. So

    E |v(x_t, t) - (z - x1)|^2 = E |N(x1 + sigma z, sigma) - x1|^2 / t^2

and Euler's method on the velocity is the sampling rule "line". t ends where sigma is sigma_max.
"""

from __future__ import annotations

import torch

from beeline import lines
from beeline.config import LmmConfig, PhaseConfig
from beeline.learner import Learner
from beeline.objectives import Batch, Needs, Setting
from beeline.perceptual import l2
from beeline.samplers import FewStep
from beeline.schedule import SIGMA_MAX, SIGMA_MIN


class RectifiedFlow:
    """Velocity matching on straight lines. Of the phase's settings it follows those of the optimiser alone."""

    critic = None

    @staticmethod
    def needs(config: LmmConfig, phase: PhaseConfig) -> Needs:
        """Pairs."""
        return Needs(pairs=True)

    def __init__(self, setting: Setting) -> None:
        self.config = setting.config

    @property
    def few_step(self) -> FewStep:
        """Euler's method, on any levels."""
        return FewStep(num_steps=self.config.num_steps, rule="line", line="ve", trained_steps=None)

    def backward(
        self, student: Learner, critic: Learner | None, batch: Batch, generator: torch.Generator
    ) -> dict[str, torch.Tensor]:
        assert batch.x1 is not None
        assert batch.noise is not None
        first, last = (sigma / (1 + sigma) for sigma in (SIGMA_MIN, SIGMA_MAX))
        t = first + (last - first) * torch.rand(len(batch.x1), generator=generator, device=batch.x1.device)
        sigma = t / (1 - t)
        seen = student(lines.point(batch.x1, batch.noise, sigma, "ve"), sigma, batch.labels)
        loss = (l2(seen, batch.x1) / t.square()).mean()
        (batch.weight * loss).backward()
        return {"velocity": loss.detach()}
