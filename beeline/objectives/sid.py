"""Score identity distillation (SiD; Zhou et al. 2024) and score implicit matching (SIM; Luo et al. 2024).

The student makes an image y from noise. Noisy images x = y + s n have a score, which the fake score f learns (fake_score.py); that
of the data is known to the teacher T. Both are denoisers, and the two scores differ by v / s^2, with v = T(x; s) - f(x; s). The
student minimises a distance between the scores, in a form that needs only the two denoisers. T and f are frozen there, and
gradients flow through x into both. Summed over pixels, with a = mean |y - T| per image, a constant:

    SiD    v . ((T - y) - alpha v) / a           (Zhou et al. 2024, algorithm 1)
    SIM    v . (f - y) / sqrt(|v|^2 + c^2)       (Luo et al. 2024, theorem 3.1, for the pseudo-Huber distance)

If f is exact, SiD without 1/a has the gradient of E |v|^2 / 2, the Fisher divergence times s^4, for alpha = 0.5. For alpha = 1 it
has the gradient at a fixed law of x, and alpha = 1.2 goes beyond. SIM has the gradient of E sqrt(|v|^2 + c^2) at a fixed law of
x. Where |v| is far below c, it is SiD with alpha = 1 and c in place of a.
"""

from __future__ import annotations

import abc
import dataclasses
from typing import Self

import torch

from beeline.objectives import Batch, Context, Needs, ObjectiveConfig
from beeline.objectives.fake_score import FakeScoreSettings, ScoreDistillation, error_scale, noisy
from beeline.objectives.learner import Learner
from beeline.objectives.optimizer import OptimizerConfig
from beeline.settings import Amount, Positive


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScoreMatchingConfig(FakeScoreSettings, ObjectiveConfig, abc.ABC):
    """Settings that SiD and SIM share. The defaults are SiD's, except the learning rates."""

    def needs(self) -> Needs:
        """Noise, labels and the teacher; no data."""
        return Needs(noise=True, models=("teacher",))

    def build(self, context: Context) -> ScoreMatching:
        """Build the objective."""
        return ScoreMatching(self, context)

    @abc.abstractmethod
    def loss(self, images: torch.Tensor, real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
        """Return the student's loss, per image (B,), of its `images` and of the denoised images of the teacher, `real`, and of
        the fake score, `fake`, all (B, C, H, W)."""

    def representative(self) -> Self:
        """Replace laws of noise levels and the fake score's optimiser by values that do not affect the cost."""
        return dataclasses.replace(
            self, levels="karras", span=(0.0, 1.0), fake_levels="lognormal", fake_optimizer=OptimizerConfig()
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class SiDConfig(ScoreMatchingConfig):
    """Score identity distillation."""

    alpha: Amount = 1.2
    """0.5 is the Fisher divergence, 1 the same at a fixed law of x. Published: 1.2, and 1 for AFHQ."""

    def about(self) -> str:
        """Describe the objective for the report."""
        return f"score identity distillation (SiD), alpha {self.alpha:g}"

    def loss(self, images: torch.Tensor, real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
        """SiD's loss, per image (B,)."""
        return sid(images, real, fake, self.alpha) / error_scale(images, real).flatten()

    def representative(self) -> SiDConfig:
        """Replace alpha too."""
        return dataclasses.replace(super().representative(), alpha=1.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SIMConfig(ScoreMatchingConfig):
    """Score implicit matching with the pseudo-Huber distance."""

    huber_c: Positive = 0.08
    """c: where |v| is far above it, the loss depends on the direction of v alone."""

    def about(self) -> str:
        """Describe the objective for the report."""
        return f"score implicit matching (SIM), pseudo-Huber distance, c {self.huber_c:g}"

    def loss(self, images: torch.Tensor, real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
        """SIM's loss, per image (B,)."""
        return sim(images, real, fake, self.huber_c)

    def representative(self) -> SIMConfig:
        """Replace c too."""
        return dataclasses.replace(super().representative(), huber_c=1.0)


class ScoreMatching(ScoreDistillation):
    """Training step of SiD and SIM."""

    def __init__(self, config: ScoreMatchingConfig, context: Context) -> None:
        super().__init__(config, context)
        self.config = config

    def gradient(
        self, critic: Learner, images: torch.Tensor, batch: Batch, generator: torch.Generator
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Gradient of the loss with respect to `images`. Figures: "difference", the root mean square of v, and "scale", a. The
        loss has either sign and no lower bound; its value says nothing."""
        x, sigma = noisy(images, self.config.levels, self.config.span, generator)
        real, fake = self.teacher(x, sigma, batch.labels), critic.frozen(x, sigma, batch.labels)
        (gradient,) = torch.autograd.grad(self.config.loss(images, real, fake).mean(), images)
        return gradient, {"difference": (real - fake).square().mean().sqrt(), "scale": error_scale(images, real).mean()}


def sid(images: torch.Tensor, real: torch.Tensor, fake: torch.Tensor, alpha: float) -> torch.Tensor:
    """SiD's loss without 1/a, per image (B,), of `images` y, `real` T and `fake` f, all (B, C, H, W)."""
    difference = real - fake
    return (difference * ((real - images) - alpha * difference)).sum(dim=(1, 2, 3))


def sim(images: torch.Tensor, real: torch.Tensor, fake: torch.Tensor, c: float) -> torch.Tensor:
    """SIM's loss, per image (B,), of `images` y, `real` T and `fake` f, all (B, C, H, W)."""
    difference = real - fake
    length = (difference.square().sum(dim=(1, 2, 3)) + c * c).sqrt()
    return (difference * (fake - images)).sum(dim=(1, 2, 3)) / length
