"""From noise to images: EDM's deterministic Heun and Euler solvers for teachers, the few-step sampler for students.

All take unit-variance noise `latents` (B, C, H, W) and return float32 images (B, C, H, W), nominally in [-1, 1]. The ODE
state is float64, the network runs in float32, as in EDM.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import torch

from beeline.denoiser import Denoiser
from beeline.errors import BeelineError
from beeline.noise import stream_seed, unit_noise
from beeline.sampling.adams import adams
from beeline.sampling.few_step import FewStep, few_step
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

    "heun" is Karras et al. 2022, Algorithm 1 (2 num_steps - 1 evaluations); "euler" its first-order part (num_steps).
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


def evaluations(solver: Literal["heun", "euler"], num_steps: int) -> int:
    """Network evaluations (NFE) per image of `solve`."""
    return 2 * num_steps - 1 if solver == "heun" else num_steps


def sample(
    model: Denoiser,
    indices: Sequence[int],
    labels: torch.Tensor | None,
    *,
    seed: int,
    steps: Sequence[int] | None = None,
    solver: Solver = "heun",
    num_steps: int = 18,
    how: FewStep | None = None,
) -> torch.Tensor:
    """Images (n, C, H, W) for the noise of (seed, indices): few-step where `steps` are given, else by `solver`."""
    device = next(model.parameters()).device

    def noise(which_seed: int) -> torch.Tensor:
        return torch.from_numpy(unit_noise(which_seed, indices, model.image_shape)).to(device)

    return sample_from(
        model, noise(seed), labels, steps=steps, solver=solver, num_steps=num_steps, how=how,
        fresh=lambda n: noise(stream_seed(seed, "fresh", n)),
    )  # fmt: skip


@torch.inference_mode()
def sample_from(
    model: Denoiser,
    latents: torch.Tensor,
    labels: torch.Tensor | None,
    *,
    steps: Sequence[int] | None = None,
    solver: Solver = "heun",
    num_steps: int = 18,
    how: FewStep | None = None,
    fresh: Callable[[int], torch.Tensor] | None = None,
) -> torch.Tensor:
    """As `sample`, for unit-variance noise `latents` (n, C, H, W) that is at hand; `fresh` as `few_step` takes it."""
    if steps is not None:
        how = how or model.few_step
        if how is None:
            raise BeelineError("steps were given, but this model is a teacher: use solver= and num_steps=")
        return few_step(model, latents, labels, steps=steps, how=how, fresh=fresh)
    if solver == "calibrated":
        if model.levels is None:
            raise BeelineError("this model has no calibrated levels; find them with: python -m beeline.calibrate FOLDER")
        return adams(model, latents, labels, levels=model.levels)
    return solve(model, latents, labels, solver=solver, num_steps=num_steps)


def batches(count: int, size: int) -> Iterator[range]:
    """Consecutive ranges of at most `size` covering range(count)."""
    return (range(start, min(start + size, count)) for start in range(0, count, size))


def generate(
    model: Denoiser,
    n: int,
    *,
    seed: int = 0,
    labels: torch.Tensor | None = None,
    steps: Sequence[int] | None = None,
    solver: Solver = "heun",
    num_steps: int = 18,
    batch_size: int = 256,
) -> torch.Tensor:
    """`n` images, float32 (n, C, H, W) in [-1, 1]; image i depends on (seed, i) and its label alone.

    Students: `steps` (schedule indices, one evaluation each). Teachers: `solver` "heun" (2 num_steps - 1 evaluations),
    "euler" (num_steps), or "calibrated" (one for each level that beeline.calibrate found; `num_steps` is ignored). A
    conditional model without `labels` takes class i mod K for image i.
    """
    if labels is None and model.label_dim:
        labels = torch.arange(n) % model.label_dim
    if labels is not None and len(labels) != n:
        raise ValueError(f"{len(labels)} labels for {n} images; pass one per image")
    if steps is None and model.few_step is not None:
        steps = (0,)
    parts = [
        sample(model, rows, None if labels is None else labels[rows.start : rows.stop],
               seed=seed, steps=steps, solver=solver, num_steps=num_steps)
        for rows in batches(n, batch_size)
    ]  # fmt: skip
    return torch.cat(parts).clamp(-1, 1) if parts else torch.empty(0, *model.image_shape)
