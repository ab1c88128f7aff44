"""Continuous-time consistency models, sCM (Lu & Song 2025), for denoisers.

A consistency function f(x, t) is constant along the ODE dx / d ln t = x - D*(x; t): its derivative D' along the ODE is 0.
With TrigFlow's angle, tan(theta) = t / sigma_data, the paper's tangent (algorithm 1) becomes, for a denoiser D,

    h = [(1 - r) cos^2(theta) (D - ref) + r D'] / sin(theta),    ref = D*(x; t) (sCD) or x1 (sCT)

and the loss is a regression of the network's raw output F = (cos(theta) x - D) / (sigma_data sin(theta)) on F + h:

    L = w / exp(lv(t)) mean (((D - sg D) / (sigma_data sin(theta)) + sg h)^2) + lv(t)

r rises from 0 to 1 in the first steps (tangent warm-up), h may be normalised, w is 1 or 1/t, and lv is a learned weighting. D'
is taken along x - ref. With a teacher this is the ODE's velocity; without one it is t z, whose mean, given x, is that velocity.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Annotated, Literal

import torch
from torch import nn

from beeline.denoiser import Denoiser
from beeline.objectives import Batch, Context, Needs, Objective, ObjectiveConfig, lines
from beeline.objectives.derivative import Derivative
from beeline.objectives.learner import Learner
from beeline.sampling.few_step import FewStep
from beeline.schedule import RHO, SIGMA_MAX, SIGMA_MIN
from beeline.settings import Amount, Positive, Range, Share, Steps, Whole

SIGMA_DATA = Denoiser.sigma_data
TEACHER = "teacher"
REFERENCES = {"teacher": "sCD", "data": "sCT"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class SCMConfig(ObjectiveConfig):
    """Continuous-time consistency distillation (sCD) or training (sCT). The defaults are the published settings for CIFAR-10,
    except `tangent_warmup`, which is 10,000 steps there."""

    num_steps: Steps = 18
    """Levels of the schedule to which the indices of few-step schedules refer."""
    reference: Literal["teacher", "data"] = "teacher"
    """Velocity of the path: the teacher's (sCD), or that of the noisy image itself (sCT)."""
    levels: Literal["normal", "schedule"] = "normal"
    """Distribution of the training levels t: ln t ~ N(p_mean, p_std^2), or t^(1/7) uniform, as in the EDM schedule."""
    p_mean: float = -1.0
    p_std: Positive = 1.4
    tangent_warmup: Whole = 0
    """Steps in which r rises from 0 to 1."""
    tangent_weight: Share = 1.0
    """r after the warm-up. Below 1, D stays closer to `ref` at low levels, whose errors pass on to all higher ones."""
    secant: Annotated[float, Range(0, 2)] = 0.0
    """Step in ln t, towards the image, of a one-sided difference in place of D'; 0 for the derivative. It damps errors, which a
    derivative only moves to higher levels, and costs one evaluation less. 0.5 makes D at the other end the target."""
    normalisation: Amount | None = 0.1
    """c of h / (rms(h) + c), per image; None leaves h as it is."""
    clamp: Amount = 0.0
    """Largest absolute value of an entry of h; 0 for no limit."""
    weight: Literal["uniform", "1/t"] = "1/t"
    learned_weight: bool = True
    """Divide the loss at each level by its learned mean (Karras et al. 2024, eq. 14)."""
    derivative: Derivative = "difference"

    def needs(self) -> Needs:
        """Real images; for sCD the teacher too."""
        return Needs(images=True, models=(TEACHER,) if self.reference == "teacher" else ())

    def sampling(self) -> FewStep:
        """Sampling with fresh noise, at any levels."""
        return FewStep(num_steps=self.num_steps, rule="fresh_noise", line="ve", trained_steps=None)

    def about(self) -> str:
        """Describe the objective for the report."""
        return f"continuous-time consistency, {REFERENCES[self.reference]}"

    def build(self, context: Context) -> SCM:
        """Build the objective."""
        return SCM(self, context)


