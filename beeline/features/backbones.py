"""Frozen pretrained feature networks: VGG16 for perceptual distances, EfficientNet-lite0 and DeiT for the discriminator.

Each follows the `FeatureNetwork` protocol of `beeline.features`, takes images in [-1, 1] with one channel or three, and scales
them as its weights expect. They stay in eval mode; their parameters take no gradients, but gradients reach the images.

`build_backbone` builds networks with random weights; `beeline.weights` fetches the pretrained weights and loads them.
"""

from __future__ import annotations

from typing import Any, Literal, Self

import torch
from torch import nn
from torch.nn import functional as F

from beeline.errors import BeelineError
from beeline.features.torchvision_shim import import_torchvision

# The convolutions of VGG16 (Simonyan & Zisserman 2015, configuration D), by block, with pooling between blocks.
VGG16_BLOCKS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
# timm's networks, with the arguments that select the taps: the last layer at each stride, or every third of twelve blocks.
TIMM: dict[str, dict[str, Any]] = {
    "tf_efficientnet_lite0": {"out_indices": (1, 2, 3, 4)},
    "deit_base_distilled_patch16_224": {"out_indices": (2, 5, 8, 11), "dynamic_img_size": True},
}
BACKBONES = ("vgg16", *TIMM)
VGG16_AVG = "vgg16_avg"  # VGG16 with average pooling; uses the weights of vgg16


class _Frozen(nn.Module):
    """A frozen network: `train()` keeps it in eval mode, so that no statistics are ever updated."""

    def train(self, mode: bool = True) -> Self:
        return super().train(False)


class VGG16(_Frozen):
    """VGG16 up to relu5_3, with the learned channel weights of LPIPS (Zhang et al. 2018, "lin", version 0.1).

    Parameters carry torchvision's names (`features.0.weight` ...) and `lins.0` to `lins.4`, (C_l,), non-negative.
    """

    name = "vgg16"
    tap_channels: tuple[int, ...] = tuple(widths[-1] for widths in VGG16_BLOCKS)
    tap_strides: tuple[int, ...] = (1, 2, 4, 8, 16)
    pooling: Literal["max", "average"] = "max"
    """Pooling between blocks. CTM uses "average" in its LPIPS (piq's `replace_pooling`)."""
    shift: torch.Tensor
    scale: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for widths in VGG16_BLOCKS:
            if layers:
                layers.append(nn.MaxPool2d(2))
            for width in widths:
                conv = nn.Conv2d(channels, width, 3, padding=1)
                nn.init.kaiming_normal_(
                    conv.weight, nonlinearity="relu"
                )  # with torch's default, signals would vanish with depth
                layers += [conv, nn.ReLU(inplace=True)]
                channels = width
        self.features = nn.Sequential(*layers)
        self.lins = nn.ParameterList(torch.rand(width) for width in self.tap_channels)
        self.register_buffer("shift", _per_channel((-0.030, -0.088, -0.188)), persistent=False)  # LPIPS's own scaling
        self.register_buffer("scale", _per_channel((0.458, 0.448, 0.450)), persistent=False)
        self.eval().requires_grad_(False)

    @property
    def tap_weights(self) -> tuple[torch.Tensor, ...]:
        """LPIPS's weight of each channel of each tap, (C_l,)."""
        return tuple(self.lins)

    def taps(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Compute relu1_2, relu2_2, relu3_3, relu4_3 and relu5_3, at strides 1, 2, 4, 8 and 16, of images (B, 1 or 3, H, W) in
        [-1, 1] with sides of at least 16. Raises ValueError for other shapes."""
        x = (_rgb(images) - self.shift) / self.scale
        if min(images.shape[2:]) < 16:
            raise ValueError(f"VGG16 halves images four times; found {tuple(images.shape)}, expected sides of 16 or more")
        maps = []
        for layer in self.features:
            if isinstance(layer, nn.MaxPool2d):
                maps.append(x)
                x = layer(x) if self.pooling == "max" else F.avg_pool2d(x, 2)
            else:
                x = layer(x)
        return [*maps, x]


class TimmBackbone(_Frozen):
    """A network of timm, truncated after its four taps, for images whose sides are multiples of 32.

    `tf_efficientnet_lite0` gives a pyramid: 24, 40, 112 and 320 channels at strides 4, 8, 16 and 32.
    `deit_base_distilled_patch16_224` gives its 3rd, 6th, 9th and 12th block, 768 channels each, without class and distillation
    tokens, all at stride 16; the discriminator makes a pyramid of them. At 224 pixels DeiT is the network as trained; at other
    sizes its positional embeddings are interpolated.
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, name: str) -> None:
        """Build the network with random weights. Raises BeelineError if timm or torchvision is not installed."""
        super().__init__()
        self.name = name
        import_torchvision()
        try:
            import timm  # imported here because it takes seconds and only these two networks need it
        except ModuleNotFoundError as error:
            if error.name != "timm":
                raise
            raise BeelineError(f"{name} is a network of timm, which is not installed: pip install timm") from None
        network: Any = timm.create_model(name, pretrained=False, features_only=True, **TIMM[name])
        self.network = network
        self.tap_channels: tuple[int, ...] = tuple(network.feature_info.channels())
        self.tap_strides: tuple[int, ...] = tuple(network.feature_info.reduction())
        self.register_buffer("mean", _per_channel(network.pretrained_cfg["mean"]), persistent=False)
        self.register_buffer("std", _per_channel(network.pretrained_cfg["std"]), persistent=False)
        self.eval().requires_grad_(False)

    @property
    def tap_weights(self) -> None:
        """None: only LPIPS learned channel weights."""
        return None

    def taps(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Compute maps (B, C_l, H/s_l, W/s_l), s_l the network's `tap_strides`, of images (B, 1 or 3, H, W) in [-1, 1]; H and
        W are multiples of 32. Raises ValueError for other shapes."""
        x = ((_rgb(images) + 1) / 2 - self.mean) / self.std
        height, width = images.shape[2:]
        if height % 32 or width % 32:
            raise ValueError(
                f"{self.name} takes sides that are multiples of 32; found {tuple(images.shape)}: resize the images"
            )
        return list(self.network(x))


def build_backbone(name: str) -> VGG16 | TimmBackbone:
    """Build the backbone `name`, one of BACKBONES or VGG16_AVG, with random weights, frozen, in eval mode.

    Raises BeelineError for any other name, and if a package that it needs is not installed.
    """
    if weights_of(name) not in BACKBONES:
        raise BeelineError(f"backbone {name!r} is unknown; expected one of: {', '.join(BACKBONES)}")
    return with_pooling_of(VGG16(), name) if weights_of(name) == VGG16.name else TimmBackbone(name)


def weights_of(name: str) -> str:
    """Return the name of the backbone whose weights the feature network `name` uses: its own, except for VGG16_AVG."""
    return VGG16.name if name == VGG16_AVG else name


def with_pooling_of(network: VGG16 | TimmBackbone, name: str) -> VGG16 | TimmBackbone:
    """Set the backbone's pooling to that of the feature network `name`."""
    if isinstance(network, VGG16):
        network.pooling = "average" if name == VGG16_AVG else "max"
    return network


def _per_channel(values: tuple[float, ...]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32)[None, :, None, None]


def _rgb(images: torch.Tensor) -> torch.Tensor:
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise ValueError(f"expected images (B, 1 or 3, H, W); found {tuple(images.shape)}")
    return images.expand(-1, 3, -1, -1)
