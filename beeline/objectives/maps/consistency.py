"""Discrete consistency models (Song et al. 2023): one evaluation maps any point of an ODE path to the image at its end.

    L = E w d( f(x_t, t), sg f_mu(x_u, u) ),   x_t = x1 + t z,   0 <= u < t

f is the student, f_mu an average of it with decay mu, sg stops gradients. The boundary f(x, 0) = x is exact with EDM's
preconditioning: where u is 0, the target is x_u itself. The methods differ in x_u, in the law of (t, u), in w and in d:

    CD    x_u: one solver step of the teacher; neighbours of the EDM schedule (Song et al. 2023, eq. 7)
    CT    x_u = x1 + u z with the same z; neighbours of a schedule of N(k) levels, decay mu(k) (eq. 10, appendix C)
    iCT   as CT; other N(k), p(i), w = 1/(t - u), pseudo-Huber distance, mu = 0 (Song & Dhariwal 2023, table 1)
    ECT   as iCT; t log-normal, u = r(t) in stages, plain norm; starts from the teacher (Geng et al. 2024, section 3)

Schedules here end with u = 0 below sigma_min. With `adversarial_weight`, a discriminator compares f(x_t, t) with real images.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
from typing import Annotated, Literal

import torch
from torch import nn

from beeline.augmentation import mirrored
from beeline.denoiser import Denoiser
from beeline.objectives import Batch, Context, Needs, Objective, ObjectiveConfig, lines, perceptual
from beeline.objectives.adversarial import AdversarialSettings
from beeline.objectives.distances import DISTANCES, Distance, DistanceSettings, Kind
from beeline.objectives.ema import ema_update
from beeline.objectives.learner import Learner
from beeline.sampling.few_step import FewStep
from beeline.sampling.solvers import ode_step
from beeline.schedule import edm_sigmas
from beeline.settings import MAX_STEPS, ModelPath, Positive, Range, Share, ShareBelow1, Steps

Levels = Literal["schedule", "ct", "ict", "ect"]
SIZES: dict[Levels, tuple[int, int]] = {"ct": (2, 150), "ict": (10, 1280)}
"""Published s0 and s1 of the schedules that grow."""
NAMES: dict[Levels, str] = {"schedule": "", "ct": " with CT's levels", "ict": " with iCT's levels", "ect": " with ECT's levels"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConsistencyConfig(DistanceSettings, AdversarialSettings, ObjectiveConfig):
    """Consistency distillation and training. The defaults are ECT's."""

    teacher: ModelPath | None = None
    """Folder of the model whose ODE gives x_u (CD). None for training from data (CT, iCT, ECT)."""
    solver: Literal["heun", "euler"] = "heun"
    """Solver of the teacher's step."""
    levels: Levels = "ect"
    """Law of (t, u). "schedule": neighbours of the EDM schedule of `num_steps` levels. "ct", "ict": neighbours of a schedule
    that grows during the phase. "ect": log-normal t, and u that approaches t in `stages`."""
    num_steps: Steps = 18
    """Levels of the schedule to which step indices refer; with levels "schedule" also of the training."""
    sizes: tuple[Steps, Steps] | None = None
    """s0 and s1: first and last size of a schedule that grows. None for the published (2, 150) of CT and (10, 1280) of iCT."""
    neighbours: Literal["uniform", "lognormal"] = "uniform"
    """p(i), the probability of a pair of neighbours: equal, or iCT's, by the mass of ln t ~ N(`p_mean`, `p_std`^2) between
    them."""
    p_mean: Annotated[float, Range(-20, 20)] = -1.1
    p_std: Positive = 2.0
    stages: Annotated[int, Range(1, MAX_STEPS)] = 8
    """ECT: stages of equal length in the phase."""
    q: Annotated[float, Range(1, MAX_STEPS, without="low")] = 2.0
    """ECT: factor by which 1 - u/t shrinks from stage to stage."""
    weighting: Literal["none", "inverse"] = "inverse"
    """w: 1, or 1 / (t - u)."""
    target_decay: ShareBelow1 = 0.0
    """Decay mu of the target's average; 0 makes the student itself the target. With a schedule that grows from N(0) to N(k)
    levels it is mu^(N(0)/N(k)), as in CT."""
    distance: Kind = "huber"
    huber_c: Positive | None = 1e-8
    """c of the distance "huber": near 0 for ECT's plain norm; None for iCT's 0.00054 sqrt(C H W)."""
    flip: bool = False
    """Mirror images at random, for data without a preferred side."""
    adversarial_start: Share = 0.0
    """Share of the phase in which the discriminator learns alone, before the adversarial term acts on the student."""

    def __post_init__(self) -> None:
        super().__post_init__()
        follows = self.levels != "ect" or self.neighbours == "uniform"
        self.require(follows, "neighbours", "uniform with levels 'ect', which are no schedule")
        self.require(self.sizes is None or self.levels in SIZES, "sizes", "None, except with the levels 'ct' and 'ict'")
        self.require(self.sizes is None or self.sizes[0] <= self.sizes[1], "sizes", "two sizes that do not fall")

    def needs(self) -> Needs:
        """Real images; the teacher for CD; feature networks of the distance and the discriminator."""
        names = dict.fromkeys((*self.distance_features, *self.adversarial_features))
        return Needs(images=True, models=(self.teacher,) if self.teacher else (), features=tuple(names))

    def sampling(self) -> FewStep:
        """Multistep consistency sampling, at any levels (Song et al. 2023, algorithm 1)."""
        return FewStep(num_steps=self.num_steps, rule="fresh_noise", line="ve", trained_steps=None)

    def about(self) -> str:
        """Describe the objective, like "consistency distillation, pixel distance (L2), adversarial term"."""
        kind = "distillation" if self.teacher else "training"
        parts = [f"consistency {kind}{NAMES[self.levels]}", DISTANCES[self.distance]]
        return ", ".join([*parts, *["adversarial term"] * (self.adversarial_weight > 0)])

    def build(self, context: Context) -> Consistency:
        """Build the objective, with a target network if `target_decay` is above 0."""
        return Consistency(self, context)

    def build_distance(self, context: Context) -> Distance:
        """Return the distance d(images, targets), per image (B,)."""
        if self.distance == "huber":
            return functools.partial(perceptual.pseudo_huber, c=self.huber_c)
        return super().build_distance(context)

    def representative(self) -> ConsistencyConfig:
        """Replace levels, weights and the discriminator's learning rate by defaults that do not affect the cost."""
        return dataclasses.replace(
            ConsistencyConfig(),
            teacher=self.teacher,
            solver=self.solver if self.teacher else "heun",
            target_decay=0.5 * (self.target_decay > 0),
            distance=self.distance,
            resize=self.resize,
            **self.adversarial_cost,
        )

    def size(self, step: int, total: int) -> int:
        """N(k), the levels above 0 of the training schedule in `step` of `total`."""
        first, last = self.sizes or SIZES.get(self.levels, (self.num_steps, self.num_steps))
        if self.levels == "ct":
            return ct_size(step, total, first, last)
        return ict_size(step, total, first, last) if self.levels == "ict" else self.num_steps

    def decay(self, step: int, total: int) -> float:
        """mu(k), the decay of the target after `step` of `total`."""
        return self.target_decay ** (self.size(0, total) / self.size(step, total))

    def draw(self, batch: Batch, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw the levels t and u of a batch, float32 (B,) each, on the generator's device. 0 <= u < t."""
        if self.levels == "ect":
            normal = torch.randn(batch.size, generator=generator, device=generator.device)
            t = (self.p_mean + self.p_std * normal).exp()
            return t, ect_following(t, batch.step * self.stages // batch.total, self.q)
        levels = torch.cat([edm_sigmas(self.size(batch.step, batch.total)), torch.zeros(1, dtype=torch.float64)])
        law = lognormal_law(levels, self.p_mean, self.p_std) if self.neighbours == "lognormal" else None
        i = draw_indices(batch.size, len(levels) - 1, law, generator)
        levels = levels.to(device=generator.device, dtype=torch.float32)
        return levels[i], levels[i + 1]


class Consistency(Objective):
    """Training step of a consistency model."""

    def __init__(self, config: ConsistencyConfig, context: Context) -> None:
        self.config = config
        self._distance = config.build_distance(context)
        self._teacher = context.models[config.teacher] if config.teacher else None
        self.target: Denoiser | None = None
        if config.target_decay:
            # In training mode, because both sides of the loss use the same dropout mask.
            self.target = copy.deepcopy(context.average).requires_grad_(False).train()
        self._decay = 0.0  # of the step that is running
        self.adversary = config.build_adversary(context)
        if self.adversary is not None:
            self.critic, self.critic_optimizer = self.adversary.discriminator, self.adversary.optimizer

    def backward(
        self, student: Learner, critic: Learner | None, batch: Batch, generator: torch.Generator
    ) -> dict[str, torch.Tensor]:
        """Compute gradients. Figures: "consistency" and, with a discriminator, its losses and the shares of positive logits."""
        assert batch.real is not None
        config, labels = self.config, batch.real_labels
        x1 = mirrored(batch.real, generator) if config.flip else batch.real
        t, u = config.draw(batch, generator)
        noise = torch.randn(x1.shape, generator=generator, device=x1.device)
        x_t = lines.point(x1, noise, t, "ve")
        images = student(x_t, t, labels)
        if self._teacher is None:
            x_u = lines.point(x1, noise, u, "ve")
        else:
            x_u = ode_step(self._teacher, x_t, t, u, labels, solver=config.solver)
        ahead = student.target(x_u, torch.where(u > 0, u, t), labels, model=self.target)  # networks refuse level 0
        distances = self._distance(images, torch.where(u.reshape(-1, 1, 1, 1) > 0, ahead, x_u))
        loss = (distances / (t - u) if config.weighting == "inverse" else distances).mean()
        self._decay = config.decay(batch.step, batch.total)
        figures = {"consistency": loss.detach()}
        if critic is None:
            (batch.weight * loss).backward()
            return figures
        assert self.adversary is not None
        acts = batch.step >= config.adversarial_start * batch.total
        self.adversary.weight = config.adversarial_weight * acts
        return figures | self.adversary.backward(student, critic, images, labels, loss, batch, generator)

    def after_step(self, student: nn.Module) -> None:
        """Move the target towards the student, by the decay of the step."""
        if self.target is not None:
            ema_update(self.target, student, half_life=-1 / math.log2(self._decay), step=1, ramp=0.0)

    def state(self) -> nn.Module | None:
        """The target network, None if the student itself is the target."""
        return self.target


def ct_size(step: int, total: int, first: int, last: int) -> int:
    """N(k) of CT for step k of K = `total`: grows with the square root of k from s0 = `first` to s1 + 1 = `last` + 1
    (Song et al. 2023, appendix C)."""
    return math.ceil(math.sqrt(step / total * ((last + 1) ** 2 - first**2) + first**2) - 1) + 1


def ict_size(step: int, total: int, first: int, last: int) -> int:
    """N(k) of iCT for step k of K = `total`: doubles in stages of equal length from s0 + 1 = `first` + 1 to s1 + 1 = `last` + 1
    (Song & Dhariwal 2023, eq. 20)."""
    stage = max(math.floor(total / (math.log2(last // first) + 1)), 1)
    return min(first * 2 ** min(step // stage, MAX_STEPS.bit_length()), last) + 1


def lognormal_law(levels: torch.Tensor, mean: float, std: float) -> torch.Tensor:
    """p(i) of iCT, float64 (N,), for the neighbours i and i + 1 of `levels`, float64 (N + 1,), that fall to 0: proportional to
    erf((ln t_i - mean) / (sqrt 2 std)) - erf((ln t_i+1 - mean) / (sqrt 2 std)) (Song & Dhariwal 2023, table 1)."""
    mass = torch.erf((levels.log() - mean) / (math.sqrt(2) * std))
    return (mass[:-1] - mass[1:]) / (mass[0] - mass[-1])


def draw_indices(count: int, size: int, law: torch.Tensor | None, generator: torch.Generator) -> torch.Tensor:
    """Draw indices (count,) below `size`, with probabilities `law` (size,) or equal ones, on the generator's device."""
    if law is None:
        return torch.randint(size, (count,), generator=generator, device=generator.device)
    cumulative = law.cumsum(0).to(device=generator.device, dtype=torch.float32)
    uniform = torch.rand(count, generator=generator, device=generator.device)
    return torch.searchsorted(cumulative, uniform, right=True).clamp_max(size - 1)


def ect_following(t: torch.Tensor, stage: int, q: float) -> torch.Tensor:
    """r(t) of ECT in `stage`, from 0: max(0, t (1 - q^-(stage + 1) n(t))) with n(t) = 1 + 8 sigmoid(-t)
    (Geng et al. 2024, section 3)."""
    return (t * (1 - q ** -(stage + 1) * (1 + 8 * torch.sigmoid(-t)))).clamp_min(0.0)
