"""The probe: a feature network that needs no download, a small classifier trained on the real images in seconds.

A recipe trains two probes of different architecture and seed: one for losses, one for measuring. So no metric uses features
that a loss has used.
"""

from __future__ import annotations

import itertools
import math
import operator

import torch
from torch import nn
from torch.nn import functional as F

from beeline.config import ProbeNetworkConfig
from beeline.config.networks import GROUPS


class Probe(nn.Module):
    """A convolutional classifier. Its layers are the taps; its last layer, averaged over space, is the feature vector."""

    def __init__(self, config: ProbeNetworkConfig, *, channels: int, num_classes: int) -> None:
        super().__init__()
        self.config = config
        self.channels, self.num_classes = channels, num_classes
        widths = (channels, *config.widths)
        self.convs = nn.ModuleList(
            nn.Conv2d(a, b, config.kernel, stride, padding=config.kernel // 2)
            for a, b, stride in zip(widths, config.widths, config.strides, strict=False)
        )
        self.norms = nn.ModuleList(nn.GroupNorm(GROUPS, width) if config.norm else nn.Identity() for width in config.widths)
        self.head = nn.Linear(config.widths[-1], num_classes)

    @property
    def tap_channels(self) -> tuple[int, ...]:
        return self.config.widths

    @property
    def tap_strides(self) -> tuple[int, ...]:
        return tuple(itertools.accumulate(self.config.strides, operator.mul))

    @property
    def tap_weights(self) -> None:
        return None

    def taps(self, images: torch.Tensor) -> list[torch.Tensor]:
        activation = {"relu": F.relu, "silu": F.silu, "gelu": F.gelu}[self.config.activation]
        maps = []
        for conv, norm in zip(self.convs, self.norms, strict=True):
            images = activation(norm(conv(images)))
            maps.append(images)
        return maps

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """Compute the feature vector (B, widths[-1]) in which distances are measured."""
        return self.taps(images)[-1].mean(dim=(2, 3))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Compute class logits (B, K)."""
        return self.head(self.features(images))


def train_probe(
    probe: Probe, images: torch.Tensor, labels: torch.Tensor, *, iterations: int, batch_size: int, lr: float, seed: int
) -> float:
    """Train the probe in place on images (n, C, H, W) in [-1, 1]. Returns its accuracy on the tenth of the images that is held
    out, or NaN if its logits are not finite.

    Augmentation: shifts of up to one pixel and noise of 0.1, so that features depend on content rather than position.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(images), generator=generator)
    held_out, rest = order[: len(order) // 10], order[len(order) // 10 :]
    optimizer = torch.optim.AdamW(probe.parameters(), lr=lr, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=iterations)
    probe.train()
    for _ in range(iterations):
        rows = rest[torch.randint(len(rest), (batch_size,), generator=generator)].to(images.device)
        x = F.pad(images[rows], (1, 1, 1, 1), mode="replicate")
        top, left = torch.randint(3, (2,), generator=generator).tolist()
        x = x[:, :, top : top + images.shape[2], left : left + images.shape[3]]
        x = x + 0.1 * torch.randn(x.shape, generator=generator).to(images.device)
        loss = F.cross_entropy(probe(x), labels[rows], label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    probe.eval().requires_grad_(False)
    held_out = held_out.to(images.device)
    with torch.inference_mode():
        logits = torch.cat([probe(images[rows]) for rows in held_out.split(1024)])
    return float((logits.argmax(1) == labels[held_out]).float().mean()) if bool(logits.isfinite().all()) else math.nan
