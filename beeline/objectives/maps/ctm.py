"""Consistency trajectory models (Kim et al. 2024): the student jumps from any level of the teacher's ODE to any lower one.

The student g(x, t, s) takes a second level. Its jump is the point at level s of the line through x and g (eq. 9):

    G(x, t -> s) = (s/t) x + (1 - s/t) g(x, t, s)

g(x, t, 0) is a consistency model, g(x, t, t) a denoiser. From x_t = x1 + t z the teacher's solver takes h steps to x_u, from
where the student jumps to s without gradients. This must end at the same point as the student's jump from t to s. As levels
differ in scale, a slow average of the student, G_mu, maps both points to clean images (eq. 12 and 13):

    L = d( G_mu(G(x_t, t -> s), s -> 0), G_mu(sg G(x_u, u -> s), s -> 0) ) + a |g(x, t, t) - x1|^2 + b L_adv

The second term is EDM's denoising loss (eq. 14), the third a discriminator on the first argument of d (eq. 15). Their weights
a and b are balanced by the gradients of the last layer (eq. 16). The paper's levels end at 0.002, these at 0, where the
denoiser's jump is exact.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import nn

from beeline.augmentation import mirrored
from beeline.denoiser import Denoiser
from beeline.objectives import Batch, Context, Needs, Objective, ObjectiveConfig, Turns
from beeline.objectives.adversarial import AdversarialSettings, balance, last_layer
from beeline.objectives.distances import DISTANCES, DistanceSettings, Kind
from beeline.objectives.ema import ema_update
from beeline.objectives.learner import Learner
from beeline.objectives.maps.flow_map import column, jump
from beeline.objectives.perceptual import l2
from beeline.sampling.few_step import FewStep
from beeline.sampling.solvers import ode_step
from beeline.schedule import RHO, SIGMA_MAX, SIGMA_MIN, edm_sigmas
from beeline.settings import Amount, Share, ShareBelow1, Steps

GOLDEN = (math.sqrt(5) - 1) / 2
P_MEAN, P_STD = -1.2, 1.2
NOISY = 0.7
"""Levels of the denoising loss: half have ln sigma ~ N(P_MEAN, P_STD^2), half are uniform in this share of the schedule, from
its noisiest level."""
Compared = Literal["images", "jumps", "predictions"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class CTMConfig(DistanceSettings, AdversarialSettings, ObjectiveConfig):
    """Consistency trajectory models. The defaults are the full loss without its adversarial term, which is a second phase.

    The cheap form has solver_steps 1, compare "predictions", denoising_weight 0 and distance "l2".
    """

    num_steps: Steps = 18
    """Levels of the EDM schedule. 0 follows as the last level."""
    solver: Literal["heun", "euler"] = "heun"
    """The teacher's solver."""
    solver_steps: Steps = 17
    """Largest number h of solver steps; the cost of a step grows with h."""
    solver_law: Literal["weighted", "mean", "constant"] = "weighted"
    """"weighted" draws h with probability proportional to h. "mean" takes the mean of that law, rounded down or up in turn, at
    the same cost. "constant" always takes `solver_steps`."""
    compare: Compared = "images"
    """"images" maps both points to level 0 by the target network. "jumps" compares the points themselves. "predictions"
    compares g with the g that leads to the target's point. The last two need no target network."""
    target_decay: ShareBelow1 = 0.999
    """Decay per step of the target network that maps to clean images; 0 means the student itself."""
    top: Share = 0.0
    """Share of the rows that start at sigma_max, where sampling starts; the others start at any level."""
    zero: Share = 0.0
    """Share of the jumps that end at 0; the others end at any level from u down to 0. With 1 this is consistency
    distillation."""
    denoising_weight: Amount = 1.0
    """Weight of the denoising loss, multiplied by its adaptive weight."""
    flip: bool = False
    """Mirror images at random, for data without a preferred side. The discriminator's `mirror` does so for its real images."""
    distance: Kind = "probe"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.solver_steps <= self.num_steps, "solver_steps", f"at most num_steps, {self.num_steps}")
        imaged = self.compare == "images" or self.zero == 1
        self.require(
            imaged or not self.adversarial_weight,
            "compare",
            "'images' or zero 1: the discriminator compares clean images",
        )

    @property
    def mapped(self) -> bool:
        """Whether a target network maps jumps to clean images."""
        return self.compare == "images" and self.zero < 1

    def needs(self) -> Needs:
        """Real images and the teacher; feature networks of the distance and the discriminator."""
        names = dict.fromkeys((*self.distance_features, *self.adversarial_features))
        return Needs(images=True, models=("teacher",), features=tuple(names), second_level=True)

    def sampling(self) -> FewStep:
        """Sampling by jumps between any levels."""
        return FewStep(num_steps=self.num_steps, rule="line", line="ve", trained_steps=None)

    def about(self) -> str:
        """Describe the objective, like "consistency trajectories, perceptual distance (probe), denoising, adversarial term"."""
        extra = [*["denoising"] * (self.denoising_weight > 0), *["adversarial term"] * (self.adversarial_weight > 0)]
        return ", ".join(["consistency trajectories", DISTANCES[self.distance], *extra])

    def build(self, context: Context) -> CTM:
        """Build the objective, with a discriminator if there is an adversarial term."""
        return CTM(self, context)

    def representative(self) -> CTMConfig:
        """Replace weights and shares by defaults that do not affect the cost, and the draws of h by their mean."""
        return dataclasses.replace(
            self,
            solver_law="constant" if self.solver_law == "constant" else "mean",
            flip=False,
            pixel_weight=0.0,
            top=0.0,
            zero=float(self.zero == 1),
            target_decay=0.999 if self.target_decay else 0.0,
            denoising_weight=float(self.denoising_weight > 0),
            **self.adversarial_cost,
        )


