"""Score identity distillation (SiD, SiDA; Zhou et al. 2024, 2025) and score implicit matching (SIM; Luo et al. 2024).

The student makes an image y from noise. Noisy images x = y + s n have a score, which the fake score f learns (fake_score.py).
That of the data is known to the teacher T. Both are denoisers. The two scores differ by v / s^2, with v = T(x; s) - f(x; s).
The student minimises a distance between them, in a form that needs only the two denoisers. T and f are frozen there, and
gradients flow through x into both. Summed over pixels, with a = mean |y - T| per image, a constant:

    SiD    v . ((T - y) - alpha v) / a           (Zhou et al. 2024, algorithm 1)
    SIM    v . (f - y) / sqrt(|v|^2 + c^2)       (Luo et al. 2024, theorem 3.1, for the pseudo-Huber distance)

If f is exact, SiD without 1/a has the gradient of E |v|^2 / 2, the Fisher divergence times s^4, for alpha = 0.5. For alpha = 1
it has the gradient at a fixed law of x, and alpha = 1.2 goes beyond. SIM has the gradient of E sqrt(|v|^2 + c^2) at a fixed law
of x. Where |v| is far below c, it is SiD with alpha = 1 and c in place of a.

SiDA adds a GAN without new weights. The bottleneck of f's encoder, averaged over its channels, is a map of logits D. With
w(s) = 1/s^2 + 1/sigma_data^2 and means over the micro-batch, the losses become

    student       SiD + u C H W mean(1/a) mean softplus(-D(x))
    fake score    L_f + v / (C H W) mean w(s) mean(softplus(D(x)) + softplus(-D(real + s n))) / 2
"""

from __future__ import annotations

import abc
import dataclasses
from typing import Self

import torch
from torch import nn
from torch.nn import functional as F

