"""Guided distillation, stage 1 (Meng et al. 2023, section 3.1): one network learns guidance of all weights.

The student D(x, t, w) takes the weight w of guidance as an input, and learns the extrapolation of a teacher from a weaker model
(autoguidance; Karras et al. 2024):

    E lambda(t) |D(x_t, t, w) - [D*(x_t, t) + w (D*(x_t, t) - D_weak(x_t, t))]|^2,   x_t = x1 + t z,   w ~ U[0, w_max]

w = 0 is the teacher itself. lambda is EDM's weight; t is uniform in the time of the EDM schedule, so that all sampling steps
count equally. A step of the student costs one evaluation, one of guided sampling two. Stage 2 is progressive distillation with
`guidance_max` (progressive.py). Meng et al. guide by the difference of a conditional and an unconditional output, which takes a
teacher trained with label dropout; here any weaker model will do.
"""

from __future__ import annotations

import dataclasses

import torch

from beeline.augmentation import mirrored
from beeline.denoiser import Denoiser
from beeline.objectives import Batch, Context, Needs, Objective, ObjectiveConfig, lines
from beeline.objectives.learner import Learner
from beeline.objectives.perceptual import l2
from beeline.sampling.few_step import FewStep
from beeline.schedule import RHO, SIGMA_MAX, SIGMA_MIN
from beeline.settings import Amount, ModelPath, Positive, Settings, Steps, added

TEACHER = "teacher"


@dataclasses.dataclass(frozen=True, kw_only=True)
class GuidanceSettings(Settings):
    """Settings of a student that takes a weight of guidance. Configs of objectives inherit them."""

    guidance_max: Amount = added(0.0)
    """Largest weight in training; 0 means no guidance."""
    guidance: Amount = added(0.0)
    """Weight at which the student is sampled unless another one is asked for."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.guidance <= self.guidance_max, "guidance", f"at most guidance_max, {self.guidance_max:g}")

    def draw_weights(self, count: int, generator: torch.Generator) -> torch.Tensor:
        """Draw weights, float32 (count,), uniform from 0 to the largest, on the generator's device."""
        return self.guidance_max * torch.rand(count, generator=generator, device=generator.device)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GuidedConfig(GuidanceSettings, ObjectiveConfig):
    """Stage 1 of guided distillation."""

    weak: ModelPath
    """Folder of the weaker model, for example "students/weak"."""
    guidance_max: Positive = 4.0
    guidance: Amount = 1.0
    num_steps: Steps = 18
    """Levels of the schedule to which the indices of few-step schedules refer."""
    flip: bool = False
    """Mirror images at random, for data without a preferred side."""

    def needs(self) -> Needs:
        """Real images, the teacher and the weaker model."""
        return Needs(images=True, models=(TEACHER, self.weak), guidance=True)

    def sampling(self) -> FewStep:
        """Sampling by Euler's method, at any levels. The student follows an ODE, so solvers can sample it too."""
        return FewStep(num_steps=self.num_steps, rule="line", line="ve", trained_steps=None, guidance=self.guidance)

    def about(self) -> str:
        """Describe the objective, like "guidance by students/weak, weights up to 4"."""
        return f"guidance by {self.weak}, weights up to {self.guidance_max:g}"

    def build(self, context: Context) -> Guided:
        """Build the objective."""
        return Guided(self, context)

    def representative(self) -> GuidedConfig:
        """Replace settings that do not affect the cost by defaults."""
        return GuidedConfig(weak=self.weak)


class Guided(Objective):
    """Training step of stage 1."""

    def __init__(self, config: GuidedConfig, context: Context) -> None:
        self.config = config
        self._teacher, self._weak = context.models[TEACHER], context.models[config.weak]

    def backward(
        self, student: Learner, critic: Learner | None, batch: Batch, generator: torch.Generator
    ) -> dict[str, torch.Tensor]:
        """Compute gradients. Figure: "guided"."""
        assert batch.real is not None
        config, labels, device = self.config, batch.real_labels, batch.real.device
        images = mirrored(batch.real, generator) if config.flip else batch.real
        low, high = SIGMA_MIN ** (1 / RHO), SIGMA_MAX ** (1 / RHO)
        t = (low + torch.rand(batch.size, generator=generator, device=device) * (high - low)) ** RHO
        x = lines.point(images, torch.randn(images.shape, generator=generator, device=device), t, "ve")
        w = config.draw_weights(batch.size, generator)
        with torch.no_grad():
            strong = self._teacher(x, t, labels)
            target = strong + w.reshape(-1, 1, 1, 1) * (strong - self._weak(x, t, labels))
        weight = (t**2 + Denoiser.sigma_data**2) / (t * Denoiser.sigma_data) ** 2
        loss = (weight * l2(student(x, t, labels, None, None, w), target)).mean()
        (batch.weight * loss).backward()
        return {"guided": loss.detach()}
