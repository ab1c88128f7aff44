"""Straightness of a denoiser's flow: along given lines, and along its own trajectories.

For a flow Z from noise to data, straightness is the integral over t of E|(Z_1 - Z_0) - dZ_t/dt|^2 (Liu et al. 2022). On both
lines of lines.py, a denoiser's velocity (x_sigma - D) / sigma differs from the line's own by (x1 - D) / sigma. So the measured
residual is |D - x1|^2, averaged over levels and divided by the variance of x1: 0 is perfectly straight, and 1 is as bad as
always predicting the mean image. Along the denoiser's own trajectory, x1 is its end point.
"""

from __future__ import annotations

import torch
from torch import nn

from beeline.objectives import lines
from beeline.sampling.solvers import solve


@torch.inference_mode()
def straightness(
    denoiser: nn.Module,
    x1: torch.Tensor,
    noise: torch.Tensor,
    labels: torch.Tensor | None,
    sigmas: torch.Tensor,
    *,
    line: lines.Line,
) -> list[float]:
    """Compute E|D(x_sigma; sigma) - x1|^2 / Var(x1) at each level of `sigmas` (N,), over pairs of images and unit-variance
    noise (B, C, H, W) on the denoiser's device. `line` places x_sigma: a student's own (`FewStep.line`), "ve" for teachers."""
    variance = x1.to(torch.float64).var(dim=0, correction=0).mean()
    values = []
    for sigma in sigmas.to(x1.device, torch.float32):
        level = sigma.expand(len(x1))
        denoised = denoiser(lines.point(x1, noise, level, line), level, labels)
        values.append(float((denoised - x1).to(torch.float64).square().mean() / variance))
    return values


@torch.inference_mode()
def trajectories(
    denoiser: nn.Module, noise: torch.Tensor, labels: torch.Tensor | None, *, num_steps: int
) -> tuple[list[float], list[float]]:
    """Compute straightness and unevenness of speed along the denoiser's own trajectories from unit-variance `noise`
    (B, C, H, W), at each of the `num_steps` levels of EDM's schedule, which Heun integrates.

    Straightness: E|D(x_sigma; sigma) - x_end|^2 / Var(x_end), where x_end is the end of the trajectory. Speed is constant if
    the remaining path, |x_sigma - x_end|, is linear in sigma (LMM, eq. 4). Unevenness is the root mean square of |x_sigma -
    x_end| sigma_max / (|x_max - x_end| sigma) - 1.
    """
    passed: dict[float, tuple[torch.Tensor, torch.Tensor]] = {}

    def watched(x: torch.Tensor, sigma: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
        denoised = denoiser(x, sigma, labels)
        passed[float(sigma[0])] = x, denoised  # Heun evaluates each level twice; the second point is the corrected one
        return denoised

    end = solve(watched, noise, labels, solver="heun", num_steps=num_steps).to(torch.float64)
    variance = end.var(dim=0, correction=0).mean()
    top = max(passed)
    whole = _norm(passed[top][0] - end)
    straight = [float((denoised.to(torch.float64) - end).square().mean() / variance) for _, denoised in passed.values()]
    uneven = [float((_norm(x - end) * top / (whole * sigma) - 1).square().mean().sqrt()) for sigma, (x, _) in passed.items()]
    return straight, uneven


def _norm(x: torch.Tensor) -> torch.Tensor:
    """Compute the norm of each image, (B,), in float64."""
    return x.to(torch.float64).flatten(1).norm(dim=1)
