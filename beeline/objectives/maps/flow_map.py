"""Flow maps: the mathematics that objectives with a second noise level share.

A flow map is a denoiser with a second level, g(x, t, s). Its jump from level t to level s <= t is

    G(x, t -> s) = (s/t) x + (1 - s/t) g(x, t, s)                                          (Kim et al. 2024, eq. 9)

An exact map jumps along the ODE dx/dln t = x - D(x; t). Then g(x, t, t) = D(x; t), and g(x, t, 0) is the consistency function.
In the coordinates of flow matching, tau = t / (1 + t) and xbar = x / (1 + t), the jump is an Euler step with the average
velocity U = (xbar - g) / tau. MeanFlow and AYF are written in U. Their tangent, the residual of the exact map's equation, is

    h = (U - v) + r (tau - tau_s) dU/dtau,    v = (xbar - ref) / tau

    -tau h = (1 - r) (g - ref) + r (1 + t)/(1 + s) [(s/t) (g - ref) + (1 - s/t) g']

with g' = dg/dln t along the path dx/dln t = x - ref, s constant. `ref` is D(x; t) (distillation), or an image of which x is a
noisy version: the mean of such images is D(x; t), and h is linear in ref. r = 1 gives the exact map's equation, r = 0 flow
matching.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated, Literal

import torch

from beeline.schedule import RHO, SIGMA_MAX, SIGMA_MIN
from beeline.settings import Positive, Range, Settings, Share

FLOOR = 1e-3
"""Added to the squared error in the adaptive weight, so that it stays finite."""
Normal = tuple[Annotated[float, Range(-100, 100)], Positive]
"""Mean and standard deviation of a normal distribution."""


def column(values: torch.Tensor) -> torch.Tensor:
    """Return values per image (B,) as (B, 1, 1, 1)."""
    return values.reshape(-1, 1, 1, 1)


def jump(x: torch.Tensor, g: torch.Tensor, t: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
    """Compute G(x, t -> s) (B, C, H, W), the point at level `s` of the line through `x` and the map's output `g`, both
    (B, C, H, W). Levels are (B,), `t` above 0; `s` may be 0, where the point is `g`."""
    share = column(s / t)
    return share * x + (1 - share) * g


def to_tau(t: torch.Tensor) -> torch.Tensor:
    """Convert noise levels to the time of flow matching, in [0, 1)."""
    return t / (1 + t)


def to_level(tau: torch.Tensor) -> torch.Tensor:
    """Convert the time of flow matching to noise levels, at most SIGMA_MAX."""
    top = SIGMA_MAX / (1 + SIGMA_MAX)
    return torch.where(tau < top, tau / (1 - tau.clamp(max=top)), SIGMA_MAX)


def residual(
    g: torch.Tensor, rate: torch.Tensor, ref: torch.Tensor, t: torch.Tensor, s: torch.Tensor, r: float = 1.0
) -> torch.Tensor:
    """Compute -tau h (B, C, H, W), by which the map's output `g` exceeds the value that its equation asks for.

    `rate` is g' along x - `ref` with `s` constant; images are (B, C, H, W), levels (B,). See the module's docstring.
    """
    t, s = column(t), column(s)
    error = g - ref
    return (1 - r) * error + r * (1 + t) / (1 + s) * ((s / t) * error + (1 - s / t) * rate)


def regression(g: torch.Tensor, tangent: torch.Tensor, t: torch.Tensor, power: float = 0.0) -> torch.Tensor:
    """Compute the squared error of the regression of U on sg[U - h], summed over pixels, per image (B,).

    `g` is the map's output with gradients, `tangent` is h, both (B, C, H, W). `power` is p of the adaptive weight
    1 / (|h|^2 + 1e-3)^p (Geng et al. 2025, section 4.3): 0 leaves the square, at 1 all images pull equally hard.
    """
    moved = (g - g.detach()) / column(to_tau(t))  # -(U - sg[U]): zero, with the gradient of -U
    error = (moved - tangent).square().sum(dim=(1, 2, 3))
    return error / (error.detach() + FLOOR) ** power


@dataclasses.dataclass(frozen=True, kw_only=True)
class LevelPairSettings(Settings):
    """Distribution of the levels (t, s) of training jumps. Configs of objectives inherit it."""

    law: Literal["lognormal", "gap", "schedule"] = "lognormal"
    """"lognormal": ln t and ln s are normal, and the larger of the two levels is t. "gap": the logit of tau - tau_s is normal,
    and tau_s is uniform in the rest of the unit interval. "schedule": two uniform draws in the time of the EDM schedule, which
    puts equal weight on its steps; the noisier one is t."""
    t_normal: Normal = (-0.6, 1.6)
    """Mean and standard deviation of ln t, or of the logit of the gap."""
    s_normal: Normal = (-4.0, 1.6)
    """Mean and standard deviation of ln s, for "lognormal"."""
    top: Share = 0.0
    """Share of rows whose t is sigma_max, where sampling starts."""
    zero: Share = 0.0
    """Share of rows with s = 0, jumps to an image."""
    same: Share = 0.0
    """Share of rows with s = t: flow matching."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.zero + self.same <= 1, "zero", f"at most {1 - self.same:g}, since {self.same:g} of rows have s = t")

    def draw(self, count: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw levels t and s <= t, float32 (count,), on the generator's device. t is in [SIGMA_MIN, SIGMA_MAX]; s below
        SIGMA_MIN becomes 0."""
        t, s = self._law(count, generator)
        u = torch.rand(2, count, generator=generator, device=generator.device)
        t = torch.where(u[0] < self.top, SIGMA_MAX, t.clamp(SIGMA_MIN, SIGMA_MAX))
        s = torch.where((s < SIGMA_MIN) | (u[1] < self.zero), 0.0, torch.minimum(s, t))
        return t, torch.where(u[1] >= 1 - self.same, t, s)

    def _law(self, count: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        device = generator.device
        if self.law == "schedule":
            u = torch.rand(2, count, generator=generator, device=device)
            low, high = SIGMA_MIN ** (1 / RHO), SIGMA_MAX ** (1 / RHO)
            levels = (low + u * (high - low)) ** RHO
            return levels.amax(0), levels.amin(0)
        (mean, std), (s_mean, s_std) = self.t_normal, self.s_normal
        normal = torch.randn(2, count, generator=generator, device=device)
        if self.law == "gap":
            gap = (mean + std * normal[0]).sigmoid()
            end = (1 - gap) * torch.rand(count, generator=generator, device=device)
            return to_level(end + gap), to_level(end)
        levels = torch.stack([mean + std * normal[0], s_mean + s_std * normal[1]]).exp()
        return levels.amax(0), levels.amin(0)
