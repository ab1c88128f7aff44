"""Derivative of a denoiser along a path of noisy images, for training continuous-time consistency models and flow maps.

    D'(x, sigma) = d/du D(x + u v; sigma e^u)  at u = 0

is the derivative along (dx, d ln sigma) = (v, 1). With v = x - D*(x; sigma) the path is the teacher's probability-flow ODE.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Literal

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from beeline.denoiser import Denoiser
from beeline.networks.layers import GroupNorm

Derivative = Literal["difference", "jvp"]
STEP = 1e-2
"""Step in ln sigma of the central difference. In float32 its error is 1e-4 to 4e-4 for sigma in .1 ... 60 on the network of the
digits. Smaller steps lose digits, larger ones add curvature error. NCSN++ embeds sigma with frequencies up to a few hundred per
unit of ln sigma; there the error is 1 % or more, and "jvp" is the better choice."""


@torch.no_grad()
def rate(
    denoiser: Denoiser,
    x: torch.Tensor,
    sigma: torch.Tensor,
    labels: torch.Tensor | None,
    velocity: torch.Tensor,
    *,
    to: torch.Tensor | None = None,
    derivative: Derivative = "difference",
    value: torch.Tensor | None = None,
    mask: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute D (B, C, H, W) and D' (B, C, H, W), without gradients, at noisy images `x` (B, C, H, W) and levels `sigma` (B,),
    along `velocity` = dx / d ln sigma (B, C, H, W). A second level `to` (B,) stays constant.

    "difference" takes two more evaluations, always in float32, even under autocast. "jvp" takes one pass of forward-mode
    differentiation at the cost of three, in any precision; `denoiser` must not be wrapped for parallel training. `value` is
    D where it is known already: it saves "difference" an evaluation. Each evaluation runs in a context `mask()`, which
    gives all of them the same dropout mask: between two masks, a difference is not a derivative.
    """
    levels = sigma.reshape(-1, 1, 1, 1)
    if derivative == "difference":
        exact = torch.autocast(x.device.type, enabled=False)
        with exact, mask():
            ahead = denoiser(x + STEP * velocity, _scaled(levels, STEP), labels, None, to)
        with exact, mask():
            behind = denoiser(x - STEP * velocity, _scaled(levels, -STEP), labels, None, to)
        with mask():
            middle = denoiser(x, sigma, labels, None, to) if value is None else value
        return middle, (ahead - behind) / (2 * STEP)

    def at(x: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        return denoiser(x, (levels * u.exp()).flatten(), labels, None, to)

    start = torch.zeros_like(levels)
    with _forward_mode(denoiser), mask():
        results = torch.func.jvp(at, (x, start), (velocity, torch.ones_like(start)))
    return results[0], results[1]


def _scaled(levels: torch.Tensor, by: float) -> torch.Tensor:
    return (levels * torch.tensor(by).exp()).flatten()


@contextlib.contextmanager
def _forward_mode(model: nn.Module) -> Iterator[None]:
    """Prepare a network for forward-mode differentiation: plain attention, because fused kernels have no such derivative, and
    contiguous inputs for group norms, because their derivative uses a view."""
    norms = [module for module in model.modules() if isinstance(module, GroupNorm)]
    for norm in norms:
        norm.contiguous = True
    try:
        with sdpa_kernel([SDPBackend.MATH]):
            yield
    finally:
        for norm in norms:
            norm.contiguous = False
