"""Non-leaking augmentation for training teachers on little data (Karras et al. 2020; for diffusion: Karras et al. 2022,
appendix F.2). Each image is transformed at random, and told to the network as 9 augmentation labels, so that label 0,
which is what sampling uses, means the data as they are.

Labels (B, 9), all 0 for an untouched image: flip x, flip y, log2 scale, rotation (cos - 1, sin), anisotropy
(cos, sin of the doubled angle), translation (2).
"""

from __future__ import annotations

import math

import torch
from torch.nn import functional as F

LABELS = 9
SCALE_STD, ANISOTROPY_STD, TRANSLATION_STD = 0.2, 0.2, 0.125


def mirrored(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Images (B, C, H, W), each mirrored left to right with probability 1/2."""
    chosen = torch.rand(len(images), 1, 1, 1, device=images.device, generator=generator) < 0.5
    return torch.where(chosen, images.flip(-1), images)


def augment(
    images: torch.Tensor, probability: float, generator: torch.Generator | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Transformed images (B, C, H, W) in the range they had, and labels (B, 9).

    x-flips happen to half of the images always; each other transformation to a share `probability`.
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

    # The matrix takes an output pixel's place, in [-1, 1], to where its value comes from.
    one, zero = torch.ones(batch, device=device), torch.zeros(batch, device=device)
    inverse = _matrix(1 - 2 * flip_x, zero, zero, zero, 1 - 2 * flip_y, zero)
    size = 2 ** -(scale * SCALE_STD)
    inverse = inverse @ _matrix(size, zero, zero, zero, size, zero)
    inverse = inverse @ _rotation(-rotation)
    stretch = 2 ** -(anisotropy * ANISOTROPY_STD)
    inverse = inverse @ _rotation(direction) @ _matrix(stretch, zero, zero, zero, 1 / stretch, zero) @ _rotation(-direction)
    inverse = inverse @ _matrix(one, zero, -shift_x * 2 * TRANSLATION_STD, zero, one, -shift_y * 2 * TRANSLATION_STD)

    labels = [flip_x, flip_y, scale, rotation.cos() - 1, rotation.sin()]
    # by the doubled angle: to stretch along one direction is to squeeze along the one across
    labels += [anisotropy * (2 * direction).cos(), anisotropy * (2 * direction).sin(), shift_x, shift_y]
    moved = torch.stack([flip_y, scale, rotation, anisotropy, shift_x, shift_y]).abs().sum(0) > 0
    flipped = torch.where(flip_x.bool()[:, None, None, None], images.flip(-1), images)
    return torch.where(moved[:, None, None, None], _warp(images, inverse), flipped), torch.stack(labels, dim=1)


def _matrix(*rows: torch.Tensor) -> torch.Tensor:
    """(B, 3, 3) from six columns (B,): the affine part, row by row."""
    top = torch.stack(rows, dim=1).reshape(-1, 2, 3)
    bottom = torch.tensor([0.0, 0.0, 1.0], device=top.device).expand(len(top), 1, 3)
    return torch.cat([top, bottom], dim=1)


def _rotation(angle: torch.Tensor) -> torch.Tensor:
    zero = torch.zeros_like(angle)
    return _matrix(angle.cos(), -angle.sin(), zero, angle.sin(), angle.cos(), zero)


def _warp(images: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
    """Resample at twice the resolution, mirrored at the borders, and filter down: few artefacts, in three library calls."""
    fine = F.interpolate(images, scale_factor=2, mode="bicubic", align_corners=False)
    grid = F.affine_grid(inverse[:, :2], list(fine.shape), align_corners=False)
    warped = F.grid_sample(fine, grid, mode="bilinear", padding_mode="reflection", align_corners=False)
    return F.interpolate(warped, size=images.shape[-2:], mode="bicubic", antialias=True, align_corners=False)
