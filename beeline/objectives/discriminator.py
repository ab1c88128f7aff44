"""Discriminators on top of frozen feature networks (projected GANs; Sauer et al. 2021, 2022).

A discriminator has two halves. `look` is frozen: each critic augments and resizes the images and computes the features of its
network. `forward` is trained: heads that classify the features. The generator's step and the discriminator's step use the same
generated images, so `look` runs once for both, and the second step sends no gradient through a frozen network.

There are three kinds of critics, by the name of their feature network:

- "probe", for small images: a head of 3x3 and 1x1 convolutions on each tap;
- a pretrained backbone: a random frozen projection that mixes the taps across channels and scales, then heads that reduce
  each scale to a few logits, as in StyleGAN-XL;
- "scratch": no frozen network; a convolutional discriminator, trained as a whole.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Literal, Protocol

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm

from beeline.augmentation import Augmentation, diff_augment
from beeline.features import FeatureNetwork, bilinear, resized
from beeline.objectives.optimizer import OptimizerConfig
from beeline.settings import MAX_SIDE, Channels, Divisible, Range, Settings, Some

SCRATCH = "scratch"
WIDTHS = (64, 64, 128, 256, 512)  # channels of features at nominal sizes 128, 64, 32, 16 and 8
STRIDES = (4, 8, 16, 32)  # strides of a pyramid of taps
PYRAMID_WIDTHS = (96, 192, 384, 768)  # channels of the pyramid built from a vision transformer's taps
CLASS_MAPS = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class DiscriminatorConfig(Settings):
    """Critics of a discriminator, and their optimiser."""

    optimizer: OptimizerConfig
    networks: Some[Literal["probe", "tf_efficientnet_lite0", "deit_base_distilled_patch16_224", "scratch"]] = ("probe",)
    """Feature networks, one critic each: the losses' probe, pretrained backbones, or none ("scratch")."""
    resize: Annotated[int, Range(128, MAX_SIDE), Divisible(32)] = 224
    """Side in pixels of the images for pretrained backbones: a multiple of 32, at least 128."""
    width: Channels = 64
    """Channels of the heads on a probe."""
    augment: tuple[Literal["color", "translation", "cutout"], ...] = ("color", "translation", "cutout")
    mirror: bool = False
    """Mirror each real image with probability 1/2, for data sets whose teachers were trained on mirrored images."""


