"""An exponential Adams predictor-corrector for the probability-flow ODE: one network evaluation per step, third order.

In l = -log sigma the ODE reads dx/dl = D(x; l) - x, so between two levels

    x(l1) = e^-(l1-l0) x(l0) + integral over l0 ... l1 of e^-(l1-l) D(l) dl

holds exactly. D is replaced by the polynomial through known evaluations. The predictor uses the last `predictor` of them.
Once the network is evaluated at the predicted point, the corrector repeats the step with that evaluation and the
`corrector - 1` before it. The next step starts from the corrected point, but keeps the evaluation of the predicted one (PEC).
At the last level the denoised image is the result. These are exponential multistep methods (Hochbruck & Ostermann 2010);
DPM-Solver++(2M) is one of them, without a corrector.

The choice of levels matters more than the order: `beeline.calibrate` finds good levels for a teacher.
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
    """Return `levels` as a tuple. Raises ValueError unless they are two or more finite, falling noise levels above 0."""
    levels = tuple(float(level) for level in levels)
    if len(levels) < 2 or not all(math.isfinite(a) and a > b > 0 for a, b in itertools.pairwise(levels)):
        raise ValueError(f"levels are {levels}; expected at least two noise levels, finite, falling and above 0")
    return levels


def weights(start: float, end: float, nodes: Sequence[float]) -> np.ndarray:
    """w_j = integral over l from `start` to `end` of e^-(end-l) L_j(l), L_j the Lagrange polynomials of `nodes`; float64.

    Uses Gauss-Legendre quadrature with 20 points: exact to rounding error for steps up to 11, the longest that occur.
    """
    points, quadrature = np.polynomial.legendre.leggauss(20)
    l = start + (end - start) * (points + 1) / 2  # noqa: E741
    kernel = quadrature * (end - start) / 2 * np.exp(l - end)
    integrals = []
    for j, node in enumerate(nodes):
        others = [other for i, other in enumerate(nodes) if i != j]
        integrals.append((kernel * np.prod([(l - other) / (node - other) for other in others], axis=0)).sum())
    return np.array(integrals)


def adams(
    denoiser: nn.Module,
    latents: torch.Tensor,
    labels: torch.Tensor | None,
    *,
    levels: Sequence[float],
    predictor: int = PREDICTOR,
    corrector: int = CORRECTOR,
) -> torch.Tensor:
    """Integrate from `levels[0]` to `levels[-1]`, one evaluation per level. Returns float32 images (B, C, H, W).

    `latents` is unit-variance noise (B, C, H, W). `predictor` and `corrector` are the numbers of evaluations (1 or more)
    that each polynomial passes through; `corrector` 0 disables the corrector. The state is float64.
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