class CTM(Objective):
    """Training step of consistency trajectory models."""

    def __init__(self, config: CTMConfig, context: Context) -> None:
        self.config = config
        self._teacher = context.models["teacher"]
        self._distance = config.build_distance(context)
        self.target: Denoiser | None = None
        if config.mapped and config.target_decay:
            self.target = copy.deepcopy(context.average).requires_grad_(False)
        self.adversary = config.build_adversary(context)
        if self.adversary is not None:
            self.critic, self.critic_optimizer = self.adversary.discriminator, self.adversary.optimizer

    def turns(self, step: int) -> Turns:
        """Student and critic learn in every step. Steps differ in cost by the solver's steps."""
        return Turns(work=self.solver_steps(step))

    def solver_steps(self, step: int) -> int:
        """Number h of solver steps in `step` of the phase, for the whole batch on all ranks.

        A golden-ratio sequence in place of random numbers: it follows the law also in short runs, and needs no
        synchronisation.
        """
        most = self.config.solver_steps
        if self.config.solver_law == "constant":
            return most
        if self.config.solver_law == "mean":
            return (2 * most + 1) * (step + 1) // 3 - (2 * most + 1) * step // 3
        u = (step + 0.5) * GOLDEN % 1
        return next(h for h in range(1, most + 1) if u < h * (h + 1) / (most * (most + 1)) or h == most)

    def after_step(self, student: nn.Module) -> None:
        """Move the target network towards the student."""
        if self.target is not None:
            ema_update(self.target, student, math.log(0.5) / math.log(self.config.target_decay), 0, 0.0)

    def state(self) -> nn.Module | None:
        """The target network."""
        return self.target

    def backward(
        self, student: Learner, critic: Learner | None, batch: Batch, generator: torch.Generator
    ) -> dict[str, torch.Tensor]:
        """Compute gradients. Figures: "trajectory", "denoising", those of the discriminator, and the adaptive weights.

        One call of the student serves the jumps and the denoising loss, as parallel training requires. With dropout, the
        estimate and its target therefore share a mask only without the denoising loss.
        """
        assert batch.real is not None
        config, labels = self.config, batch.real_labels
        x1 = mirrored(batch.real, generator) if config.flip else batch.real
        path, s = self._levels(batch, generator)
        t, x_t = path[0], noisy(x1, path[0], generator)
        x, sigma, to, classes, v = x_t, t, s, labels, denoising_levels(batch.size, generator)
        if config.denoising_weight:
            x, sigma, to = torch.cat([x_t, noisy(x1, v, generator)]), torch.cat([t, v]), torch.cat([s, v])
            classes = None if labels is None else torch.cat([labels, labels])
        output = student(x, sigma, classes, None, to)

        estimate, target = self._ends(student, output[: batch.size], x_t, path, s, labels)
        loss = self._distance(estimate, target).mean()
        (reference,) = torch.autograd.grad(loss, output, retain_graph=True)
        figures, total, last = {"trajectory": loss}, reference, last_layer(student.model)
        if config.denoising_weight:
            figures["denoising"] = edm_weighted(output[batch.size :], x1, v)
            (gradient,) = torch.autograd.grad(figures["denoising"], output)
            figures["denoising_lambda"] = balance(output, reference, gradient, last, least=0.0, most=1e4)
            total = total + config.denoising_weight * figures["denoising_lambda"] * gradient
        if self.adversary is not None:
            assert critic is not None
            figures["adversarial"], fake = self.adversary.fool(critic, estimate, labels, generator)
            (gradient,) = torch.autograd.grad(figures["adversarial"], output)
            figures["lambda"] = balance(output, reference, gradient, last)
            total = total + config.adversarial_weight * figures["lambda"] * gradient
            figures |= self.adversary.teach(critic, fake, labels, batch, generator)
        output.backward(batch.weight * total)
        return {name: value.detach() for name, value in figures.items()}

    def _levels(self, batch: Batch, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw the levels that the solver passes, from t down to u, (h + 1, B), and the level s of the jump's end, (B,)."""
        config, size, device = self.config, batch.size, generator.device
        h = self.solver_steps(batch.step)
        levels = torch.cat([edm_sigmas(config.num_steps), torch.zeros(1)]).to(device=device, dtype=torch.float32)
        end = config.num_steps  # index of level 0
        at, below, from_top, to_zero = torch.rand(4, size, generator=generator, device=device)
        first = torch.where(from_top < config.top, 0, (at * (end - h + 1)).long().clamp_max(end - h))
        last = (first + h + (below * (end - h - first + 1)).long()).clamp_max(end)
        last = torch.where(to_zero < config.zero, end, last)
        return levels[first + torch.arange(h + 1, device=device)[:, None]], levels[last]

    def _ends(
        self,
        student: Learner,
        prediction: torch.Tensor,
        x_t: torch.Tensor,
        path: torch.Tensor,
        s: torch.Tensor,
        labels: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute the first argument of the distance, with gradients, and the second, both (B, C, H, W).

        `prediction` is g(x_t, t, s). `path` (h + 1, B) are the solver's levels.
        """
        t, x_u = path[0], x_t
        for sigma, following in itertools.pairwise(path):
            x_u = ode_step(self._teacher, x_u, sigma, following, labels, solver=self.config.solver)
        with torch.no_grad():
            end = travel(student.target, x_u, path[-1], s, labels)
            if self.config.compare == "predictions":
                ratio = column(s / t)
                return prediction, (end - ratio * x_t) / (1 - ratio)
        start = jump(x_t, prediction, t, s)
        if not self.config.mapped:
            return start, end

        def target(*inputs: torch.Tensor | None) -> torch.Tensor:
            if self.target is None:
                return student.frozen(*inputs)
            with student.autocast():
                return self.target(*inputs)

        zero = torch.zeros_like(s)
        with torch.no_grad():
            mapped = travel(target, end, s, zero, labels)
        return travel(target, start, s, zero, labels), mapped


def travel(
    denoiser: Callable[..., torch.Tensor], x: torch.Tensor, sigma: torch.Tensor, to: torch.Tensor, labels: torch.Tensor | None
) -> torch.Tensor:
    """Jump from `x` (B, C, H, W) at level `sigma` (B,) to level `to` (B,) by a flow map. Rows at level 0 stay as they are."""
    moving = sigma > 0
    level = torch.where(moving, sigma, 1.0)  # a denoiser refuses level 0
    end = jump(x, denoiser(x, level, labels, None, to), level, to)
    return torch.where(column(moving), end, x)


def noisy(x1: torch.Tensor, sigma: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Add new noise of level `sigma` (B,) to images `x1` (B, C, H, W)."""
    return x1 + column(sigma) * torch.randn(x1.shape, generator=generator, device=x1.device)


def denoising_levels(count: int, generator: torch.Generator) -> torch.Tensor:
    """Draw levels of the denoising loss, float32 (count,): half lognormal as in EDM, half uniform over the noisiest 70 % of
    the schedule."""
    normal = torch.randn(count, generator=generator, device=generator.device)
    ramp = NOISY * torch.rand(count, generator=generator, device=generator.device)
    lo, hi = SIGMA_MIN ** (1 / RHO), SIGMA_MAX ** (1 / RHO)
    coin = torch.rand(count, generator=generator, device=generator.device) < 0.5
    return torch.where(coin, (P_STD * normal + P_MEAN).exp(), (hi + ramp * (lo - hi)) ** RHO)


def edm_weighted(images: torch.Tensor, x1: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """Mean squared error with EDM's weight (Karras et al. 2022, Table 1)."""
    weight = (sigma**2 + Denoiser.sigma_data**2) / (sigma * Denoiser.sigma_data) ** 2
    return (weight * l2(images, x1)).mean()
