"""The flow map of Gaussian data in closed form, as a denoiser with a learnable deviation from it."""

from __future__ import annotations

import torch
from closed_form import ClosedForm
from torch import nn

STD = 0.5
"""Standard deviation of the data, N(0, STD^2) in each pixel."""


def scale(t: torch.Tensor) -> torch.Tensor:
    """Standard deviation of noisy images at level `t`. Paths of the ODE are proportional to it."""
    return (STD**2 + t**2).sqrt()


class GaussianMap(ClosedForm):
    """g(x, t, s) of the exact map plus `deviation` times three functions that change its size and its shape in t and s.

    From x_s = x scale(s) / scale(t) and the jump's definition, g = x STD^2 (t + s) / (scale(t) (t scale(s) + s scale(t))).
    """

    def __init__(self, deviation: tuple[float, float, float] = (0.0, 0.0, 0.0)) -> None:
        super().__init__()
        self.deviation = nn.Parameter(torch.tensor(deviation, dtype=torch.float64))

    def output(self, x: torch.Tensor, t: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        x = x.double()
        exact = x * STD**2 * (t + s) / (scale(t) * (t * scale(s) + s * scale(t)))
        a, b, c = self.deviation
        return exact + x / scale(t) * (a + b * (t + 0.1).log() + c * s / (s + 1))


def data(count: int, seed: int = 0) -> torch.Tensor:
    """Draw images, float64 (count, 1, 1, 1)."""
    return STD * torch.randn(count, 1, 1, 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
