"""Denoisers with known outputs, in place of networks, for tests of an objective's mathematics."""

from __future__ import annotations

import abc
from typing import Any

import torch
from torch import nn

from beeline.denoiser import Denoiser


class ClosedForm(Denoiser, abc.ABC):
    """A denoiser of grey images of `side` pixels whose output is a formula, in float64."""

    def __init__(self, *, side: int = 1, model: nn.Module | None = None) -> None:
        super().__init__(model or nn.Identity(), img_resolution=side, img_channels=1, label_dim=0)

    @abc.abstractmethod
    def output(self, x: torch.Tensor, t: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        """The output (B, 1, H, W) at `x` (B, 1, H, W), levels `t` and second levels `s`, float64 (B, 1, 1, 1)."""

    def forward(
        self,
        x: torch.Tensor,
        sigma: torch.Tensor,
        labels: torch.Tensor | None = None,
        augment_labels: torch.Tensor | None = None,
        to: torch.Tensor | None = None,
        *_: Any,
        **__: Any,
    ) -> torch.Tensor:
        t, s = (level.double().reshape(-1, 1, 1, 1) for level in (sigma, sigma if to is None else to))
        return self.output(x, t, s)


class Gaussian(ClosedForm):
    """The denoiser of data N(mean, std^2) in each pixel. Both are learnable."""

    def __init__(self, std: float, mean: float = 0.0) -> None:
        super().__init__()
        self.std = nn.Parameter(torch.tensor(std, dtype=torch.float64))
        self.mean = nn.Parameter(torch.tensor(mean, dtype=torch.float64))

    def output(self, x: torch.Tensor, t: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        variance = self.std**2
        return (variance * x + t**2 * self.mean) / (variance + t**2)
