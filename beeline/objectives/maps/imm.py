"""Inductive moment matching, IMM (Zhou et al. 2025): jumps from two neighbouring levels lead to the same distribution.

With G(x, t -> s) = (s/t) x + (1 - s/t) g(x, t, s), a level t and a level r slightly below it, with the same image and noise,

    L = MMD^2(G(x_t, t -> s), sg G(x_r, r -> s)),    k(y, y') = exp(-|y - y'| / (dim c))

over groups of images that share (t, r, s). r = s is the anchor: G(x_s, s -> s) is x_s, a sample of the data at level s. In time
tau = t / (1 + t) of the segment between image and noise, c is the scale sigma_data (tau_t - tau_s), brought back to level s.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated

import torch

from beeline.denoiser import Denoiser
from beeline.objectives import Batch, Context, Needs, Objective, ObjectiveConfig, lines
from beeline.objectives.learner import Learner
from beeline.objectives.maps.flow_map import jump
from beeline.sampling.few_step import FewStep
from beeline.schedule import SIGMA_MAX, SIGMA_MIN
from beeline.settings import Positive, Range, Size, Steps

SMALLEST = 1e-3  # of the kernel's scale c


@dataclasses.dataclass(frozen=True, kw_only=True)
class IMMConfig(ObjectiveConfig):
    """Inductive moment matching."""

    num_steps: Steps = 18
    """Levels of the schedule to which the indices of few-step schedules refer."""
    group: Annotated[Size, Range(2, 1024)] = 4
    """Images that share their levels. In conditional training only those of one class are compared."""
    decrement: Positive = SIGMA_MAX / 2**12
    """t - r, in sigma."""

    def needs(self) -> Needs:
        """Real images, and a student with a second level."""
        return Needs(images=True, second_level=True)

    def sampling(self) -> FewStep:
        """Sampling by jumps, at any levels."""
        return FewStep(num_steps=self.num_steps, rule="line", line="ve", trained_steps=None)

    def about(self) -> str:
        """Describe the objective for the report."""
        return f"inductive moment matching, groups of {self.group}"

    def build(self, context: Context) -> IMM:
        """Build the objective."""
        return IMM(self)


def mmd(ours: torch.Tensor, theirs: torch.Tensor, alike: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Compute MMD^2 between the rows of `ours` and `theirs`, both (B, C, H, W), per row (B,). Row i is compared with the rows j
    where alike[i, j]; `alike` (B, B) is an equivalence. `scale` (B,) is c, equal for rows that are alike."""
    a, b = ours.flatten(1), theirs.flatten(1)

    def kernel(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        distance = torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")  # its gradient at 0 is 0
        return (-distance / (a.shape[1] * scale[:, None])).exp()

    total = kernel(a, a) + kernel(b, b) - kernel(a, b) - kernel(b, a)
    return (alike * total).sum(dim=1) / alike.sum(dim=1)


class IMM(Objective):
    """Training step of inductive moment matching."""

    def __init__(self, config: IMMConfig) -> None:
        self.config = config

    def backward(
        self, student: Learner, critic: Learner | None, batch: Batch, generator: torch.Generator
    ) -> dict[str, torch.Tensor]:
        """Add the gradients of the loss. Figure: "mmd"."""
        assert batch.real is not None
        real, labels, number = batch.real, batch.real_labels, torch.arange(batch.size, device=batch.real.device)
        if labels is not None:  # neighbours have the same class
            order = labels.argmax(dim=1).argsort(stable=True)
            real, labels = real[order], labels[order]
        group = number // self.config.group
        alike = group[:, None] == group[None, :]
        if labels is not None:
            alike = alike & (labels @ labels.T > 0)
        t, r, s = (levels[group] for levels in self._draw_levels(batch.size, generator))
        noise = torch.randn(real.shape, generator=generator, device=real.device)
        start, near = (lines.point(real, noise, level, "ve") for level in (t, r))
        ours = jump(start, student(start, t, labels, None, s), t, s)
        theirs = jump(near, student.target(near, r, labels, None, s), r, s)
        scale = Denoiser.sigma_data * (1 + s) * (t / (1 + t) - s / (1 + s)).clamp_min(SMALLEST)
        loss = mmd(ours, theirs, alike.to(ours.dtype), scale).mean()
        (batch.weight * loss).backward()
        return {"mmd": loss.detach()}

    def _draw_levels(self, count: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Draw t, r and s, each (count,): t / (1 + t) uniform over the sampling range, s / (1 + s) uniform below it."""
        low, high = SIGMA_MIN / (1 + SIGMA_MIN), SIGMA_MAX / (1 + SIGMA_MAX)
        u = torch.rand(2, count, generator=generator, device=generator.device)
        tau = low + (high - low) * u[0]
        t, s = (time / (1 - time) for time in (tau, low + (tau - low) * u[1]))
        return t, torch.maximum(t - self.config.decrement, s), s
