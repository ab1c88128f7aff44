"""Frozen feature networks for perceptual losses, discriminators and metrics.

All follow one small protocol. probe.py holds a network that needs no download: a small classifier trained on the real images.
backbones.py holds pretrained networks for losses, measuring.py those for metrics.
"""

from __future__ import annotations

import copy
from typing import Protocol, cast

import torch
from torch import nn
from torch.nn import functional as F


class FeatureNetwork(Protocol):
    """Any frozen network with intermediate feature maps."""

    @property
    def tap_channels(self) -> tuple[int, ...]:
        """Number of channels of each feature map that `taps` returns."""
        ...

    @property
    def tap_strides(self) -> tuple[int, ...]:
        """Stride in pixels of each feature map."""
        ...

    @property
    def tap_weights(self) -> tuple[torch.Tensor, ...] | None:
        """Weight of each channel of each tap in a perceptual distance, (C_l,) each; None for equal weights."""
        ...

    def taps(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Compute feature maps (B, C_l, H_l, W_l) of images (B, C, H, W) in [-1, 1], shallow to deep."""
        ...


class Frozen:
    """A frozen feature network: a copy on `device` in eval mode, channels last, in `dtype`, optionally compiled. Taps have
    `dtype`; gradients reach the images but no parameters."""

    def __init__(
        self,
        network: FeatureNetwork,
        *,
        device: torch.device | None = None,
        dtype: torch.dtype = torch.float32,
        compiled: bool = False,
    ) -> None:
        self.tap_channels, self.tap_strides = network.tap_channels, network.tap_strides
        weights = network.tap_weights
        self.tap_weights = None if weights is None else tuple(weight.detach().to(device, copy=True) for weight in weights)
        self.dtype = dtype
        frozen = copy.deepcopy(cast(nn.Module, network)).eval().requires_grad_(False)
        frozen = frozen.to(device, dtype, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        taps = cast(FeatureNetwork, frozen).taps
        self._taps = torch.compile(taps, dynamic=False) if compiled else taps

    def taps(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Compute the network's feature maps of images (B, C, H, W) in [-1, 1] of any precision."""
        return self._taps(images.to(self.dtype, memory_format=torch.channels_last))


def pooled(network: FeatureNetwork, images: torch.Tensor) -> torch.Tensor:
    """Compute feature vectors (B, D), float32, of images (B, C, H, W): the network's last tap, averaged over space."""
    return network.taps(images)[-1].float().mean(dim=(2, 3))


def resized(images: torch.Tensor, side: int) -> torch.Tensor:
    """Resize images (B, C, H, W) bilinearly to `side` pixels; unchanged if `side` is 0 or their own size."""
    if side in (0, images.shape[-1]):
        return images
    return bilinear(images, (side, side), align_corners=False)


def bilinear(maps: torch.Tensor, size: tuple[int, int], *, align_corners: bool) -> torch.Tensor:
    """Resize maps (B, C, H, W) like `F.interpolate` to `size`, as two matrix products.

    On a GPU the gradient of `F.interpolate` is either not deterministic or slow. The products are deterministic and fast.
    """
    with torch.autocast(maps.device.type, enabled=False):
        down, across = (_weights(old, new, maps, align_corners) for old, new in zip(maps.shape[2:], size, strict=True))
        return down.T @ (maps @ across)


def _weights(old: int, new: int, like: torch.Tensor, align_corners: bool) -> torch.Tensor:
    """Build the matrix (old, new) of linear interpolation from `old` to `new` positions."""
    with torch.no_grad():
        identity = torch.eye(old, device=like.device)[None]
        return F.interpolate(identity, new, mode="linear", align_corners=align_corners)[0].to(like.dtype)
