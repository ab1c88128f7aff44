"""Frozen feature networks: perceptual losses, discriminators and metrics see images through them.

All obey one small protocol. probe.py holds the network that needs no download: a small classifier that is trained on the
real images. backbones.py holds pretrained networks for losses, measuring.py those for metrics.
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
        """Channels of each feature map of `taps`."""
        ...

    @property
    def tap_strides(self) -> tuple[int, ...]:
        """Pixels of the image from one place of each feature map to the next."""
        ...

    @property
    def tap_weights(self) -> tuple[torch.Tensor, ...] | None:
        """How much each channel of each tap counts in a perceptual distance, (C_l,) each; None: all the same."""
        ...

    def taps(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Feature maps (B, C_l, H_l, W_l) of images (B, C, H, W) in [-1, 1], shallow to deep."""
        ...


class Frozen:
    """A feature network that is only looked through: a copy on `device` in eval mode, channels last, in `dtype`, compiled if
    asked. Taps come in `dtype`; gradients reach the images and stop there."""

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
        made = copy.deepcopy(cast(nn.Module, network)).eval().requires_grad_(False)
        made = made.to(device, dtype, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        taps = cast(FeatureNetwork, made).taps
        self._taps = torch.compile(taps, dynamic=False) if compiled else taps

    def taps(self, images: torch.Tensor) -> list[torch.Tensor]:
        """As the network's own, of images (B, C, H, W) in [-1, 1] of any precision."""
        return self._taps(images.to(self.dtype, memory_format=torch.channels_last))


def resized(images: torch.Tensor, side: int) -> torch.Tensor:
    """Images (B, C, H, W) at `side` pixels, bilinear; unchanged if `side` is 0 or what they have."""
    if side in (0, images.shape[-1]):
        return images
    return bilinear(images, (side, side), align_corners=False)


def bilinear(maps: torch.Tensor, size: tuple[int, int], *, align_corners: bool) -> torch.Tensor:
    """`F.interpolate` of maps (B, C, H, W) to `size`, as two matrix products.

    On a GPU the gradient of `F.interpolate` is either not deterministic or slow; products are neither.
    """
    with torch.autocast(maps.device.type, enabled=False):
        down, across = (_weights(old, new, maps, align_corners) for old, new in zip(maps.shape[2:], size, strict=True))
        return down.T @ (maps @ across)


def _weights(old: int, new: int, like: torch.Tensor, align_corners: bool) -> torch.Tensor:
    """What linear interpolation from `old` to `new` places makes of the identity: (old, new)."""
    with torch.no_grad():
        identity = torch.eye(old, device=like.device)[None]
        return F.interpolate(identity, new, mode="linear", align_corners=align_corners)[0].to(like.dtype)