class LogVariance(nn.Module):
    """The learned weighting lv(t): logarithm of the mean weighted loss at level t. It starts at 0."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(1, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 1))
        nn.init.zeros_(self.layers[-1].weight)  # pyright: ignore[reportArgumentType]
        nn.init.zeros_(self.layers[-1].bias)  # pyright: ignore[reportArgumentType]

    def forward(self, sigma: torch.Tensor) -> torch.Tensor:
        """Map levels (B,) to lv (B,)."""
        return self.layers(sigma.log().reshape(-1, 1) / 4).flatten()


def tangent(denoised: torch.Tensor, reference: torch.Tensor, rate: torch.Tensor, sigma: torch.Tensor, r: float) -> torch.Tensor:
    """Compute h (B, C, H, W) from D, ref and D', all (B, C, H, W), at levels `sigma` (B,), with `r` in [0, 1]."""
    t = sigma.reshape(-1, 1, 1, 1)
    cosine2 = SIGMA_DATA**2 / (t**2 + SIGMA_DATA**2)
    return ((1 - r) * cosine2 * (denoised - reference) + r * rate) / sine(sigma)


def sine(sigma: torch.Tensor) -> torch.Tensor:
    """sin(theta), (B, 1, 1, 1), of levels (B,)."""
    t = sigma.reshape(-1, 1, 1, 1)
    return t / (t**2 + SIGMA_DATA**2).sqrt()


class SCM(Objective):
    """Training step of continuous-time consistency."""

    def __init__(self, config: SCMConfig, context: Context) -> None:
        self.config = config
        self.teacher = context.models[TEACHER] if config.reference == "teacher" else None
        self.log_variance = LogVariance() if config.learned_weight else None

    def state(self) -> nn.Module | None:
        """The learned weighting. It trains with the student."""
        return self.log_variance

    def backward(
        self, student: Learner, critic: Learner | None, batch: Batch, generator: torch.Generator
    ) -> dict[str, torch.Tensor]:
        """Add the gradients of the loss. Figures: "loss", and the mean square of h, "tangent", before normalisation."""
        assert batch.real is not None
        config, real = self.config, batch.real
        sigma = self._draw_levels(batch.size, generator)
        x = lines.point(real, torch.randn(real.shape, generator=generator, device=real.device), sigma, "ve")
        labels = batch.real_labels
        with torch.no_grad():
            reference = real if self.teacher is None else self.teacher(x, sigma, labels)
        output = student(x, sigma, labels)
        value, velocity = output.detach(), x - reference
        if config.secant:
            shrunk = math.exp(-config.secant)
            behind = student.target(x - (1 - shrunk) * velocity, shrunk * sigma, labels)
            rate = (value - behind) / config.secant
        else:
            _, rate = student.rate(x, sigma, labels, velocity, derivative=config.derivative, value=value)
        r = config.tangent_weight * min(1.0, (batch.step + 1) / max(config.tangent_warmup, 1))
        raw = tangent(value, reference, rate, sigma, r)
        h = self._limited(raw)
        error = ((output - value) / (SIGMA_DATA * sine(sigma)) + h).square().mean(dim=(1, 2, 3))
        loss = self.weighted(error, sigma).mean()
        (batch.weight * loss).backward()
        return {"loss": loss.detach(), "tangent": raw.square().mean()}

    def _draw_levels(self, count: int, generator: torch.Generator) -> torch.Tensor:
        """Training levels (B,), within the sampling range."""
        config, device = self.config, generator.device
        if config.levels == "schedule":
            low, high = SIGMA_MIN ** (1 / RHO), SIGMA_MAX ** (1 / RHO)
            return (low + (high - low) * torch.rand(count, generator=generator, device=device)) ** RHO
        normal = torch.randn(count, generator=generator, device=device)
        return (config.p_mean + config.p_std * normal).exp().clamp(SIGMA_MIN, SIGMA_MAX)

    def _limited(self, h: torch.Tensor) -> torch.Tensor:
        """h, clamped and normalised as the settings say."""
        config = self.config
        if config.clamp:
            h = h.clamp(-config.clamp, config.clamp)
        if config.normalisation is not None:
            h = h / (h.square().mean(dim=(1, 2, 3), keepdim=True).sqrt() + config.normalisation)
        return h

    def weighted(self, error: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        """The loss per image (B,), from the mean squared error (B,)."""
        if self.config.weight == "1/t":
            error = error / sigma
        if self.log_variance is None:
            return error
        variance = self.log_variance(sigma)
        return error / variance.exp() + variance
