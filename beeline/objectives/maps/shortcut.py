"""Shortcut models (Frans et al. 2025): one step of a flow map equals two steps of half the size.

In time tau = t / (1 + t) of the segment between image and noise, a step goes from tau to tau - d, d = tau_max / 2^k. A share of
the batch learns the ODE's velocity (d = 0); the rest learns the mean velocity of two half steps of the student's average:

    y = G(G(x_t, t -> m), m -> s),    g(x_t, t, s) -> sg (y - (s/t) x_t) / (1 - s/t),    weight 1 / tau^2

where G(x, t -> s) = (s/t) x + (1 - s/t) g(x, t, s). The weight makes it their squared error of velocities (eq. 5). The smallest
half steps, of size tau_max / 2^sizes, ask the student for the velocity, as theirs do.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated, Literal

import torch

from beeline.objectives import Batch, Context, Needs, Objective, ObjectiveConfig, lines
from beeline.objectives.learner import Learner
from beeline.objectives.maps.flow_map import jump
from beeline.objectives.perceptual import l2
from beeline.sampling.few_step import FewStep
from beeline.schedule import SIGMA_MAX, SIGMA_MIN
from beeline.settings import Range, Share, Steps

END = SIGMA_MAX / (1 + SIGMA_MAX)
TEACHER = "teacher"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShortcutConfig(ObjectiveConfig):
    """Shortcut models. `sizes` and `bootstrap` are by default those of the published code."""

    num_steps: Steps = 18
    """Levels of the schedule to which the indices of few-step schedules refer."""
    sizes: Annotated[int, Range(1, 12)] = 7
    """Halvings of the time range: the smallest half step is 1 / 2^sizes of it."""
    bootstrap: Share = 0.125
    """Share of the batch that learns from two half steps."""
    reference: Literal["teacher", "data"] = "teacher"
    """Velocity of the other rows: the teacher's, or that of the noisy image itself."""

    def needs(self) -> Needs:
        """Real images, a student with a second level, and the teacher if it gives the velocity."""
        return Needs(images=True, models=(TEACHER,) if self.reference == "teacher" else (), second_level=True)

    def sampling(self) -> FewStep:
        """Sampling by jumps, at any levels."""
        return FewStep(num_steps=self.num_steps, rule="line", line="ve", trained_steps=None)

    def about(self) -> str:
        """Describe the objective for the report."""
        return f"shortcut model, velocity of the {self.reference}"

    def build(self, context: Context) -> Shortcut:
        """Build the objective."""
        return Shortcut(self, context)


class Shortcut(Objective):
    """Training step of shortcut models."""

    def __init__(self, config: ShortcutConfig, context: Context) -> None:
        self.config, self.average = config, context.average
        self.teacher = context.models[TEACHER] if config.reference == "teacher" else None

    def backward(
        self, student: Learner, critic: Learner | None, batch: Batch, generator: torch.Generator
    ) -> dict[str, torch.Tensor]:
        """Add the gradients of the loss. Figures: "velocity" and "steps", the losses of the two parts of the batch."""
        assert batch.real is not None
        real, labels = batch.real, batch.real_labels
        share = self.config.bootstrap
        count = max(1, round(share * batch.size)) if share else 0  # small micro-batches, too, have a row of it
        t, m, s, small = self._draw_steps(count, generator)
        u = torch.rand(batch.size - count, generator=generator, device=real.device)
        tau = SIGMA_MIN + (END - SIGMA_MIN) * u
        sigma = torch.cat([t, tau / (1 - tau)])
        x = lines.point(real, torch.randn(real.shape, generator=generator, device=real.device), sigma, "ve")
        images = student(x, sigma, labels, None, torch.cat([s, sigma[count:]]))
        with torch.no_grad():
            first, last = (None if labels is None else labels[part] for part in (slice(count), slice(count, None)))
            halves = self.two_steps(student, x[:count], (t, m, s), small, first) if count else x[:0]
            flow = real[count:] if self.teacher is None else self.teacher(x[count:], sigma[count:], last)
        errors = l2(images, torch.cat([halves, flow])) * ((1 + sigma) / sigma) ** 2
        loss = errors.mean()
        (batch.weight * loss).backward()
        parts = {"steps": errors[:count], "velocity": errors[count:]}
        return {name: part.detach().mean() for name, part in parts.items() if len(part)}

    def two_steps(
        self,
        student: Learner,
        x: torch.Tensor,
        levels: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        small: torch.Tensor,
        labels: torch.Tensor | None,
    ) -> torch.Tensor:
        """The image (B, C, H, W) towards which one step from t to s is two steps over m, for `levels` t, m, s, each (B,). Where
        `small` (B,) holds, the half steps follow the velocity."""
        t, m, s = levels
        middle = jump(x, student.target(x, t, labels, None, torch.where(small, t, m), model=self.average), t, m)
        end = jump(middle, student.target(middle, m, labels, None, torch.where(small, m, s), model=self.average), m, s)
        share = (s / t).reshape(-1, 1, 1, 1)
        return (end - share * x) / (1 - share)

    def _draw_steps(self, count: int, generator: torch.Generator) -> tuple[torch.Tensor, ...]:
        """Levels t, m and s, each (count,), of steps on the grid of a random size; True for those of the smallest size."""
        device = generator.device
        size = torch.randint(self.config.sizes, (count,), generator=generator, device=device)
        parts = 2.0**size
        number = 1 + (torch.rand(count, generator=generator, device=device) * parts).floor()  # of the step, from 1 to parts
        taus = (END * (number - back) / parts for back in (0.0, 0.5, 1.0))
        t, m, s = (tau / (1 - tau) for tau in taus)
        return t, m, s, size == self.config.sizes - 1
