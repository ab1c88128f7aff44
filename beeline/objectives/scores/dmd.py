"""Distribution matching: the student descends a divergence between the laws of its own noisy images and of the teacher's.

With y = G(s0 z), x = y + s n, teacher T and fake score f (fake_score.py), the student's gradient with respect to y is

    w (f(x, s) - T(x, s)) / a

without graphs through T and f. With a = w = 1 this is the gradient of s^2 KL(law of x | law of the teacher's noisy data).

    DMD        a = mean |y - T(x)| of each image; adds lambda d(G(s0 z_i), x1_i) on the teacher's pairs (Yin et al. 2024a,
               sections 3.2 and 3.3)
    DI         a = 1, ln s ~ N(-1.2, 1.2^2) (Diff-Instruct; Luo et al. 2023, algorithm 1)
    DMD2       DMD with a discriminator D in place of pairs, and K > 1 (Yin et al. 2024b, sections 4.1 to 4.4)
    f-distill  DMD2 with w = h(r), r = exp(D(x, s)), for other divergences than the reverse KL (Xu et al. 2025, section 3)

D is a head on the end of f's encoder. It sees noisy images, real ones and the student's, each with noise of its own level:

    L_G = L + u softplus(-D(y + s n)),    L_D = L_f + v (softplus(D(y + s n)) + softplus(-D(real + s n)))

The best D is the log-ratio of the densities of noisy real and noisy generated images.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Literal

import torch
from torch import nn
from torch.nn import functional as F

from beeline.augmentation import mirrored
from beeline.denoiser import Denoiser
from beeline.networks.layers import GroupNorm
from beeline.objectives import Batch, Context, Needs, ObjectiveConfig
from beeline.objectives.distances import DISTANCES, DistanceSettings
from beeline.objectives.learner import Learner
from beeline.objectives.scores.fake_score import (
    FakeScoreSettings,
    LevelLaw,
    ScoreDistillation,
    denoising_loss,
    equally_costly,
    error_scale,
    noisy,
    simulated_inputs,
)
from beeline.settings import Amount, Positive, Steps

Divergence = Literal["reverse_kl", "kl", "js", "jeffreys", "hellinger", "softened", "neyman"]
WEIGHTS: dict[Divergence, Callable[[torch.Tensor], torch.Tensor]] = {
    "reverse_kl": torch.ones_like,
    "kl": lambda ratio: ratio,
    "js": lambda ratio: ratio / (1 + ratio),
    "jeffreys": lambda ratio: 1 + ratio,
    "hellinger": torch.sqrt,
    "softened": lambda ratio: 1 / (1 + ratio),
    "neyman": lambda ratio: 1 / ratio,
}
"""h(r) = r^2 phi''(r), up to a factor, for the divergence E phi(r) over generated images."""
Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]
"""Noisy images (B, C, H, W), levels (B,) and labels."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DMDConfig(DistanceSettings, FakeScoreSettings, ObjectiveConfig):
    """Distribution matching with the reverse KL divergence, by default without regression on pairs.

    DI has scaled False and "lognormal" levels.
    """

    scaled: bool = True
    """Divide each image's gradient by a = mean |y - T(x)|."""
    regression_weight: Amount = 0.0
    """Weight of the distance to the teacher's images on pairs; 0 needs no pairs. The distance is that of `distance`."""

    def needs(self) -> Needs:
        """The teacher and noise; pairs and the feature network of the distance for the regression."""
        paired = self.regression_weight > 0
        return Needs(noise=True, pairs=paired, models=("teacher",), features=self.distance_features if paired else ())

    def about(self) -> str:
        """Describe the objective, like "distribution matching (DMD), regression on pairs by perceptual distance (probe)"."""
        extra = [f"regression on pairs by {DISTANCES[self.distance]}"] * (self.regression_weight > 0)
        return ", ".join([f"distribution matching ({'DMD' if self.scaled else 'Diff-Instruct'})", *extra])

    def build(self, context: Context) -> DMD:
        """Build the objective with its fake score."""
        return DMD(self, context)

    def representative(self) -> DMDConfig:
        """Replace settings that do not affect the cost by defaults."""
        return dataclasses.replace(
            equally_costly(self), scaled=True, regression_weight=float(self.regression_weight > 0), pixel_weight=0.0
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class DMD2Config(FakeScoreSettings, ObjectiveConfig):
    """Distribution matching with a discriminator on noisy images; f-distill with a `divergence` other than "reverse_kl"."""

    fake_steps: Steps = 5
    fake_levels: LevelLaw = "karras"
    adversarial_weight: Amount = 3e-3
    """Weight u of the student's adversarial loss. The other loss is a mean over pixels, of gradient 1 / pixels or so."""
    critic_weight: Amount = 1e-2
    """Weight v of the discriminator's loss in that of the fake score."""
    judged_levels: LevelLaw = "karras"
    """Distribution of the noise levels at which the discriminator judges images."""
    divergence: Divergence = "reverse_kl"
    """Divergence that the student descends. "kl" and "jeffreys" put weight on images that the student makes too rarely."""
    ratios: tuple[Positive, Positive] = (0.1, 10.0)
    """Range that r is clipped to, for divergences other than "reverse_kl"."""
    flip: bool = False
    """Mirror real images at random, for data without a preferred side."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.ratios[0] < self.ratios[1], "ratios", "two rising numbers, for example 0.1 10")

    def needs(self) -> Needs:
        """The teacher, noise and real images."""
        return Needs(noise=True, images=True, models=("teacher",))

    def about(self) -> str:
        """Describe the objective, like "distribution matching (DMD2), adversarial term on noisy images"."""
        weighted = self.divergence != "reverse_kl"
        method = f"f-distill, {self.divergence}" if weighted else "DMD2"
        return f"distribution matching ({method}), adversarial term on noisy images"

    def build(self, context: Context) -> DMD2:
        """Build the objective with its fake score and discriminator."""
        return DMD2(self, context)

    def representative(self) -> DMD2Config:
        """Replace settings that do not affect the cost by defaults."""
        return dataclasses.replace(
            equally_costly(self),
            adversarial_weight=3e-3,
            critic_weight=1e-2,
            judged_levels="karras",
            divergence="reverse_kl" if self.divergence == "reverse_kl" else "kl",
            ratios=(0.1, 10.0),
            flip=False,
        )


class DMD(ScoreDistillation):
    """Training step of DMD and DI."""

    def __init__(self, config: DMDConfig, context: Context) -> None:
        super().__init__(config, context)
        self.config = config
        self._distance = config.build_distance(context) if config.regression_weight else None

    def draw(self, student: Learner, batch: Batch, generator: torch.Generator, *, gradients: bool) -> torch.Tensor:
        """Draw images (B, C, H, W); for a regression step (2 B, C, H, W), the first half from fresh noise, the other from the
        pairs' noise. One call of the student makes both, as parallel training requires."""
        if self._distance is None:
            return super().draw(student, batch, generator, gradients=gradients)
        assert batch.noise is not None
        fresh = torch.randn(batch.noise.shape, generator=generator, device=batch.noise.device)
        unpaired, levels, labels = dataclasses.replace(batch, noise=fresh), self.config.start_levels, batch.labels
        if not gradients:
            return super().draw(student, unpaired, generator, gradients=False)
        x, sigma = simulated_inputs(student, unpaired, levels, generator)
        inputs = torch.cat([x, levels[0] * batch.noise]), torch.cat([sigma, torch.full_like(sigma, levels[0])])
        return student(*inputs, None if labels is None else torch.cat([labels, labels]))

    def gradient(
        self, critic: Learner, images: torch.Tensor, batch: Batch, generator: torch.Generator
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Gradient, and the figures "gap" (|f - T|), "a" and "regression"."""
        own = images.detach()[: batch.size]
        x, sigma = noisy(own, self.config.levels, self.config.span, generator)
        gap, scale, figures = compare(critic.frozen, self.teacher, own, x, sigma, batch.labels)
        gradient = gap / scale if self.config.scaled else gap
        gradient = gradient / gradient.numel()
        if self._distance is None:
            return gradient, figures
        assert batch.x1 is not None
        loss = self._distance(images[batch.size :], batch.x1).mean()
        (towards,) = torch.autograd.grad(self.config.regression_weight * loss, images)
        return towards + torch.cat([gradient, torch.zeros_like(gradient)]), figures | {"regression": loss}


class DMD2(ScoreDistillation):
    """Training step of DMD2 and f-distill."""

    def __init__(self, config: DMD2Config, context: Context) -> None:
        super().__init__(config, context)
        self.config = config
        assert isinstance(self.critic, Denoiser)
        self.critic = JudgingScore(self.critic)

    def gradient(
        self, critic: Learner, images: torch.Tensor, batch: Batch, generator: torch.Generator
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Gradient, and the figures "gap" (|f - T|), "a", "adversarial", and "ratio", the mean of r, for f-distill."""
        config, own, labels = self.config, images.detach(), batch.labels
        x, sigma = noisy(own, config.levels, config.span, generator)
        gap, scale, figures = compare(lambda *inputs: critic.frozen(inputs, None)[0], self.teacher, own, x, sigma, labels)
        gradient = gap / scale / gap.numel()
        if config.divergence != "reverse_kl":
            with torch.no_grad():
                ratio = critic.frozen(None, (x, sigma, labels))[1].exp().clamp(*config.ratios)
            gradient = gradient * balanced_weights(ratio, config.divergence).reshape(-1, 1, 1, 1)
            figures["ratio"] = ratio.mean()
        logits = critic.frozen(None, (*noisy(images, config.judged_levels, (0.0, 1.0), generator), labels))[1]
        fooling = F.softplus(-logits).mean()
        (adversarial,) = torch.autograd.grad(fooling, images)
        return gradient + config.adversarial_weight * adversarial, figures | {"adversarial": fooling}

    def teach(
        self, critic: Learner, images: torch.Tensor, batch: Batch, generator: torch.Generator
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Loss of fake score and discriminator, and the figures "fake" and "critic" of both. One call makes both, as parallel
        training requires."""
        assert batch.real is not None
        config, labels = self.config, batch.labels
        real = mirrored(batch.real, generator) if config.flip else batch.real
        classes = None if labels is None or batch.real_labels is None else torch.cat([labels, batch.real_labels])
        x, sigma = noisy(images, config.fake_levels, (0.0, 1.0), generator)
        judged = noisy(torch.cat([images, real]), config.judged_levels, (0.0, 1.0), generator)
        denoised, logits = critic((x, sigma, labels), (*judged, classes))
        fake = denoising_loss(denoised, images, sigma)
        loss = F.softplus(logits[: batch.size]).mean() + F.softplus(-logits[batch.size :]).mean()
        return fake + config.critic_weight * loss, {"fake": fake, "critic": loss}


class JudgingScore(nn.Module):
    """A fake score with a discriminator's head on its encoder: one network with one optimiser."""

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__()
        network = denoiser.network_config
        assert network is not None
        self.denoiser = denoiser
        levels = len(network.channel_mult)
        self.head = head(network.model_channels * network.channel_mult[-1], network.img_resolution >> (levels - 1))

    def forward(self, denoise: Inputs | None, judge: Inputs | None) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Denoised images (B, C, H, W) of the first inputs, and logits (B',), float32, of the second: None for None."""
        logits = None if judge is None else self.head(self.denoiser.bottleneck(*judge)).flatten().float()
        return None if denoise is None else self.denoiser(*denoise), logits


def head(channels: int, side: int) -> nn.Sequential:
    """Build the head that maps features (B, C, side, side) to logits (B, 1, 1, 1): 4x4 convolutions of stride 2 down to a side
    of at most 4, then one of the whole side and one of 1x1."""
    layers: list[nn.Module] = []
    while side > 4:
        layers += [nn.Conv2d(channels, channels, 4, 2, 1), GroupNorm(channels, eps=1e-5), nn.SiLU()]
        side //= 2
    layers += [nn.Conv2d(channels, channels, side), GroupNorm(channels, eps=1e-5), nn.SiLU()]
    return nn.Sequential(*layers, nn.Conv2d(channels, 1, 1))


@torch.no_grad()
def compare(
    fake: Callable[..., torch.Tensor],
    teacher: Callable[..., torch.Tensor],
    images: torch.Tensor,
    x: torch.Tensor,
    sigma: torch.Tensor,
    labels: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Compute f(x) - T(x), (B, C, H, W), the scale a (B, 1, 1, 1), and figures: the root mean square "gap", and "a"."""
    denoised = teacher(x, sigma, labels)
    gap, scale = fake(x, sigma, labels) - denoised, error_scale(images, denoised)
    return gap, scale, {"gap": gap.square().mean().sqrt(), "a": scale.mean()}


def balanced_weights(ratio: torch.Tensor, divergence: Divergence) -> torch.Tensor:
    """Weights h(r), (B,), of ratios `ratio` (B,), divided by their mean over the micro-batch."""
    weights = WEIGHTS[divergence](ratio)
    return weights / weights.mean()
