"""EDM."""

from __future__ import annotations

from collections.abc import Callable

import torch

from beeline.denoiser import Denoiser


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

    `images` (B, C, H, W) in [-1, 1], augmented as `augment_labels` (B, A) say; the draws come from `generator` (torch's
    global one if None).
    """
    normal = torch.randn(len(images), 1, 1, 1, device=images.device, generator=generator)
    sigma = (normal * p_std + p_mean).exp()
    noise = torch.randn(images.shape, device=images.device, generator=generator) * sigma
    weight = (sigma**2 + Denoiser.sigma_data**2) / (sigma * Denoiser.sigma_data) ** 2
    return (weight * (denoiser(images + noise, sigma.flatten(), labels, augment_labels) - images) ** 2).mean()
