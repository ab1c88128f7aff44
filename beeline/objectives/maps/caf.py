"""Constant acceleration flow (CAF; Park et al. 2024): the student learns the acceleration of curves from noise to images.

Curves start towards a first guess y = D_V(sigma_max z; sigma_max) of the frozen network V, and end at the image x1 of a pair
(curves.py). Their acceleration 2 (x1 - z - v0) is constant. On a curve with known v0, the denoiser's output N implies it, and

    E |acceleration - 2 (x1 - z - v0)|^2 / 4 = E |N(x_T, sigma; y) - x1|^2 / (1 - T^2)^2

with T uniform. Distances in features are divided by 1 - T^2. The network takes y as further input channels. V is the student's
`init`, a student of one step: of knowledge distillation, or a rectified flow. The rule "acceleration" makes N steps with N + 1
evaluations, one of them for the guess.
"""

from __future__ import annotations

import dataclasses

import torch

from beeline.denoiser import Denoiser
from beeline.objectives import Batch, Context, Needs, Objective, ObjectiveConfig
from beeline.objectives.adversarial import AdversarialSettings
from beeline.objectives.distances import DISTANCES, DistanceSettings
from beeline.objectives.learner import Learner
from beeline.objectives.maps import curves
from beeline.sampling.few_step import ACCELERATION, FewStep
from beeline.schedule import SIGMA_MAX, SIGMA_MIN, edm_sigmas
from beeline.settings import Index, Some, Steps


@dataclasses.dataclass(frozen=True, kw_only=True)
class AccelerationConfig(DistanceSettings, AdversarialSettings, ObjectiveConfig):
    """Constant acceleration flow: the phase of the acceleration. Its student's `init` makes the guess."""

    num_steps: Steps = 18
    """Levels of the schedule to which indices refer."""
    steps: Some[Index] | None = None
    """Schedule indices to train at, as in sampling-optimised training; None for all T."""

    def __post_init__(self) -> None:
        super().__post_init__()
        fits = self.steps is None or (self.steps[0] == 0 and max(self.steps) < self.num_steps)
        self.require(fits, "steps", f"indices from 0 on, below num_steps, {self.num_steps}")

    def needs(self) -> Needs:
        """Pairs and the guess; real images for the adversarial term; feature networks of distance and discriminator."""
        names = dict.fromkeys((*self.distance_features, *self.adversarial_features))
        return Needs(pairs=True, images=self.adversarial_weight > 0, features=tuple(names), guess=True)

    def sampling(self) -> FewStep:
        """Sampling along curves, with an evaluation for the guess."""
        return FewStep(num_steps=self.num_steps, rule=ACCELERATION, trained_steps=self.steps, guess=True)

    def about(self) -> str:
        """Describe the objective, like "constant acceleration flow, pixel distance (L2)"."""
        parts = ["constant acceleration flow", DISTANCES[self.distance], *["adversarial term"] * (self.adversarial_weight > 0)]
        return ", ".join([*parts, *([] if self.steps is None else [f"at steps {','.join(map(str, self.steps))}"])])

    def build(self, context: Context) -> Acceleration:
        """Build the objective, with a discriminator if there is an adversarial term."""
        return Acceleration(self, context)

    def representative(self) -> AccelerationConfig:
        """Replace settings that do not affect the cost by defaults."""
        return dataclasses.replace(
            self,
            num_steps=18,
            steps=None,
            pixel_weight=0.0,
            **self.adversarial_cost,
        )


class Acceleration(Objective):
    """Training step of constant acceleration flow."""

    def __init__(self, config: AccelerationConfig, context: Context) -> None:
        self.config = config
        self._distance = config.build_distance(context)
        self.adversary = config.build_adversary(context)
        if self.adversary is not None:
            self.critic, self.critic_optimizer = self.adversary.discriminator, self.adversary.optimizer

    def backward(
        self, student: Learner, critic: Learner | None, batch: Batch, generator: torch.Generator
    ) -> dict[str, torch.Tensor]:
        """Compute gradients. Figures: "acceleration" and, with a discriminator, its own."""
        assert batch.x1 is not None
        assert batch.noise is not None
        guess = first_guess(student, batch.noise, batch.labels)
        sigma = self._levels(batch.size, generator)
        x = curves.point(batch.x1, guess, batch.noise, sigma)
        images = student(x, sigma, batch.labels, None, None, None, guess)
        weight = 1 / (1 - curves.time(sigma) ** 2)
        squared = self.config.distance == "l2"
        loss = (self._distance(images, batch.x1) * (weight**2 if squared else weight)).mean()
        figures = {"acceleration": loss.detach()}
        if critic is None:
            (batch.weight * loss).backward()
            return figures
        assert self.adversary is not None
        return figures | self.adversary.backward(student, critic, images, batch.labels, loss, batch, generator)

    def _levels(self, count: int, generator: torch.Generator) -> torch.Tensor:
        """Draw levels, float32 (count,): of `steps`, or of a uniform T."""
        device = generator.device
        if self.config.steps is not None:
            levels = edm_sigmas(self.config.num_steps)[list(self.config.steps)].to(device=device, dtype=torch.float32)
            return levels[torch.randint(len(levels), (count,), generator=generator, device=device)]
        t = torch.rand(count, generator=generator, device=device)
        return curves.level(t).clamp(SIGMA_MIN, SIGMA_MAX)


@torch.no_grad()
def first_guess(student: Learner, noise: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
    """The guess y, float32 (B, C, H, W), of the student's frozen network, from unit-variance `noise` (B, C, H, W)."""
    assert isinstance(student.model, Denoiser)
    assert student.model.guess is not None
    with student.autocast():
        return student.model.guess(SIGMA_MAX * noise, torch.full((len(noise),), SIGMA_MAX, device=noise.device), labels)
