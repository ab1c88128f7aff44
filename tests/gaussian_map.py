"""The flow map of Gaussian data in closed form, as a denoiser with a learnable deviation from it."""

from __future__ import annotations

import torch
from torch import nn

from beeline.denoiser import Denoiser

STD = 0.5
"""Standard deviation of the data, N(0, STD^2) in each pixel."""


def scale(t: torch.Tensor) -> torch.Tensor:
    """Standard deviation of noisy images at level `t`. Paths of the ODE are proportional to it."""
    return (STD**2 + t**2).sqrt()


class GaussianMap(Denoiser):
    """g(x, t, s) of the exact map plus `deviation` times three functions that change its size and its shape in t and s.

    From x_s = x scale(s) / scale(t) and the jump's definition, g = x STD^2 (t + s) / (scale(t) (t scale(s) + s scale(t))).
    """

    def __init__(self, deviation: tuple[float, float, float] = (0.0, 0.0, 0.0)) -> None:
        super().__init__(nn.Identity(), img_resolution=1, img_channels=1, label_dim=0)
        self.deviation = nn.Parameter(torch.tensor(deviation, dtype=torch.float64))

    def forward(
        self,
        x: torch.Tensor,
        sigma: torch.Tensor,
        labels: torch.Tensor | None = None,
        augment_labels: torch.Tensor | None = None,
        to: torch.Tensor | None = None,
        guidance: torch.Tensor | None = None,
        guess: torch.Tensor | None = None,
    ) -> torch.Tensor:
        x, t = x.double(), sigma.double().reshape(-1, 1, 1, 1)
        s = t if to is None else to.double().reshape(-1, 1, 1, 1)
        exact = x * STD**2 * (t + s) / (scale(t) * (t * scale(s) + s * scale(t)))
        a, b, c = self.deviation
        return exact + x / scale(t) * (a + b * (t + 0.1).log() + c * s / (s + 1))


def data(count: int, seed: int = 0) -> torch.Tensor:
    """Draw images, float64 (count, 1, 1, 1)."""
    return STD * torch.randn(count, 1, 1, 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
