"""How straight a denoiser's flow is along given lines.

For a flow Z from noise to data, straightness is the integral over t of E|(Z_1 - Z_0) - dZ_t/dt|^2 (Liu et al. 2022). On
the line x_sigma = x1 + sigma noise a denoiser's velocity differs from the line's own by (x1 - D(x_sigma; sigma)) / sigma:
the residual that is measured is |D - x1|^2, averaged over levels and divided by the variance of x1, so that 0 is
perfectly straight and 1 is as bad as always predicting the mean image.
"""

from __future__ import annotations

import torch
from torch import nn

from beeline import lines


@torch.inference_mode()
def straightness(
    denoiser: nn.Module, x1: torch.Tensor, noise: torch.Tensor, labels: torch.Tensor | None, sigmas: torch.Tensor
) -> list[float]:
    """E|D(x_sigma; sigma) - x1|^2 / Var(x1) at each level of `sigmas`, over pairs of images and noise (B, C, H, W)."""
    variance = x1.to(torch.float64).var(dim=0, correction=0).mean()
    values = []
    for sigma in sigmas.to(torch.float32):
        level = sigma.expand(len(x1))
        denoised = denoiser(lines.point(x1, noise, level, "ve"), level, labels)
        values.append(float((denoised - x1).to(torch.float64).square().mean() / variance))
    return values
