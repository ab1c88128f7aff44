"""Lines Matching: the student learns to predict the end x1 of a line from any point on it (Matityahu & Fattal, eq. 3).

    L_lines = E over pairs (x0, x1) and sigma of d(N(x_sigma, sigma), x1)

Points on the line between image x1 and noise x0 = sigma_max * noise, where noise ~ N(0, I):

    ve    x_sigma = x1 + sigma noise                                (for the sampling rule "same_noise")
    lerp  x_sigma = (1 - sigma/sigma_max) x1 + sigma noise          (for the sampling rule "line")

These two interpretations of the paper differ by a factor on x1 that matters only near sigma_max.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

from beeline.schedule import SIGMA_MAX, SIGMA_MIN, edm_sigmas

Line = Literal["ve", "lerp"]
LevelLaw = Literal["schedule", "sigma"]


def point(x1: torch.Tensor, noise: torch.Tensor, sigma: torch.Tensor, line: Line) -> torch.Tensor:
    """Return x_sigma (B, C, H, W) on the line from `x1` (B, C, H, W) to sigma_max * `noise` (unit variance), at `sigma`
    (B,)."""
    sigma = sigma.reshape(-1, 1, 1, 1)
    return (x1 if line == "ve" else (1 - sigma / SIGMA_MAX) * x1) + sigma * noise


def draw_levels(
    count: int, *, num_steps: int, law: LevelLaw, steps: Sequence[int] | None, generator: torch.Generator
) -> torch.Tensor:
    """Draw `count` noise levels, float32 (count,), on the generator's device.

    `steps`: sampling-optimised training (SOT), uniform over these schedule indices. Otherwise `law`: "schedule", uniform
    over all `num_steps` indices, or "sigma", uniform in [sigma_min, sigma_max].
    """
    device = generator.device
    if steps is None and law == "sigma":
        u = torch.rand(count, generator=generator, device=device)
        return SIGMA_MIN + u * (SIGMA_MAX - SIGMA_MIN)
    levels = edm_sigmas(num_steps).to(device=device, dtype=torch.float32)
    if steps is not None:
        levels = levels[list(steps)]
    return levels[torch.randint(len(levels), (count,), generator=generator, device=device)]
