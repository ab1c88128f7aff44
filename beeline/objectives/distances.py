"""Distances between images that objectives share: in pixels, or in features of a frozen network."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

import torch

from beeline.errors import BeelineError
from beeline.objectives import Context, perceptual
from beeline.settings import MAX_SIDE, Amount, Range, Settings

Kind = Literal["l2", "huber", "probe", "lpips", "lpips_avg", "johnson"]
Distance = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""d(images, targets), per image (B,), of two (B, C, H, W)."""
SMALLEST_VGG16 = 16  # pixels: VGG16 halves images four times
NETWORK = {"probe": "probe", "lpips": "vgg16", "lpips_avg": "vgg16_avg", "johnson": "vgg16"}
"""The feature network of each distance that needs one."""
DISTANCES = {
    "l2": "pixel distance (L2)",
    "huber": "pixel distance (Huber)",
    "probe": "perceptual distance (probe)",
    "lpips": "perceptual distance (LPIPS, VGG16)",
    "lpips_avg": "perceptual distance (LPIPS, VGG16 with average pooling)",
    "johnson": "perceptual distance (Johnson et al., VGG16)",
}


def label(settings: Mapping[str, Any]) -> str:
    """The distance of an objective with these settings (of a JSON file), in words."""
    distance, resize = settings["distance"], settings.get("resize")
    return f"{DISTANCES.get(distance, distance)}{f' at {resize}' if resize else ''}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistanceSettings(Settings):
    """Settings of a distance. Configs of objectives inherit them."""

    distance: Kind = "l2"
    """In pixels: "l2" (squared) or "huber" (pseudo-Huber). In features: "probe" (the losses' probe), "lpips" (VGG16),
    "lpips_avg" (VGG16 with average pooling, as in CTM), or "johnson" (unnormalised VGG16 features; Johnson et al. 2016, cited
    in the LMM paper)."""
    resize: Annotated[int, Range(0, MAX_SIDE)] = 0
    """Side in pixels at which features are computed; 0 keeps the images' own size."""
    pixel_weight: Amount = 0.0
    """Weight of a squared pixel distance, added to a distance in features."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(not self._too_small(self.resize or MAX_SIDE), "resize", f"{SMALLEST_VGG16} or more, for VGG16")

    @property
    def distance_features(self) -> tuple[str, ...]:
        """Feature networks that the distance needs."""
        return (NETWORK[self.distance],) if self.distance in NETWORK else ()

    def check(self, resolution: int) -> None:
        """Raise BeelineError if images are too small for the feature network of the distance."""
        if self._too_small(self.resize or resolution):
            raise BeelineError(
                f"the distance {self.distance!r} would run at {self.resize or resolution} pixels, but VGG16 halves images four "
                f"times; set the objective's resize to {SMALLEST_VGG16} or more, or choose another distance"
            )

    def build_distance(self, context: Context) -> Distance:
        """Return the distance d(images, targets), per image (B,)."""
        if self.distance == "l2":
            return perceptual.l2
        if self.distance == "huber":
            return perceptual.pseudo_huber
        network = context.features[NETWORK[self.distance]]
        features = perceptual.johnson if self.distance == "johnson" else perceptual.perceptual
        return functools.partial(features, network, pixel_weight=self.pixel_weight, side=self.resize)

    def _too_small(self, side: int) -> bool:
        return NETWORK.get(self.distance, "probe") != "probe" and side < SMALLEST_VGG16
