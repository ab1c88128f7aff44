"""Progressive distillation (Salimans & Ho 2022): each round halves the number of sampling steps.

The N levels of the schedule, followed by level 0, make N steps. The student of a round with M steps jumps N/M levels at once,
from t to s. The model that the round starts from is its teacher. It reaches level s in two steps, over the level u halfway,
at the point y. The student learns the denoiser output whose Euler step from t to s ends at y (their algorithm 2):

    E max(1, 1/t^2) d(N(x_t, t), (t y - s x_t) / (t - s)),   x_t = x1 + t z

The weight is the truncated SNR of their section 4. After the round, the rule "line" makes the student's M steps. One round is
one phase of a student with `phase_switch` "restart"; `rounds` lists them.

With `guidance_max`, the models take a weight of guidance (guided.py). Each row gets a random one, the same for teacher and
student (Meng et al. 2023, section 3.2).
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from typing import Literal

import torch
from torch import nn

from beeline.augmentation import mirrored
from beeline.config.training import PhaseConfig
from beeline.objectives import Batch, Context, Needs, Objective, ObjectiveConfig, lines
from beeline.objectives.distances import DISTANCES, DistanceSettings
from beeline.objectives.learner import Learner
from beeline.objectives.maps.guided import GuidanceSettings
from beeline.objectives.optimizer import OptimizerConfig
from beeline.sampling.few_step import FewStep
from beeline.sampling.solvers import ode_step
from beeline.schedule import edm_sigmas
from beeline.settings import Steps


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProgressiveConfig(DistanceSettings, GuidanceSettings, ObjectiveConfig):
    """One round of progressive distillation."""

    steps: Steps
    """Sampling steps of the student after this round."""
    num_steps: Steps = 16
    """Levels of the schedule, a multiple of twice `steps`. It is the same in all rounds."""
    solver: Literal["euler", "heun"] = "euler"
    """Solver of the two steps of this round's teacher. "euler" makes the steps that the student of the round before was
    trained for. "heun" is more accurate in the first round, where the teacher follows the ODE, and costs twice as much."""
    flip: bool = False
    """Mirror images at random, for data without a preferred side."""

    def __post_init__(self) -> None:
        super().__post_init__()
        multiple = self.num_steps % (2 * self.steps) == 0
        self.require(multiple, "num_steps", f"a multiple of twice steps, {2 * self.steps}")

    @property
    def trained_steps(self) -> tuple[int, ...]:
        """Indices of the levels at which the student's steps start."""
        return tuple(range(0, self.num_steps, self.num_steps // self.steps))

    def needs(self) -> Needs:
        """Real images; the feature network of the distance."""
        return Needs(images=True, features=self.distance_features, guidance=self.guidance_max > 0)

    def sampling(self) -> FewStep:
        """Sampling in the steps of this round, or in a part of them."""
        return FewStep(
            num_steps=self.num_steps, rule="line", line="ve", trained_steps=self.trained_steps, guidance=self.guidance
        )

    def about(self) -> str:
        """Describe the objective, like "progressive distillation to 4 steps, pixel distance (L2)"."""
        guided = ", guided" if self.guidance_max else ""
        return f"progressive distillation to {self.steps} step{'s' * (self.steps > 1)}{guided}, {DISTANCES[self.distance]}"

    def build(self, context: Context) -> Progressive:
        """Build the objective. Its teacher is the student's average at this moment."""
        return Progressive(self, context)

    def representative(self) -> ProgressiveConfig:
        """Replace levels and weights by values that do not affect the cost."""
        weights = {"guidance_max": float(self.guidance_max > 0), "guidance": 0.0}
        return dataclasses.replace(self, steps=1, num_steps=2, flip=False, pixel_weight=0.0, **weights)


class Progressive(Objective):
    """Training step of a round of progressive distillation."""

    def __init__(self, config: ProgressiveConfig, context: Context) -> None:
        self.config = config
        self.teacher = copy.deepcopy(context.average)
        self._distance = config.build_distance(context)

    def backward(
        self, student: Learner, critic: Learner | None, batch: Batch, generator: torch.Generator
    ) -> dict[str, torch.Tensor]:
        """Compute gradients. Figure: "progressive"."""
        assert batch.real is not None
        config, device, labels = self.config, batch.real.device, batch.real_labels
        images = mirrored(batch.real, generator) if config.flip else batch.real
        levels = torch.cat([edm_sigmas(config.num_steps), torch.zeros(1)]).to(device=device, dtype=torch.float32)
        stride = config.num_steps // config.steps
        start = stride * torch.randint(config.steps, (batch.size,), generator=generator, device=device)
        t, u, s = (levels[start + ahead] for ahead in (0, stride // 2, stride))
        x = lines.point(images, torch.randn(images.shape, generator=generator, device=device), t, "ve")
        inputs = (None, None, config.draw_weights(batch.size, generator)) if config.guidance_max else ()

        def teacher(x: torch.Tensor, sigma: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
            return self.teacher(x, sigma, labels, *inputs)

        with student.autocast():
            halfway = ode_step(teacher, x, t, u, labels, solver=config.solver)
            end = ode_step(teacher, halfway, u, s, labels, solver=config.solver)
        from_, to = t.reshape(-1, 1, 1, 1), s.reshape(-1, 1, 1, 1)
        target = (from_ * end - to * x) / (from_ - to)
        loss = (t.pow(-2).clamp_min(1) * self._distance(student(x, t, labels, *inputs), target)).mean()
        (batch.weight * loss).backward()
        return {"progressive": loss.detach()}

    def state(self) -> nn.Module:
        """The round's teacher: a resumed round continues with the one that it started with."""
        return self.teacher


def rounds(first: ProgressiveConfig, iterations: Sequence[int], optimizer: OptimizerConfig) -> dict[str, PhaseConfig]:
    """Return a phase for each entry of `iterations`, by the names "steps-8", "steps-4" and so on.

    Each round has half the steps of the one before, from `first` on. Rounds after it use "euler". All start with `optimizer`.
    """
    each = [first, *(dataclasses.replace(first, steps=first.steps >> k, solver="euler") for k in range(1, len(iterations)))]
    return {
        f"steps-{objective.steps}": PhaseConfig(iterations=count, optimizer=optimizer, objective=objective)
        for objective, count in zip(each, iterations, strict=True)
    }
