"""Distances d of the line loss: pixels, or features of a frozen network."""

from __future__ import annotations

import torch

from beeline.features import FeatureNetwork


def l2(images: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Mean squared pixel difference per image, (B,), of two (B, C, H, W) in [-1, 1]."""
    return (images - targets).square().mean(dim=(1, 2, 3))


def perceptual(network: FeatureNetwork, images: torch.Tensor, targets: torch.Tensor, pixel_weight: float) -> torch.Tensor:
    """Feature distance per image, (B,): the squared difference of channel-normalised feature maps, summed over channels,
    averaged over space and summed over taps (LPIPS without learned weights; Zhang et al. 2018, eq. 1), plus
    `pixel_weight` times the pixel distance, which keeps what the features do not see.
    """
    with torch.no_grad():
        wanted = network.taps(targets)
    total = pixel_weight * l2(images, targets)
    for ours, theirs in zip(network.taps(images), wanted, strict=True):
        total = total + (_unit(ours) - _unit(theirs)).square().sum(dim=1).mean(dim=(1, 2))
    return total


def _unit(features: torch.Tensor) -> torch.Tensor:
    return features / (features.square().sum(dim=1, keepdim=True) + 1e-10).sqrt()
