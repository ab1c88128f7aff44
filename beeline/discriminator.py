"""A discriminator that sees images through a frozen feature network (projected GANs; Sauer et al. 2021)."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm

from beeline.features import FeatureNetwork


class Head(nn.Module):
    """Spectral-norm 3x3 and 1x1 convolutions on one feature map, with class projection (Miyato & Koyama 2018)."""

    def __init__(self, channels: int, width: int, num_classes: int) -> None:
        super().__init__()
        self.conv0 = spectral_norm(nn.Conv2d(channels, width, 3, padding=1))
        self.conv1 = spectral_norm(nn.Conv2d(width, width, 1))
        self.out = spectral_norm(nn.Conv2d(width, 1, 1))
        self.embed = spectral_norm(nn.Linear(num_classes, width, bias=False)) if num_classes else None

    def forward(self, features: torch.Tensor, one_hot: torch.Tensor | None) -> torch.Tensor:
        """Feature map (B, C, H, W) to logits (B, H W)."""
        x = F.leaky_relu(self.conv1(F.leaky_relu(self.conv0(features), 0.2)), 0.2)
        logits = self.out(x)
        if self.embed is not None:
            assert one_hot is not None
            classes = self.embed(one_hot)[:, :, None, None]
            logits = logits + (x * classes).sum(dim=1, keepdim=True) / math.sqrt(x.shape[1])
        return logits.flatten(1)


class ProjectedDiscriminator(nn.Module):
    """One head for each tap of a frozen feature network; the network itself belongs to the caller and is not saved."""

    def __init__(self, network: FeatureNetwork, *, width: int, num_classes: int) -> None:
        super().__init__()
        self._network = [network]  # in a list, so that its weights are neither registered nor trained
        self.heads = nn.ModuleList(Head(channels, width, num_classes) for channels in network.tap_channels)

    def forward(self, images: torch.Tensor, one_hot: torch.Tensor | None) -> torch.Tensor:
        """Images (B, C, H, W) in [-1, 1], labels one-hot (B, K) or None, to the logits of all heads (B, L)."""
        taps = self._network[0].taps(images)
        return torch.cat([head(tap, one_hot) for head, tap in zip(self.heads, taps, strict=True)], dim=1)
