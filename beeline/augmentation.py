"""Augmentation: mirror images, non-leaking augmentation for teachers, and DiffAugment for discriminators.

Non-leaking augmentation (Karras et al. 2020; for diffusion: Karras et al. 2022, appendix F.2) transforms each image at random
and gives the network the parameters as 9 augmentation labels. Sampling uses labels 0: no augmentation.

Labels (B, 9), all 0 for an unchanged image: flip x, flip y, log2 scale, rotation (cos - 1, sin), anisotropy
(cos, sin of the doubled angle), translation (2).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch.nn import functional as F

Augmentation = Literal["color", "translation", "cutout"]
LABELS = 9
SCALE_STD, ANISOTROPY_STD, TRANSLATION_STD = 0.2, 0.2, 0.125


def mirrored(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Mirror each of the images (B, C, H, W) left to right with probability 1/2."""
    chosen = torch.rand(len(images), 1, 1, 1, device=images.device, generator=generator) < 0.5
    return torch.where(chosen, images.flip(-1), images)


def augment(
    images: torch.Tensor, probability: float, generator: torch.Generator | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return transformed images (B, C, H, W), in the same range, and their labels (B, 9).

    x-flips always apply to half of the images; each other transformation applies with `probability`.
    """
    batch, device = len(images), images.device

    def uniform() -> torch.Tensor:
        return torch.rand(batch, device=device, generator=generator)

    def normal() -> torch.Tensor:
        return torch.randn(batch, device=device, generator=generator)

    def chosen() -> torch.Tensor:
        return (uniform() < probability).float()

    flip_x = (uniform() < 0.5).float()
    flip_y = (uniform() < 0.5).float() * chosen()
    scale = normal() * chosen()
    rotation = (uniform() * 2 - 1) * math.pi * chosen()
    # Half of the stretches are along an axis, as in EDM; the others along any direction.
    direction = (uniform() * 2 - 1) * math.pi * (uniform() < 0.5).float()
    anisotropy = normal() * chosen()
    shift_x, shift_y = (torch.stack([normal(), normal()]) * chosen()).unbind()

    # The matrix maps an output pixel's position, in [-1, 1], to the input position of its value.
    one, zero = torch.ones(batch, device=device), torch.zeros(batch, device=device)
    inverse = _matrix(1 - 2 * flip_x, zero, zero, zero, 1 - 2 * flip_y, zero)
    size = 2 ** -(scale * SCALE_STD)
    inverse = inverse @ _matrix(size, zero, zero, zero, size, zero)
    inverse = inverse @ _rotation(-rotation)
    stretch = 2 ** -(anisotropy * ANISOTROPY_STD)
    inverse = inverse @ _rotation(direction) @ _matrix(stretch, zero, zero, zero, 1 / stretch, zero) @ _rotation(-direction)
    inverse = inverse @ _matrix(one, zero, -shift_x * 2 * TRANSLATION_STD, zero, one, -shift_y * 2 * TRANSLATION_STD)

    labels = [flip_x, flip_y, scale, rotation.cos() - 1, rotation.sin()]
    # doubled angle, because stretching along one direction is squeezing along the perpendicular one
    labels += [anisotropy * (2 * direction).cos(), anisotropy * (2 * direction).sin(), shift_x, shift_y]
    moved = torch.stack([flip_y, scale, rotation, anisotropy, shift_x, shift_y]).abs().sum(0) > 0
    flipped = torch.where(flip_x.bool()[:, None, None, None], images.flip(-1), images)
    return torch.where(moved[:, None, None, None], _warp(images, inverse), flipped), torch.stack(labels, dim=1)


def _matrix(*rows: torch.Tensor) -> torch.Tensor:
    """Build (B, 3, 3) affine matrices from the six entries of their upper rows, each (B,), row by row."""
    top = torch.stack(rows, dim=1).reshape(-1, 2, 3)
    bottom = torch.tensor([0.0, 0.0, 1.0], device=top.device).expand(len(top), 1, 3)
    return torch.cat([top, bottom], dim=1)


def _rotation(angle: torch.Tensor) -> torch.Tensor:
    zero = torch.zeros_like(angle)
    return _matrix(angle.cos(), -angle.sin(), zero, angle.sin(), angle.cos(), zero)


def _warp(images: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
    """Resample at twice the resolution, mirrored at the borders, then filter down, which gives few artefacts."""
    fine = F.interpolate(images, scale_factor=2, mode="bicubic", align_corners=False)
    grid = F.affine_grid(inverse[:, :2], list(fine.shape), align_corners=False)
    warped = F.grid_sample(fine, grid, mode="bilinear", padding_mode="reflection", align_corners=False)
    return F.interpolate(warped, size=images.shape[-2:], mode="bicubic", antialias=True, align_corners=False)


def diff_augment(images: torch.Tensor, policy: Sequence[Augmentation], generator: torch.Generator) -> torch.Tensor:
    """Augment images (B, C, H, W) differentiably before the discriminator (DiffAugment; Zhao et al. 2020).

    color: brightness +-0.5, saturation 0 to 2, contrast 0.5 to 1.5; translation: up to 12.5 % of each side, filled with zeros;
    cutout: a square of 20 % of each side becomes zero. All random numbers come from `generator`.
    """
    batch, _, height, width = images.shape

    def uniform(low: float, high: float) -> torch.Tensor:
        draw = torch.rand(batch, 1, 1, 1, generator=generator, device=images.device)
        return low + (high - low) * draw

    if "color" in policy:
        images = images + uniform(-0.5, 0.5)
        grey = images.mean(dim=1, keepdim=True)
        images = (images - grey) * uniform(0.0, 2.0) + grey
        mean = images.mean(dim=(1, 2, 3), keepdim=True)
        images = (images - mean) * uniform(0.5, 1.5) + mean
    rows = torch.arange(height, device=images.device)[None, :, None]
    cols = torch.arange(width, device=images.device)[None, None, :]
    if "translation" in policy:
        reach_y, reach_x = int(height * 0.125 + 0.5), int(width * 0.125 + 0.5)
        dy = torch.randint(-reach_y, reach_y + 1, (batch, 1, 1), generator=generator, device=images.device)
        dx = torch.randint(-reach_x, reach_x + 1, (batch, 1, 1), generator=generator, device=images.device)
        # Products with matrices of zeros and ones are exact in float32; on a GPU the gradient of indexing is slow.
        down, across = ((rows.mT == rows + dy)[:, None].to(images.dtype), (cols.mT == cols + dx)[:, None].to(images.dtype))
        with torch.autocast(images.device.type, enabled=False):
            images = down @ images @ across
    if "cutout" in policy:
        side_y, side_x = int(height * 0.2 + 0.5), int(width * 0.2 + 0.5)
        top = torch.randint(0, height + 1 - side_y % 2, (batch, 1, 1), generator=generator, device=images.device)
        left = torch.randint(0, width + 1 - side_x % 2, (batch, 1, 1), generator=generator, device=images.device)
        top, left = top - side_y // 2, left - side_x // 2
        hole = (rows >= top) & (rows < top + side_y) & (cols >= left) & (cols < left + side_x)
        images = images * ~hole[:, None]
    return images
