"""EDM's deterministic solvers of the probability-flow ODE, for teachers.

As in EDM, the ODE state is float64 and the network runs in float32. The calibrated solver is in adams.py.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Literal

import torch

from beeline.schedule import edm_sigmas

Solver = Literal["heun", "euler", "calibrated"]


def solve(
    denoiser: Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor],
    latents: torch.Tensor,
    labels: torch.Tensor | None,
    *,
    solver: Literal["heun", "euler"],
    num_steps: int,
) -> torch.Tensor:
    """Integrate the probability-flow ODE dx/dsigma = (x - D(x; sigma)) / sigma from sigma_max to 0.

    "heun" is Karras et al. 2022, Algorithm 1 (2 num_steps - 1 evaluations); "euler" is its first-order part (num_steps).
    Takes unit-variance noise `latents` (B, C, H, W). Returns float32 images (B, C, H, W), nominally in [-1, 1].
    """
    sigmas = [*edm_sigmas(num_steps).tolist(), 0.0]
    x = latents.to(torch.float64) * sigmas[0]

    def slope(x: torch.Tensor, sigma: float) -> torch.Tensor:
        denoised = denoiser(x.to(torch.float32), torch.full((len(x),), sigma, device=x.device), labels)
        return (x - denoised.to(torch.float64)) / sigma

    for sigma, following in itertools.pairwise(sigmas):
        d = slope(x, sigma)
        ahead = x + (following - sigma) * d
        if solver == "heun" and following > 0:
            ahead = x + (following - sigma) * (d + slope(ahead, following)) / 2
        x = ahead
    return x.to(torch.float32)


@torch.no_grad()
def ode_step(
    denoiser: Callable[..., torch.Tensor],
    x: torch.Tensor,
    sigma: torch.Tensor,
    to: torch.Tensor,
    labels: torch.Tensor | None,
    *,
    solver: Literal["heun", "euler"] = "heun",
) -> torch.Tensor:
    """Integrate the probability-flow ODE by one step, from level `sigma` (B,) to level `to` (B,), for training objectives.

    Takes and returns float32 (B, C, H, W), without gradients. `to` may be 0, where Heun's method takes its Euler step. Costs
    one evaluation for "euler", two for "heun".
    """
    sigma, end = sigma.reshape(-1, 1, 1, 1), to.reshape(-1, 1, 1, 1)
    slope = (x - denoiser(x, sigma.flatten(), labels)) / sigma
    ahead = x + (end - sigma) * slope
    if solver == "euler":
        return ahead
    at = torch.where(end > 0, end, sigma)  # no evaluation at level 0
    corrected = x + (end - sigma) * (slope + (ahead - denoiser(ahead, at.flatten(), labels)) / at) / 2
    return torch.where(end > 0, corrected, ahead)


def evaluations(solver: Solver, num_steps: int) -> int:
    """Network evaluations (NFE) per image: 2 num_steps - 1 for "heun", num_steps for the others."""
    return 2 * num_steps - 1 if solver == "heun" else num_steps
