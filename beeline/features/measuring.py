"""Feature networks for metrics: frozen networks that turn 8-bit images into features and class logits.

    probe            the measuring probe of the workspace: few features, no download
    inception        Inception v3 of 2015-12-05, 2048 features and 1008 logits: the network that defines FID, IS and KID
    dinov2_vitl14    DINOv2 ViT-L/14, 1024 features (Stein et al. 2023), and the smaller dinov2_vits14, 384 features

Real and generated images are both measured as 8-bit images. Features are float32; everything after them is float64.
"""

from __future__ import annotations

import copy
import dataclasses
import io
from collections.abc import Sequence
from typing import Any, Protocol, Self

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

from beeline.features.probe import Probe
from beeline.features.torchvision_shim import import_torchvision

DINOV2 = {"dinov2_vits14": "vit_small_patch14_dinov2", "dinov2_vitl14": "vit_large_patch14_dinov2"}
MEASURING = ("inception", *DINOV2)
GPU_BATCH = 256


@dataclasses.dataclass(frozen=True)
class Looks:
    """Output of a network for n images: `features` (n, D) float32 and, if it classifies, `logits` (n, K) float32."""

    features: np.ndarray
    logits: np.ndarray | None = None

    @staticmethod
    def join(parts: Sequence[Looks]) -> Looks:
        """Concatenate the outputs for all images, in the order of `parts`."""
        logits = [part.logits for part in parts if part.logits is not None]
        return Looks(np.concatenate([part.features for part in parts]), np.concatenate(logits) if logits else None)


class MeasuringNetwork(Protocol):
    """A network to measure in. `cpu_batch` is the fastest batch size on a CPU."""

    cpu_batch: int

    def look(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Compute features (B, D) and logits (B, K) or None of uint8 images (B, 1 or 3, H, W)."""
        ...

    def ready(self, device: torch.device) -> nn.Module:
        """Return a frozen copy on `device`, optimised for speed, whose `look` gives the same up to rounding."""
        ...


class _Frozen(nn.Module):
    """A frozen network that never leaves eval mode."""

    name: str
    resize: str
    """How images are resized for the network, recorded with results."""
    dimensions: int
    """Number of features of an image."""
    cpu_batch = 16

    def train(self, mode: bool = True) -> Self:
        return super().train(False)

    def ready(self, device: torch.device) -> nn.Module:
        """See `MeasuringNetwork`; uses the channels-last memory format."""
        return copy.deepcopy(self).to(device, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]


class Inception(_Frozen):
    """torch-fidelity's Inception v3, with TensorFlow 1's resizing to 299 pixels (the network of Heusel et al. 2017)."""

    name, resize = "inception", "TensorFlow 1 bilinear to 299"

    def __init__(self) -> None:
        super().__init__()
        import_torchvision()
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        class Network(FeatureExtractorInceptionV3):
            def load_state_dict(self, state_dict: Any, *args: Any, **kwargs: Any) -> Any:
                # The constructor always reads a file of weights, as a pickle; it gets an empty one.
                return super().load_state_dict(state_dict, *args, **kwargs) if state_dict else None

        empty = io.BytesIO()
        torch.save({}, empty)
        empty.seek(0)
        self.dimensions = 2048
        self.network = Network("inception", ["2048", "logits_unbiased"], feature_extractor_weights_path=empty)
        self.eval().requires_grad_(False)

    def look(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Compute features (B, 2048) and logits without bias (B, 1008) of uint8 images (B, 1 or 3, H, W)."""
        features, logits = self.network(images.expand(-1, 3, -1, -1))
        return features, logits

    def ready(self, device: torch.device) -> nn.Module:
        """See `MeasuringNetwork`; uses the channels-last memory format and folds each batch norm into its convolution."""
        folded = copy.deepcopy(self)
        blocks: list[Any] = [block for block in folded.network.modules() if type(block).__name__ == "BasicConv2d"]
        for block in blocks:
            block.conv, block.bn = fuse_conv_bn_eval(block.conv, block.bn), nn.Identity()
        return folded.to(device, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]


class DinoV2(_Frozen):
    """timm's DINOv2: the normalised class token of images resized to 224 pixels and normalised like ImageNet."""

    resize = "bicubic, antialiased, to 224"
    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, name: str) -> None:
        super().__init__()
        import_torchvision()
        import timm

        self.name = name
        network: Any = timm.create_model(DINOV2[name], pretrained=False, num_classes=0, dynamic_img_size=True)
        self.network, self.dimensions = network, int(network.num_features)
        for key in ("mean", "std"):
            self.register_buffer(key, torch.tensor(network.pretrained_cfg[key]).reshape(3, 1, 1), persistent=False)
        self.eval().requires_grad_(False)

    def look(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Compute features (B, D) of uint8 images (B, 1 or 3, H, W); no logits."""
        x = images.expand(-1, 3, -1, -1).to(torch.float32)
        x = F.interpolate(x, (224, 224), mode="bicubic", antialias=True, align_corners=False).clamp(0, 255) / 255
        return self.network((x - self.mean) / self.std), None


class MeasuringProbe(_Frozen):
    """A probe of the workspace, used for measuring."""

    name, resize, cpu_batch = "probe", "none", 256

    def __init__(self, probe: Probe) -> None:
        super().__init__()
        self.probe, self.dimensions = probe, probe.tap_channels[-1]
        self.eval().requires_grad_(False)

    def look(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Compute features (B, D) of uint8 images (B, C, H, W); no logits, because a probe has too few classes for a score."""
        return self.probe.features(images.to(torch.float32) / 127.5 - 1), None


MEASURING_PROBE, LOSSES_PROBE = "probe", "probe_losses"  # the two probes as measuring networks
PROBES = {MEASURING_PROBE: "measure", LOSSES_PROBE: "losses"}  # names of measuring networks, and the probes that they are


def measuring_name(network: str) -> str:
    """The measuring network with the same features as a network of losses."""
    return LOSSES_PROBE if network == "probe" else network


RESIZES: dict[str, str] = {
    **dict.fromkeys(PROBES, MeasuringProbe.resize),
    Inception.name: Inception.resize,
    **dict.fromkeys(DINOV2, DinoV2.resize),
}


def build_measuring(name: str) -> Inception | DinoV2:
    """Build the measuring network `name`, one of MEASURING, with random weights."""
    return Inception() if name == Inception.name else DinoV2(name)


class Eye:
    """A measuring network on a device, applied to batches whose size depends only on the kind of device."""

    def __init__(self, network: MeasuringNetwork, device: torch.device) -> None:
        self.device = device
        self._network: Any = network.ready(device)
        self._batch = GPU_BATCH if device.type == "cuda" else network.cpu_batch

    @torch.inference_mode()
    def look(self, images: torch.Tensor) -> Looks:
        """Compute the output for uint8 images (n, 1 or 3, H, W), in float32 (beeline.numerics: without TF32)."""
        features, logits = [], []
        for part in images.split(self._batch):
            output = self._network.look(part.to(self.device))
            features.append(output[0].to(torch.float32).cpu())
            logits += [] if output[1] is None else [output[1].to(torch.float32).cpu()]
        return Looks(torch.cat(features).numpy(), torch.cat(logits).numpy() if logits else None)