class Critic(Protocol):
    """A feature extractor and heads that classify its features."""

    def look(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Compute the frozen half: the features of augmented images (B, C, H, W)."""
        ...

    def __call__(self, look: list[torch.Tensor], one_hot: torch.Tensor | None) -> torch.Tensor:
        """Compute the trained half: logits (B, L) from the features of `look`."""
        ...


class Discriminator(nn.Module):
    """Several critics, named by `networks`; `policy` lists DiffAugment's operations, drawn separately for each critic.

    `side`: pixels of the images for pretrained backbones; a multiple of 32, at least 128. `width`: channels of a probe's heads.
    """

    def __init__(
        self,
        networks: Mapping[str, FeatureNetwork | None],
        *,
        image_shape: tuple[int, int, int],
        num_classes: int,
        policy: Sequence[Augmentation],
        side: int,
        width: int,
    ) -> None:
        super().__init__()
        self.policy = tuple(policy)
        critics: dict[str, nn.Module] = {}
        for name, network in networks.items():
            if network is None:
                critics[name] = ScratchCritic(image_shape, num_classes)
            elif name == "probe":
                critics[name] = TapCritic(network, width, num_classes)
            else:
                critics[name] = ProjectedCritic(network, side, num_classes)
        self.critics = nn.ModuleDict(critics)

    def look(self, images: torch.Tensor, generator: torch.Generator) -> list[list[torch.Tensor]]:
        """Compute each critic's features of images (B, C, H, W) in [-1, 1]; differentiable with respect to the images."""
        return [critic.look(diff_augment(images, self.policy, generator)) for critic in self._all()]

    def forward(self, looks: list[list[torch.Tensor]], one_hot: torch.Tensor | None) -> list[torch.Tensor]:
        """Compute the logits (B, L_k) of each critic, for labels one-hot (B, K) or None."""
        return [critic(look, one_hot) for critic, look in zip(self._all(), looks, strict=True)]

    def _all(self) -> list[Critic]:
        return list(self.critics.values())  # pyright: ignore[reportReturnType]


class TapCritic(nn.Module):
    """A head of spectral-norm 3x3 and 1x1 convolutions on each tap, for images too small to downsample."""

    def __init__(self, network: FeatureNetwork, width: int, num_classes: int) -> None:
        super().__init__()
        self._network = [network]  # in a list, so that it is neither saved nor trained with the critic
        self.heads = nn.ModuleList(TapHead(channels, width, num_classes) for channels in network.tap_channels)

    def look(self, images: torch.Tensor) -> list[torch.Tensor]:
        return self._network[0].taps(images)

    def forward(self, look: list[torch.Tensor], one_hot: torch.Tensor | None) -> torch.Tensor:
        return torch.cat([head(tap, one_hot) for head, tap in zip(self.heads, look, strict=True)], dim=1)


class TapHead(nn.Module):
    """Logits at every position of a feature map, with class projection (Miyato & Koyama 2018)."""

    def __init__(self, channels: int, width: int, num_classes: int) -> None:
        super().__init__()
        self.conv0 = spectral_norm(nn.Conv2d(channels, width, 3, padding=1))
        self.conv1 = spectral_norm(nn.Conv2d(width, width, 1))
        self.out = spectral_norm(nn.Conv2d(width, 1, 1, bias=False))
        self.embed = class_embedding(num_classes, width) if num_classes else None

    def forward(self, features: torch.Tensor, one_hot: torch.Tensor | None) -> torch.Tensor:
        """Map features (B, C, H, W) to logits (B, H W)."""
        x = F.leaky_relu(self.conv1(F.leaky_relu(self.conv0(features), 0.2)), 0.2)
        logits = self.out(x)
        if self.embed is not None:
            assert one_hot is not None
            classes = self.embed(one_hot)[:, :, None, None]
            logits = logits + (x * classes).sum(dim=1, keepdim=True) / math.sqrt(x.shape[1])
        return logits.flatten(1)


class ProjectedCritic(nn.Module):
    """A frozen backbone with four taps, a random projection of them, and a head on each scale."""

    def __init__(self, network: FeatureNetwork, side: int, num_classes: int) -> None:
        super().__init__()
        self._network, self.side = [network], side
        self.pyramid: Pyramid | None = None
        channels = network.tap_channels
        if network.tap_strides != STRIDES:
            self.pyramid = Pyramid(channels, network.tap_strides)
            channels = PYRAMID_WIDTHS
        self.projection = Projection(channels)
        self.heads = nn.ModuleList(DownHead(WIDTHS[level:], num_classes) for level in range(4))

    def look(self, images: torch.Tensor) -> list[torch.Tensor]:
        taps = self._network[0].taps(resized(images, self.side))
        return self.projection(taps if self.pyramid is None else self.pyramid(taps))

    def forward(self, look: list[torch.Tensor], one_hot: torch.Tensor | None) -> torch.Tensor:
        return torch.cat([head(scale, one_hot) for head, scale in zip(self.heads, look, strict=True)], dim=1)


class Pyramid(nn.Module):
    """Random frozen layers that turn four taps of a vision transformer, all at stride 16, into a pyramid at strides 4, 8, 16
    and 32: 1x1 convolutions to PYRAMID_WIDTHS channels, then a transposed convolution by 4, one by 2, none, and a 3x3
    convolution of stride 2 (as in StyleGAN-XL and CTM; the layers are those of DPT, Ranftl et al. 2021). Uses PyTorch's default
    initialisation; part of the checkpoint."""

    def __init__(self, channels: Sequence[int], strides: Sequence[int]) -> None:
        super().__init__()
        if tuple(strides) != (16,) * 4:
            raise ValueError(f"taps have strides {tuple(strides)}; expected four taps at stride 16 for a pyramid")
        fine, middle, _, coarse = PYRAMID_WIDTHS
        resize = (
            nn.ConvTranspose2d(fine, fine, 4, 4),
            nn.ConvTranspose2d(middle, middle, 2, 2),
            nn.Identity(),
            nn.Conv2d(coarse, coarse, 3, 2, 1),
        )
        self.levels = nn.ModuleList(
            nn.Sequential(nn.Conv2d(width_in, width, 1), layer)
            for width_in, width, layer in zip(channels, PYRAMID_WIDTHS, resize, strict=True)
        )
        self.requires_grad_(False)

    def forward(self, taps: list[torch.Tensor]) -> list[torch.Tensor]:
        """Map taps (B, C, H/16, W/16) to (B, PYRAMID_WIDTHS[l], H/s, W/s), s = 4, 8, 16, 32."""
        return [level(tap) for level, tap in zip(self.levels, taps, strict=True)]


class Projection(nn.Module):
    """Random frozen mixing of a pyramid of four taps: across channels by 1x1 convolutions, then across scales from coarse to
    fine (Sauer et al. 2021, section 3.2). PyTorch's default initialisation of convolutions, as in StyleGAN-XL and CTM, makes a
    head see mostly its own tap. Part of the checkpoint."""

    def __init__(self, channels: Sequence[int]) -> None:
        super().__init__()
        if len(channels) != 4:
            raise ValueError(f"found {len(channels)} taps; expected four for a projection")
        across, out = WIDTHS[:1] + WIDTHS[2:], WIDTHS[:4]
        self.across_channels = nn.ModuleList(nn.Conv2d(a, b, 1) for a, b in zip(channels, across, strict=True))
        self.across_scales = nn.ModuleList(nn.Conv2d(a, b, 1) for a, b in zip(across, out, strict=True))
        self.requires_grad_(False)

    def forward(self, taps: list[torch.Tensor]) -> list[torch.Tensor]:
        """Map taps at strides 4, 8, 16 and 32 to 64, 64, 128 and 256 channels, each at twice its tap's size."""
        scales: list[torch.Tensor] = []
        for level in (3, 2, 1, 0):
            x = self.across_channels[level](taps[level])
            if scales:
                x = x + scales[0]
            x = bilinear(x, (2 * x.shape[2], 2 * x.shape[3]), align_corners=True)
            scales.insert(0, self.across_scales[level](x))
        return scales


class DownHead(nn.Module):
    """Spectral-norm 4x4 convolutions of stride 2 through `widths`, then one without bias to the logits. With classes, the last
    one has 64 maps, and the logit is their product with the embedding of the class (Miyato & Koyama 2018)."""

    def __init__(self, widths: Sequence[int], num_classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for a, b in itertools.pairwise(widths):
            # Training needs only batch statistics; without running ones, ranks have no state to synchronise.
            layers += [
                spectral_norm(nn.Conv2d(a, b, 4, 2, 1)),
                nn.BatchNorm2d(b, track_running_stats=False),
                nn.LeakyReLU(0.2),
            ]
        self.down = nn.Sequential(*layers)
        self.out = spectral_norm(nn.Conv2d(widths[-1], CLASS_MAPS if num_classes else 1, 4, bias=False))
        self.embed = class_embedding(num_classes, CLASS_MAPS) if num_classes else None

    def forward(self, features: torch.Tensor, one_hot: torch.Tensor | None) -> torch.Tensor:
        """Map features (B, C, H, W) to logits (B, L)."""
        logits = self.out(self.down(features))
        if self.embed is not None:
            assert one_hot is not None
            logits = (logits * self.embed(one_hot)[:, :, None, None]).sum(dim=1) / math.sqrt(CLASS_MAPS)
        return logits.flatten(1)


def class_embedding(num_classes: int, width: int) -> nn.Linear:
    """Build an embedding of one-hot classes (B, K) to (B, width) that starts at N(0, 1), the scale of StyleGAN-XL's."""
    layer = nn.Linear(num_classes, width, bias=False)
    nn.init.normal_(layer.weight)
    return layer


class ScratchCritic(nn.Module):
    """A discriminator trained as a whole on pixels: it downsamples to 8 pixels per side, at least once."""

    def __init__(self, image_shape: tuple[int, int, int], num_classes: int) -> None:
        super().__init__()
        channels, side, _ = image_shape
        downs = max(1, round(math.log2(side)) - 3)
        widths = [min(512, 64 << level) for level in range(downs + 1)]
        self.stem = spectral_norm(nn.Conv2d(channels, widths[0], 3, padding=1))
        self.head = DownHead(widths, num_classes)

    def look(self, images: torch.Tensor) -> list[torch.Tensor]:
        return [images]

    def forward(self, look: list[torch.Tensor], one_hot: torch.Tensor | None) -> torch.Tensor:
        return self.head(F.leaky_relu(self.stem(look[0]), 0.2), one_hot)
