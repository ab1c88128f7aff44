"""Align Your Flow (Sabour et al. 2025): a teacher's flow map, by its Eulerian (EMD) or its Lagrangian equation (LMD).

The exact map's jump G(x, t -> s) ends at the same point for all starts (x, t) on a path of the teacher's ODE. Two equations
follow, here for a denoiser g(x, t, s) with a second level (flow_map.py) and the teacher D*:

    EMD   d/dt G(x_t, t -> s) = 0 along the ODE: the tangent h of flow_map.py, with ref = D*(x; t)
    LMD   G(x, t -> s) solves the ODE in s:      g = D*(G; s) + (1 - s/t) dg/dln s

EMD moves the start of the jump and asks the teacher at noisy images. LMD moves its end and asks the teacher at the student's
points. Each is a regression of U on sg[U - h / (rms(h) + c)]. For s -> t both are flow matching: g -> D*.

Autoguidance: D* may be the extrapolation D_weak + guidance (D_teacher - D_weak) from a weaker model (Karras et al. 2024).

Adversarial fine-tuning adds the hinge loss of a discriminator and keeps the distillation loss. Its generated images are the
student's samples in one step, g(sigma_max z, sigma_max, 0).
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import torch
from torch import nn

from beeline.augmentation import mirrored
from beeline.objectives import Batch, Context, Needs, Objective, ObjectiveConfig, lines
from beeline.objectives.adversarial import AdversarialSettings, balanced_gradient, last_layer
from beeline.objectives.derivative import STEP, Derivative
from beeline.objectives.learner import Learner
from beeline.objectives.maps import flow_map
from beeline.objectives.maps.flow_map import LevelPairSettings, Normal
from beeline.sampling.few_step import FewStep
from beeline.schedule import SIGMA_MAX, SIGMA_MIN
from beeline.settings import Amount, ModelPath, Positive, Share, Steps, Whole

TEACHER = "teacher"
Law = Literal["lognormal", "gap", "schedule"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class AlignYourFlowConfig(LevelPairSettings, AdversarialSettings, ObjectiveConfig):
    """Align Your Flow. Defaults are the published ones, except `warmup`, which is 10,000 steps there."""

    num_steps: Steps = 18
    """Levels of the schedule to which the indices of few-step schedules refer."""
    equation: Literal["emd", "lmd"] = "emd"
    law: Law = "gap"
    t_normal: Normal = (-0.8, 1.0)
    r: Share = 0.99
    """Weight of the map's equation against flow matching, for "emd". Below 1 it keeps paths straight."""
    warmup: Whole = 0
    """Steps in which r rises from 0."""
    normalisation: Amount | None = 0.1
    """c of h / (rms(h) + c), per image; None leaves h as it is."""
    power: Share = 0.0
    """p of the adaptive weight 1 / (|h|^2 + 1e-3)^p, MeanFlow's alternative to `normalisation`."""
    weak: ModelPath | None = None
    """Folder of a weaker model for autoguidance, for example "students/weak"."""
    guidance: Positive = 1.0
    """Extrapolation from the weaker model; 1 is the teacher itself."""
    flip: bool = False
    """Mirror images at random, for data without a preferred side."""
    derivative: Derivative = "difference"
    """Derivative of "emd"; that of "lmd" is a difference."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require((self.weak is None) == (self.guidance == 1), "guidance", "1 without a weak model, another value with one")

    def needs(self) -> Needs:
        """Real images, the teacher, a weaker model for autoguidance, feature networks of the discriminator."""
        models = (TEACHER,) if self.weak is None else (TEACHER, self.weak)
        return Needs(images=True, models=models, features=self.adversarial_features, second_level=True)

    def sampling(self) -> FewStep:
        """Sampling by jumps, between any levels."""
        return FewStep(num_steps=self.num_steps, rule="line", line="ve", trained_steps=None)

    def about(self) -> str:
        """Describe the objective, like "flow map of the teacher (AYF-EMD), autoguidance 2, adversarial term"."""
        parts = [f"flow map of the teacher (AYF-{self.equation.upper()})"]
        parts += [] if self.weak is None else [f"autoguidance {self.guidance:g}"]
        return ", ".join([*parts, *["adversarial term"] * (self.adversarial_weight > 0)])

    def build(self, context: Context) -> AlignYourFlow:
        """Build the objective, with a discriminator if there is an adversarial term."""
        return AlignYourFlow(self, context)

    def representative(self) -> AlignYourFlowConfig:
        """Keep equation, derivative, models and discriminator, which affect the cost."""
        return AlignYourFlowConfig(
            equation=self.equation,
            derivative=self.derivative,
            weak=self.weak,
            guidance=1.0 if self.weak is None else 2.0,
            **self.adversarial_cost,
        )


class AlignYourFlow(Objective):
    """Training step of Align Your Flow."""

    def __init__(self, config: AlignYourFlowConfig, context: Context) -> None:
        self.config = config
        self._teacher = context.models[TEACHER]
        self._weak = None if config.weak is None else context.models[config.weak]
        self.adversary = config.build_adversary(context)
        if self.adversary is not None:
            self.critic, self.critic_optimizer = self.adversary.discriminator, self.adversary.optimizer

    def backward(
        self, student: Learner, critic: Learner | None, batch: Batch, generator: torch.Generator
    ) -> dict[str, torch.Tensor]:
        """Compute gradients. Figures: "tangent", the root mean square of h before normalisation, "loss" and, with a
        discriminator, its own."""
        assert batch.real is not None
        config, labels, count = self.config, batch.real_labels, batch.size
        real = mirrored(batch.real, generator) if config.flip else batch.real
        t, s = config.draw(count, generator)
        x = lines.point(real, _noise_like(real, generator), t, "ve")
        if config.equation == "lmd":  # the equation says nothing at s = 0, and networks do not resolve levels below SIGMA_MIN
            s = torch.minimum(s.clamp_min(SIGMA_MIN * math.exp(STEP)), t)
        inputs = (x, t, labels, s)
        if critic is not None:  # one call for both terms: DistributedDataParallel allows one before backward
            top = (SIGMA_MAX * _noise_like(real, generator), torch.full_like(t, SIGMA_MAX), labels, torch.zeros_like(s))
            inputs = tuple(None if a is None or b is None else torch.cat([a, b]) for a, b in zip(inputs, top, strict=True))
        output = student(*inputs[:3], None, inputs[3])
        g = output[:count]
        tangent = -self._residual(student, g.detach(), x, t, s, batch) / flow_map.column(flow_map.to_tau(t))
        size = tangent.square().mean(dim=(1, 2, 3), keepdim=True).sqrt()
        figures = {"tangent": size.mean()}
        if config.normalisation is not None:
            tangent = tangent / (size + config.normalisation)
        loss = flow_map.regression(g, tangent, t, config.power).mean()
        figures["loss"] = loss.detach()
        if critic is None:
            (batch.weight * loss).backward()
            return figures
        assert self.adversary is not None
        fooling, fake = self.adversary.fool(critic, output[count:], labels, generator)
        gradient, balance = balanced_gradient(output, loss, fooling, last_layer(student.model), config.adversarial_weight)
        output.backward(batch.weight * gradient)
        figures |= {"adversarial": fooling.detach(), "lambda": balance.detach()}
        return figures | self.adversary.teach(critic, fake, labels, batch, generator)

    def _residual(
        self, student: Learner, g: torch.Tensor, x: torch.Tensor, t: torch.Tensor, s: torch.Tensor, batch: Batch
    ) -> torch.Tensor:
        """Compute -tau h (B, C, H, W) of the equation, without gradients."""
        config, labels = self.config, batch.real_labels
        if config.equation == "lmd":
            ends = flow_map.jump(x, g, t, s)
            rate = end_rate(student, x, t, s, labels)
            return g - self._reference(ends, s, labels) - (1 - flow_map.column(s / t)) * rate
        ref = self._reference(x, t, labels)
        _, rate = student.rate(x, t, labels, x - ref, to=s, derivative=config.derivative, value=g)
        r = config.r * min(1.0, (batch.step + 1) / max(config.warmup, 1))
        return flow_map.residual(g, rate, ref, t, s, r)

    @torch.no_grad()
    def _reference(self, x: torch.Tensor, t: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
        """D*(x; t), float32 (B, C, H, W)."""
        strong = self._teacher(x, t, labels)
        if self._weak is None:
            return strong
        weak = self._weak(x, t, labels)
        return weak + self.config.guidance * (strong - weak)


def end_rate(student: Learner, x: torch.Tensor, t: torch.Tensor, s: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
    """Compute dg/dln s (B, C, H, W) at constant x and t, without gradients, by a central difference in float32."""
    model = _FullPrecision(student.model)
    later, earlier = (s * torch.tensor(by).exp() for by in (STEP, -STEP))
    difference = student.target(x, t, labels, None, later, model=model) - student.target(
        x, t, labels, None, earlier, model=model
    )
    return difference / (2 * STEP)


class _FullPrecision(nn.Module):
    """The network outside of autocast: a difference of two rounded outputs has no digits left."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: torch.Tensor, *inputs: torch.Tensor | None) -> torch.Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return self.network(x, *inputs)


def _noise_like(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(images.shape, generator=generator, device=images.device)
