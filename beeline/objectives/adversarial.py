"""Adversarial term: hinge losses, the adaptive weight that balances it against another loss, and a discriminator's step.

    L + weight lambda L_adv

The term is shared by all objectives that compare generated images with real ones.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from beeline.augmentation import mirrored
from beeline.denoiser import Denoiser
from beeline.objectives import Batch, Context
from beeline.objectives.discriminator import SCRATCH, Discriminator, DiscriminatorConfig
from beeline.objectives.learner import Learner
from beeline.objectives.optimizer import OptimizerConfig
from beeline.settings import Amount, Settings


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdversarialSettings(Settings):
    """Settings of an adversarial term. Configs of objectives inherit them."""

    adversarial_weight: Amount = 0.0
    """Weight of the adversarial term, multiplied by its adaptive weight; 0 means no discriminator."""
    discriminator: DiscriminatorConfig = DiscriminatorConfig(optimizer=OptimizerConfig())

    @property
    def adversarial_features(self) -> tuple[str, ...]:
        """Feature networks that the discriminator needs."""
        return tuple(name for name in self.discriminator.networks if self.adversarial_weight and name != SCRATCH)

    @property
    def adversarial_cost(self) -> dict[str, Any]:
        """The settings above, without differences that do not affect the cost of a step. For `representative`."""
        discriminator = dataclasses.replace(self.discriminator, optimizer=OptimizerConfig())
        return {"adversarial_weight": float(self.adversarial_weight > 0), "discriminator": discriminator}

    def build_adversary(self, context: Context) -> Adversary | None:
        """Build the adversarial term, None if its weight is 0."""
        return Adversary(self, context) if self.adversarial_weight else None


Looks = list[list[torch.Tensor]]
"""Features of images, of each critic."""


class Adversary:
    """A discriminator, and the step of generator and discriminator on the same generated images."""

    def __init__(self, config: AdversarialSettings, context: Context) -> None:
        settings = config.discriminator
        self.weight, self.mirror, self.optimizer = config.adversarial_weight, settings.mirror, settings.optimizer
        self.discriminator = Discriminator(
            {name: None if name == SCRATCH else context.features[name] for name in settings.networks},
            image_shape=context.image_shape,
            num_classes=context.num_classes,
            policy=settings.augment,
            side=settings.resize,
            width=settings.width,
        )

    def backward(
        self,
        student: Learner,
        critic: Learner,
        images: torch.Tensor,
        labels: torch.Tensor | None,
        loss: torch.Tensor,
        batch: Batch,
        generator: torch.Generator,
    ) -> dict[str, torch.Tensor]:
        """Add the gradients of `loss` and of the adversarial term to the student, and those of the discriminator's loss to it.

        `images` (B, C, H, W), of classes `labels`, come from the student, and `loss` is a function of them. `batch` holds
        real images. Returns figures.
        """
        fooling, fake = self.fool(critic, images, labels, generator)
        gradient, weighted = balanced_gradient(images, loss, fooling, last_layer(student.model), self.weight)
        images.backward(batch.weight * gradient)
        figures = {"adversarial": fooling.detach(), "lambda": weighted.detach()}
        return figures | self.teach(critic, fake, labels, batch, generator)

    def fool(
        self, critic: Learner, images: torch.Tensor, labels: torch.Tensor | None, generator: torch.Generator
    ) -> tuple[torch.Tensor, Looks]:
        """Compute the generator's loss L_adv of `images` (B, C, H, W), with gradients to them, and what the critics saw."""
        with critic.autocast():
            fake = self.discriminator.look(images, generator)
        return hinge_generator(critic.frozen(fake, labels)), fake

    def teach(
        self, critic: Learner, fake: Looks, labels: torch.Tensor | None, batch: Batch, generator: torch.Generator
    ) -> dict[str, torch.Tensor]:
        """Add the gradients of the discriminator's loss to it, for the features `fake` of `fool` and for real images. Returns
        figures."""
        assert batch.real is not None
        real_images = mirrored(batch.real, generator) if self.mirror else batch.real
        with critic.autocast(), torch.no_grad():
            real = self.discriminator.look(real_images, generator)
        fake_logits = critic([[part.detach() for part in look] for look in fake], labels)
        real_logits = critic(real, batch.real_labels)
        loss = hinge_discriminator(real_logits, fake_logits)
        (batch.weight * loss).backward()
        signs = {"real_positive": real_logits, "fake_positive": fake_logits}
        figures = {name: torch.stack([(part > 0).float().mean() for part in logits]).mean() for name, logits in signs.items()}
        return {"critic": loss.detach()} | figures


def last_layer(model: nn.Module) -> nn.Parameter:
    """Return the weight of the denoiser's output convolution."""
    assert isinstance(model, Denoiser)
    weight = model.model.last_layer
    assert isinstance(weight, nn.Parameter)
    return weight


def hinge_discriminator(real_logits: Sequence[torch.Tensor], fake_logits: Sequence[torch.Tensor]) -> torch.Tensor:
    """Compute max(0, 1 - D(real)) + max(0, 1 + D(fake)), averaged over each critic's logits (B, L_k) and over critics
    (Lim & Ye 2017). Logits may have any precision; the loss is float32."""
    pairs = zip(real_logits, fake_logits, strict=True)
    losses = [F.relu(1 - real.float()).mean() + F.relu(1 + fake.float()).mean() for real, fake in pairs]
    return torch.stack(losses).mean()


def hinge_generator(fake_logits: Sequence[torch.Tensor]) -> torch.Tensor:
    """Compute -D(fake), averaged over each critic's logits (B, L_k) and over critics. Logits may have any precision; the loss
    is float32."""
    return -torch.stack([fake.float().mean() for fake in fake_logits]).mean()


def balanced_gradient(
    images: torch.Tensor,
    loss: torch.Tensor,
    adversarial_loss: torch.Tensor,
    last_layer: torch.Tensor,
    weight: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the gradient of L + weight lambda L_adv with respect to the generated `images` (B, C, H, W), and lambda.

        lambda = |grad L| / (|grad L_adv| + 1e-4), with respect to the last layer's weight, clamped to [0.01, 10]

    (Esser et al. 2021, eq. 7; the clamp is CTM's.) Both losses are differentiated once, down to the images; from there the last
    layer is one convolution away. Continue with `images.backward(gradient)`: the graph up to the images is kept. The graphs of
    the losses, which share only the images, are freed.
    """
    (loss_gradient,) = torch.autograd.grad(loss, images)
    (adversarial_gradient,) = torch.autograd.grad(adversarial_loss, images)
    weighted = balance(images, loss_gradient, adversarial_gradient, last_layer)
    return loss_gradient + weight * weighted * adversarial_gradient, weighted


def balance(
    images: torch.Tensor,
    reference: torch.Tensor,
    gradient: torch.Tensor,
    last_layer: torch.Tensor,
    *,
    least: float = 0.01,
    most: float = 10.0,
) -> torch.Tensor:
    """Compute the adaptive weight of a loss: |grad reference loss| / (|grad loss| + 1e-4) with respect to the last layer's
    weight, clamped to [`least`, `most`]. Both losses are given by their gradients with respect to the student's output
    `images` (B, C, H, W)."""

    def norm(gradient: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad(images, last_layer, gradient, retain_graph=True)[0].norm()

    return (norm(reference) / (norm(gradient) + 1e-4)).clamp(least, most)
