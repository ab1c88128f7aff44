"""Distances d of the line loss, in pixels or in features of a frozen network: per image, (B,), for images in [-1, 1]."""

from __future__ import annotations

import math

import torch

from beeline.features import FeatureNetwork, resized

JOHNSON_TAPS = 4


def l2(images: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Compute the mean squared pixel difference per image, (B,), of two (B, C, H, W)."""
    return (images - targets).square().mean(dim=(1, 2, 3))


def pseudo_huber(images: torch.Tensor, targets: torch.Tensor, *, c: float | None = None) -> torch.Tensor:
    """Compute sqrt(|a - b|^2 + c^2) - c, by default with c = 0.00054 sqrt(C H W), per image (B,). It grows linearly for large
    distances, so that single bad images do not dominate (Song & Dhariwal 2023, section 3.3). With c near 0 it is the norm;
    unlike that, it has a gradient where images and targets are equal."""
    c = 0.00054 * math.sqrt(images[0].numel()) if c is None else c
    return ((images - targets).square().sum(dim=(1, 2, 3)) + c * c).sqrt() - c


def perceptual(
    network: FeatureNetwork, images: torch.Tensor, targets: torch.Tensor, *, pixel_weight: float = 0.0, side: int = 0
) -> torch.Tensor:
    """Compute the feature distance per image, (B,): squared differences of channel-normalised feature maps, weighted by channel
    and summed over channels, averaged over space and summed over taps (LPIPS; Zhang et al. 2018, eq. 1).

    With VGG16 and its learned channel weights this is LPIPS; networks without such weights weight all channels equally. Images
    are resized to `side` pixels for the network. `pixel_weight` times the pixel distance at their own size is added, to
    cover differences that the features miss.
    """
    with torch.no_grad():
        target_taps = network.taps(resized(targets, side))
    total = pixel_weight * l2(images, targets)
    weights = network.tap_weights or [None] * len(target_taps)
    for ours, theirs, weight in zip(network.taps(resized(images, side)), target_taps, weights, strict=True):
        difference = (_unit(ours) - _unit(theirs)).square()
        if weight is not None:
            difference = difference * weight[:, None, None]
        total = total + difference.sum(dim=1).mean(dim=(1, 2))
    return total


def johnson(
    network: FeatureNetwork, images: torch.Tensor, targets: torch.Tensor, *, pixel_weight: float = 0.0, side: int = 0
) -> torch.Tensor:
    """Compute the feature reconstruction loss per image, (B,): mean squared difference of unnormalised feature maps, summed
    over the first four taps (Johnson et al. 2016, eq. 2; with VGG16: relu1_2, relu2_2, relu3_3, relu4_3, the layers of their
    loss network). `side` and `pixel_weight` as in `perceptual`.
    """
    with torch.no_grad():
        target_taps = network.taps(resized(targets, side))[:JOHNSON_TAPS]
    total = pixel_weight * l2(images, targets)
    for ours, theirs in zip(network.taps(resized(images, side)), target_taps, strict=False):
        total = total + (ours.float() - theirs.float()).square().mean(dim=(1, 2, 3))
    return total


def _unit(features: torch.Tensor) -> torch.Tensor:
    features = features.float()
    return features / (features.square().sum(dim=1, keepdim=True) + 1e-10).sqrt()
