"""Noise levels of the EDM schedule, and the subsets of it at which a few-step student is sampled.

    sigma_i = (sigma_max^(1/rho) + i/(N-1) (sigma_min^(1/rho) - sigma_max^(1/rho)))^rho,   i = 0 ... N-1

(Karras et al. 2022, eq. 5.) Index 0 is the noisiest level: LMM's "steps (0, 1)" are the two noisiest of the N.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch

SIGMA_MIN = 0.002
SIGMA_MAX = 80.0
RHO = 7.0


def edm_sigmas(num_steps: int, sigma_min: float = SIGMA_MIN, sigma_max: float = SIGMA_MAX, rho: float = RHO) -> torch.Tensor:
    """Compute the N = `num_steps` noise levels, descending, float64 (N,). A single level is sigma_max."""
    if num_steps < 1:
        raise ValueError(f"num_steps is {num_steps}; a schedule has at least 1 level")
    if not 0 < sigma_min < sigma_max:
        raise ValueError(f"sigma_min {sigma_min} and sigma_max {sigma_max} must satisfy 0 < sigma_min < sigma_max")
    ramp = torch.arange(num_steps, dtype=torch.float64) / max(num_steps - 1, 1)
    lo, hi = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    return (hi + ramp * (lo - hi)) ** rho


def check_steps(steps: Sequence[int], num_steps: int) -> tuple[int, ...]:
    """Return `steps` as a tuple if it is a valid few-step schedule: increasing indices into `num_steps` levels, from 0.

    Raises ValueError otherwise. Sampling starts from pure noise, so the first index is always 0.
    """
    steps = tuple(int(i) for i in steps)
    if not steps or steps[0] != 0:
        raise ValueError(f"steps are {steps}; they must begin with 0, the level of pure noise, for example 0 or 0,1")
    if any(a >= b for a, b in itertools.pairwise(steps)) or steps[-1] >= num_steps:
        raise ValueError(f"steps are {steps}; they must rise strictly and stay below the schedule's {num_steps} levels")
    return steps
