"""Curves of constant acceleration from noise to images (CAF; Park et al. 2024), in the coordinates of a denoiser.

From noise z at time 0 to the image x1 at time 1, with the start velocity v0 = ALPHA (y - z) towards a first guess y:

    z + v0 T + (x1 - z - v0) T^2 = (1 - A) z + T^2 x1 + ALPHA (T - T^2) y,    A = T^2 + ALPHA (T - T^2)

Multiplied by c = 1 + sigma - sigma/sigma_max, this is a denoiser's input at the level sigma = c (1 - A). T = 0 is sigma_max,
where the input is pure noise, and T = 1 is sigma = 0. With y = x1 and ALPHA = 1 the curve is the line "lerp".
"""

from __future__ import annotations

import torch

from beeline.schedule import SIGMA_MAX

ALPHA = 1.5
"""Start velocity in units of y - z; above 1 the flow slows down."""


def scale(sigma: torch.Tensor) -> torch.Tensor:
    """Factor c from the curve to a denoiser's input, in the shape of `sigma`."""
    return 1 + sigma - sigma / SIGMA_MAX


def time(sigma: torch.Tensor) -> torch.Tensor:
    """T from 0 to 1, for levels `sigma` from SIGMA_MAX to 0, in their shape."""
    share = ((1 - sigma / SIGMA_MAX) / scale(sigma)).clamp_min(0)
    return 2 * share / (ALPHA + (ALPHA**2 + 4 * (1 - ALPHA) * share).sqrt())


def level(t: torch.Tensor) -> torch.Tensor:
    """The inverse of `time`: sigma = c (1 - A)."""
    share = t**2 + ALPHA * (t - t**2)
    return (1 - share) / (share + (1 - share) / SIGMA_MAX)


def point(x1: torch.Tensor, guess: torch.Tensor, noise: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """The denoiser's input (B, C, H, W) at levels `sigma` (B,), from images, guesses and unit-variance noise."""
    sigma = sigma.reshape(-1, 1, 1, 1)
    t = time(sigma)
    return scale(sigma) * (t**2 * x1 + ALPHA * (t - t**2) * guess) + sigma * noise


def move(
    x: torch.Tensor, image: torch.Tensor, guess: torch.Tensor, noise: torch.Tensor, sigma: float, following: float
) -> torch.Tensor:
    """Move the denoiser's input `x` (B, C, H, W) from level `sigma` to `following`, with the acceleration that leads to the
    predicted `image`: a step of the paper's sampler, x + v0 dT + (T + dT/2) a dT. `noise` is what sampling started from."""
    levels = torch.tensor([sigma, following], dtype=x.dtype, device=x.device)
    (t, s), (c, d), v0 = time(levels), scale(levels), ALPHA * (guess - noise)
    start = (x / c - t**2 * image - v0 * (t - t**2)) / (1 - t**2)  # of the curve through x that ends at `image`
    return d * ((1 - s**2) * start + s**2 * image + v0 * (s - s**2))
