"""EDM's denoising score matching (Karras et al. 2022): the objective of teachers.

L = E lambda(sigma) |D(y + n; sigma) - y|^2,   ln sigma ~ N(p_mean, p_std^2),   n ~ N(0, sigma^2)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch

from beeline.augmentation import augment, mirrored
from beeline.denoiser import Denoiser
from beeline.objectives import Batch, Context, Needs, Objective, ObjectiveConfig
from beeline.objectives.learner import Learner
from beeline.settings import Share


@dataclasses.dataclass(frozen=True, kw_only=True)
class EDMConfig(ObjectiveConfig):
    """Denoising score matching on real images."""

    flip: bool = False
    """Mirror images at random, for data without a preferred side."""
    augment: Share = 0.0
    """Probability of each non-leaking augmentation; needs a network with augment_dim 9. 0 disables it."""

    def needs(self) -> Needs:
        """Real images."""
        return Needs(images=True)

    def sampling(self) -> None:
        """None: the model is sampled by ODE solvers."""

    def about(self) -> str:
        """Name of the method, for logs and report."""
        return "denoising score matching (EDM)"

    def build(self, context: Context) -> EDM:
        """Build the objective."""
        return EDM(self)


class EDM(Objective):
    """A step of denoising score matching."""

    def __init__(self, config: EDMConfig) -> None:
        self.config = config

    def backward(
        self, student: Learner, critic: Learner | None, batch: Batch, generator: torch.Generator
    ) -> dict[str, torch.Tensor]:
        """Add the gradients of the loss. Returns the figure "loss"."""
        assert batch.real is not None
        images, augment_labels = batch.real, None
        if self.config.augment:
            images, augment_labels = augment(images, self.config.augment, generator)
        elif self.config.flip:
            images = mirrored(images, generator)
        loss = edm_loss(student, images, batch.real_labels, generator, augment_labels)
        (batch.weight * loss).backward()
        return {"loss": loss.detach()}


def edm_loss(
    denoiser: Callable[..., torch.Tensor],
    images: torch.Tensor,
    labels: torch.Tensor | None,
    generator: torch.Generator | None = None,
    augment_labels: torch.Tensor | None = None,
    p_mean: float = -1.2,
    p_std: float = 1.2,
) -> torch.Tensor:
    """EDM's training loss, averaged over pixels and batch: ln sigma ~ N(p_mean, p_std^2), weight
    (sigma^2 + sigma_data^2) / (sigma sigma_data)^2 (Karras et al. 2022, eq. 2 and Table 1).

    `images` is (B, C, H, W) in [-1, 1], already augmented as `augment_labels` (B, A) describe. Random numbers come from
    `generator`, or from torch's global generator if it is None.
    """
    normal = torch.randn(len(images), 1, 1, 1, device=images.device, generator=generator)
    sigma = (normal * p_std + p_mean).exp()
    noise = torch.randn(images.shape, device=images.device, generator=generator) * sigma
    weight = (sigma**2 + Denoiser.sigma_data**2) / (sigma * Denoiser.sigma_data) ** 2
    return (weight * (denoiser(images + noise, sigma.flatten(), labels, augment_labels) - images) ** 2).mean()
