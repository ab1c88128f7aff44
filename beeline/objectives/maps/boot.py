"""BOOT (Gu et al. 2023): one-step students bootstrapped from labels and noise, without images or pairs.

Along the teacher's ODE from noise z, x_s = y(z, s) + s z. Its signal y starts as 0 at s = sigma_max and ends as the image at
s = 0. The student has a second level and predicts y from pure noise:

    y(z, s) = (1 - s / sigma_max) g(sigma_max z, sigma_max, s)

This is a flow map's jump, so that y(z, sigma_max) = 0 without a boundary loss. One step of the teacher, from the student's own
point at level s to the next level u, gives the target:

    E (1 - u/s)^-2 d(y(z, u), sg[ODE(y(z, s) + s z, s -> u) - u z])

With Euler's method this is one step of their signal ODE dy / d ln s = y - D(y + s z, s), (u/s) y + (1 - u/s) D. The levels of
the schedule end with 0, where y is the image.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import torch

from beeline.objectives import Batch, Context, Needs, Objective, ObjectiveConfig
from beeline.objectives.distances import DISTANCES, DistanceSettings
from beeline.objectives.learner import Learner
from beeline.sampling.few_step import FewStep
from beeline.sampling.solvers import ode_step
from beeline.schedule import SIGMA_MAX, edm_sigmas
from beeline.settings import Steps


@dataclasses.dataclass(frozen=True, kw_only=True)
class BootConfig(DistanceSettings, ObjectiveConfig):
    """Data-free distillation with bootstrapping."""

    num_steps: Steps = 18
    """Levels of the schedule, and steps of the teacher's ODE."""
    solver: Literal["euler", "heun"] = "euler"
    """Solver of the teacher's step. "heun" allows fewer levels, and costs one more evaluation per training step."""

    def needs(self) -> Needs:
        """Noise and labels, the teacher, a student with a second level; the feature network of the distance."""
        return Needs(noise=True, models=("teacher",), features=self.distance_features, second_level=True)

    def sampling(self) -> FewStep:
        """Sampling in one step from pure noise: the jump to level 0."""
        return FewStep(num_steps=self.num_steps, rule="line", trained_steps=(0,))

    def about(self) -> str:
        """Describe the objective, like "BOOT, pixel distance (L2)"."""
        return f"BOOT, {DISTANCES[self.distance]}"

    def build(self, context: Context) -> Boot:
        """Build the objective."""
        return Boot(self, context)

    def representative(self) -> BootConfig:
        """Replace levels and weights by values that do not affect the cost."""
        return dataclasses.replace(self, num_steps=18, pixel_weight=0.0)


class Boot(Objective):
    """Training step of BOOT."""

    def __init__(self, config: BootConfig, context: Context) -> None:
        self.config, self.teacher = config, context.models["teacher"]
        self._distance = config.build_distance(context)

    def backward(
        self, student: Learner, critic: Learner | None, batch: Batch, generator: torch.Generator
    ) -> dict[str, torch.Tensor]:
        """Compute gradients. Figure: "boot"."""
        assert batch.noise is not None
        noise, labels, device = batch.noise, batch.labels, batch.noise.device
        levels = torch.cat([edm_sigmas(self.config.num_steps), torch.zeros(1)]).to(device=device, dtype=torch.float32)
        index = torch.randint(self.config.num_steps, (batch.size,), generator=generator, device=device)
        s, u = levels[index], levels[index + 1]
        start = torch.full((batch.size,), SIGMA_MAX, device=device)
        following = _signal(student(SIGMA_MAX * noise, start, labels, None, u), u)
        signal = _signal(student.target(SIGMA_MAX * noise, start, labels, None, s), s)
        before, after = s.reshape(-1, 1, 1, 1), u.reshape(-1, 1, 1, 1)
        end = ode_step(self.teacher, signal + before * noise, s, u, labels, solver=self.config.solver)
        loss = ((1 - u / s).pow(-2) * self._distance(following, end - after * noise)).mean()
        (batch.weight * loss).backward()
        return {"boot": loss.detach()}


def _signal(output: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
    """The signal y (B, C, H, W) at `level` (B,), from the network's output g (B, C, H, W)."""
    return (1 - level / SIGMA_MAX).reshape(-1, 1, 1, 1) * output
