"""MeanFlow (Geng et al. 2025): a flow map trained from images alone, without a teacher.

The student predicts the average velocity U of the jump from level t to level s. The map of the data's ODE solves

    U = v - (tau - tau_s) dU/dtau                                                                              (eq. 6)

U is regressed on the right-hand side, with the velocity z - x1 of the line through the noisy image x_t = x1 + t z for v, there
and in dU/dtau (eq. 9 and 10). Its mean, given x_t, is the ODE's velocity. For s = t this is flow matching. The mathematics of a
denoiser's output is in flow_map.py: the tangent with ref = x1 and r = 1.
"""

from __future__ import annotations

import dataclasses

import torch

from beeline.augmentation import mirrored
from beeline.objectives import Batch, Context, Needs, Objective, ObjectiveConfig, lines
from beeline.objectives.derivative import Derivative
from beeline.objectives.learner import Learner
from beeline.objectives.maps import flow_map
from beeline.objectives.maps.flow_map import LevelPairSettings
from beeline.sampling.few_step import FewStep
from beeline.settings import Share, Steps


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeanFlowConfig(LevelPairSettings, ObjectiveConfig):
    """MeanFlow. The defaults are those of the authors' CIFAR-10 run."""

    num_steps: Steps = 18
    """Levels of the schedule to which the indices of few-step schedules refer."""
    same: Share = 0.25
    power: Share = 0.75
    """p of the adaptive weight 1 / (|h|^2 + 1e-3)^p."""
    flip: bool = False
    """Mirror images at random, for data without a preferred side."""
    derivative: Derivative = "difference"

    def needs(self) -> Needs:
        """Real images, and a student with a second level."""
        return Needs(images=True, second_level=True)

    def sampling(self) -> FewStep:
        """Sampling by jumps, between any levels."""
        return FewStep(num_steps=self.num_steps, rule="line", line="ve", trained_steps=None)

    def about(self) -> str:
        """Name of the method, for logs and report."""
        return "flow map from images (MeanFlow)"

    def build(self, context: Context) -> MeanFlow:
        """Build the objective."""
        return MeanFlow(self)

    def representative(self) -> MeanFlowConfig:
        """Only the kind of derivative affects the cost."""
        return MeanFlowConfig(derivative=self.derivative)


class MeanFlow(Objective):
    """Training step of MeanFlow."""

    def __init__(self, config: MeanFlowConfig) -> None:
        self.config = config

    def backward(
        self, student: Learner, critic: Learner | None, batch: Batch, generator: torch.Generator
    ) -> dict[str, torch.Tensor]:
        """Compute gradients. Figures: "tangent", the root mean square of h, and "loss"."""
        assert batch.real is not None
        config, labels = self.config, batch.real_labels
        images = mirrored(batch.real, generator) if config.flip else batch.real
        t, s = config.draw(batch.size, generator)
        noise = torch.randn(images.shape, generator=generator, device=images.device)
        x = lines.point(images, noise, t, "ve")
        g = student(x, t, labels, None, s)
        _, rate = student.rate(x, t, labels, x - images, to=s, derivative=config.derivative, value=g.detach())
        tangent = -flow_map.residual(g.detach(), rate, images, t, s) / flow_map.column(flow_map.to_tau(t))
        loss = flow_map.regression(g, tangent, t, config.power).mean()
        (batch.weight * loss).backward()
        return {"tangent": tangent.square().mean().sqrt(), "loss": loss.detach()}