from beeline.augmentation import mirrored
from beeline.denoiser import Denoiser
from beeline.objectives import Batch, Context, Needs, ObjectiveConfig
from beeline.objectives.learner import Learner
from beeline.objectives.scores.fake_score import (
    FakeScoreSettings,
    ScoreDistillation,
    denoising_loss,
    equally_costly,
    error_scale,
    noisy,
)
from beeline.settings import Amount, Positive, Share

Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]
"""Noisy images (B, C, H, W), levels (B,) and labels."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScoreMatchingConfig(FakeScoreSettings, ObjectiveConfig, abc.ABC):
    """Settings that the methods share. The defaults are those of SiD, except the learning rate."""

    def needs(self) -> Needs:
        """The teacher and noise; no data."""
        return Needs(noise=True, models=("teacher",))

    def build(self, context: Context) -> ScoreMatching:
        """Build the objective with its fake score."""
        return ScoreMatching(self, context)

    @abc.abstractmethod
    def loss(self, images: torch.Tensor, real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
        """Return the student's loss, per image (B,), of `images` y, `real` T and `fake` f, all (B, C, H, W)."""

    def representative(self) -> Self:
        """Replace settings that do not affect the cost by defaults."""
        return equally_costly(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SiDConfig(ScoreMatchingConfig):
    """Score identity distillation."""

    alpha: Amount = 1.2
    """0.5 for the Fisher divergence, 1 for the same at a fixed law of x. Published: 1.2, and 1 for AFHQ."""

    def about(self) -> str:
        """Describe the objective for the report."""
        return f"score identity distillation (SiD), alpha {self.alpha:g}"

    def loss(self, images: torch.Tensor, real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
        """Return SiD's loss, per image (B,)."""
        return sid(images, real, fake, self.alpha) / error_scale(images, real).flatten()

    def representative(self) -> Self:
        """Replace alpha, too."""
        return dataclasses.replace(super().representative(), alpha=1.2)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SIMConfig(ScoreMatchingConfig):
    """Score implicit matching with the pseudo-Huber distance."""

    huber_c: Positive = 0.08
    """c: where |v| is far above it, only the direction of v counts."""

    def about(self) -> str:
        """Describe the objective for the report."""
        return f"score implicit matching (SIM), pseudo-Huber distance, c {self.huber_c:g}"

    def loss(self, images: torch.Tensor, real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
        """Return SIM's loss, per image (B,)."""
        return sim(images, real, fake, self.huber_c)

    def representative(self) -> Self:
        """Replace c, too."""
        return dataclasses.replace(super().representative(), huber_c=0.08)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SiDAConfig(SiDConfig):
    """SiD with an adversarial term on real images. The weights are the published ones."""

    adversarial_weight: Amount = 1e-4
    """Weight u of the student's adversarial loss."""
    adversarial_start: Share = 0.0
    """Share of the phase's steps before the student's adversarial loss begins. The fake score judges from the start."""
    critic_weight: Amount = 1.0
    """Weight v of the judgement in the fake score's loss."""
    flip: bool = False
    """Mirror real images at random, for data without a preferred side."""

    def needs(self) -> Needs:
        """The teacher, noise and real images."""
        return Needs(noise=True, images=True, models=("teacher",))

    def about(self) -> str:
        """Describe the objective for the report."""
        return f"score identity distillation, adversarial term on noisy images (SiDA), alpha {self.alpha:g}"

    def build(self, context: Context) -> SiDA:
        """Build the objective with its fake score."""
        return SiDA(self, context)

    def representative(self) -> Self:
        """Replace weights, too."""
        return dataclasses.replace(
            super().representative(), adversarial_weight=1e-4, adversarial_start=0.0, critic_weight=1.0, flip=False
        )


class ScoreMatching(ScoreDistillation):
    """Training step of SiD and SIM."""

    def __init__(self, config: ScoreMatchingConfig, context: Context) -> None:
        super().__init__(config, context)
        self.config = config

    def gradient(
        self, critic: Learner, images: torch.Tensor, batch: Batch, generator: torch.Generator
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Gradient of the loss with respect to `images`, and the figures "gap" (root mean square of v) and "a".

        The loss itself is no figure: it has either sign and no lower bound, and does not follow the quality of the images.
        """
        x, sigma = noisy(images, self.config.levels, self.config.span, generator)
        real, fake = self.teacher(x, sigma, batch.labels), critic.frozen(x, sigma, batch.labels)
        (gradient,) = torch.autograd.grad(self.config.loss(images, real, fake).mean(), images)
        return gradient, {"gap": (real - fake).square().mean().sqrt(), "a": error_scale(images, real).mean()}


class SiDA(ScoreMatching):
    """Training step of SiDA."""

    def __init__(self, config: SiDAConfig, context: Context) -> None:
        super().__init__(config, context)
        self.sida = config
        assert isinstance(self.critic, Denoiser)
        self.critic = JudgingEncoder(self.critic)

    def gradient(
        self, critic: Learner, images: torch.Tensor, batch: Batch, generator: torch.Generator
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Gradient with respect to `images`, and the figures "gap", "a" and "adversarial"."""
        config, labels = self.sida, batch.labels
        x, sigma = noisy(images, config.levels, config.span, generator)
        real = self.teacher(x, sigma, labels)
        fake, logits = critic.frozen((x, sigma, labels), (x, sigma, labels))
        scale, fooling = error_scale(images, real), F.softplus(-logits).mean()
        weight = config.adversarial_weight * float(batch.step >= config.adversarial_start * batch.total)
        loss = config.loss(images, real, fake).mean() + weight * images[0].numel() * (1 / scale).mean() * fooling
        (gradient,) = torch.autograd.grad(loss, images)
        return gradient, {"gap": (real - fake).square().mean().sqrt(), "a": scale.mean(), "adversarial": fooling}

    def teach(
        self, critic: Learner, images: torch.Tensor, batch: Batch, generator: torch.Generator
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Loss of the fake score with its judgement, and the figures "fake" and "critic" of the two parts.

        Real images have the noise and the levels of the generated ones. One call makes all, as parallel training requires.
        """
        assert batch.real is not None
        labels = batch.labels
        x, sigma = noisy(images, self.sida.fake_levels, (0.0, 1.0), generator)
        real = mirrored(batch.real, generator) if self.sida.flip else batch.real
        classes = None if labels is None or batch.real_labels is None else torch.cat([labels, batch.real_labels])
        judged = torch.cat([x, real + (x - images)]), torch.cat([sigma, sigma]), classes
        denoised, logits = critic((x, sigma, labels), judged)
        fake = denoising_loss(denoised, images, sigma)
        loss = (F.softplus(logits[: batch.size]).mean() + F.softplus(-logits[batch.size :]).mean()) / 2
        weight = self.sida.critic_weight / images[0].numel() * (1 / sigma**2 + 1 / Denoiser.sigma_data**2).mean()
        return fake + weight * loss, {"fake": fake, "critic": loss}


class JudgingEncoder(nn.Module):
    """A fake score that also judges images. It has no other weights than the denoiser's."""

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__()
        self.denoiser = denoiser

    def forward(self, denoise: Inputs, judge: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
        """Denoised images (B, C, H, W) of the first inputs, and logits (B', H', W'), float32, of the second."""
        return self.denoiser(*denoise), self.denoiser.bottleneck(*judge).float().mean(dim=1)


def sid(images: torch.Tensor, real: torch.Tensor, fake: torch.Tensor, alpha: float) -> torch.Tensor:
    """SiD's loss without 1/a, per image (B,), of `images` y, `real` T and `fake` f, all (B, C, H, W)."""
    gap = real - fake
    return (gap * ((real - images) - alpha * gap)).sum(dim=(1, 2, 3))


def sim(images: torch.Tensor, real: torch.Tensor, fake: torch.Tensor, c: float) -> torch.Tensor:
    """SIM's loss, per image (B,), of `images` y, `real` T and `fake` f, all (B, C, H, W)."""
    gap = real - fake
    length = (gap.square().sum(dim=(1, 2, 3)) + c * c).sqrt()
    return (gap * (fake - images)).sum(dim=(1, 2, 3)) / length
