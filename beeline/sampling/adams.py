"""An exponential Adams predictor-corrector for the probability-flow ODE: one network evaluation a step, third order.

In l = -log sigma the ODE reads dx/dl = D(x; l) - x, so between two levels

    x(l1) = e^-(l1-l0) x(l0) + integral over l0 ... l1 of e^-(l1-l) D(l) dl

exactly. D is replaced by the polynomial through the evaluations at hand: the last `predictor` of them to step ahead, and,
once the network was evaluated there, the new one and `corrector - 1` before it to correct the step. The corrected point
goes on with the evaluation of the predicted one (PEC). At the last level the denoised image is the result. The family is
that of exponential multistep methods (Hochbruck & Ostermann 2010); DPM-Solver++(2M) is its relative without a corrector.

Where the levels lie matters more than the order: `beeline.calibrate` finds them for a teacher.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

PREDICTOR, CORRECTOR = 3, 3


def check_levels(levels: Sequence[float]) -> tuple[float, ...]:
    """`levels` as a tuple, once they are known to be at least two positive, finite, strictly falling noise levels."""
    levels = tuple(float(level) for level in levels)
    if len(levels) < 2 or not all(math.isfinite(a) and a > b > 0 for a, b in itertools.pairwise(levels)):
        raise ValueError(f"levels are {levels}; expected at least two noise levels, finite, falling and above 0")
    return levels


def weights(start: float, end: float, nodes: Sequence[float]) -> np.ndarray:
    """w_j = integral over l from `start` to `end` of e^-(end-l) L_j(l), L_j the Lagrange polynomials of `nodes`; float64.

    By Gauss-Legendre quadrature of 20 points: to rounding error for the step lengths that occur (up to 11).
    """
    points, quadrature = np.polynomial.legendre.leggauss(20)
    l = start + (end - start) * (points + 1) / 2  # noqa: E741
    kernel = quadrature * (end - start) / 2 * np.exp(l - end)
    found = []
    for j, node in enumerate(nodes):
        others = [other for i, other in enumerate(nodes) if i != j]
        found.append((kernel * np.prod([(l - other) / (node - other) for other in others], axis=0)).sum())
    return np.array(found)


def adams(
    denoiser: nn.Module,
    latents: torch.Tensor,
    labels: torch.Tensor | None,
    *,
    levels: Sequence[float],
    predictor: int = PREDICTOR,
    corrector: int = CORRECTOR,
) -> torch.Tensor:
    """Integrate from `levels[0]` to `levels[-1]`, one evaluation a level; float32 images (B, C, H, W).

    `latents` (B, C, H, W): unit-variance noise. `predictor`, `corrector`: how many evaluations the polynomials go through
    (1 and more); a corrector of 0 leaves it out. The state is float64.
    """
    levels = check_levels(levels)
    x = latents.to(torch.float64) * levels[0]
    history: list[tuple[float, torch.Tensor]] = []  # (l, D), newest first

    def combined(start: float, end: float, known: Sequence[tuple[float, torch.Tensor]]) -> torch.Tensor:
        factors = weights(start, end, [node for node, _ in known])
        total = x * math.exp(start - end)
        for factor, (_, denoised) in zip(factors.tolist(), known, strict=True):
            total = total + factor * denoised
        return total

    ahead = x
    for n, sigma in enumerate(levels):
        here = -math.log(sigma)
        denoised = denoiser(ahead.to(torch.float32), torch.full((len(x),), sigma, device=x.device), labels).to(torch.float64)
        if n + 1 == len(levels):
            return denoised.to(torch.float32)
        correct = history and corrector
        x = combined(history[0][0], here, [(here, denoised), *history[: corrector - 1]]) if correct else ahead
        history = [(here, denoised), *history][: max(predictor, corrector)]
        ahead = combined(here, -math.log(levels[n + 1]), history[:predictor])
    raise AssertionError("unreachable: the last level returns")
