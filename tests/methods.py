"""Small custom methods that use everything an objective may request from the trainer and keep between steps."""

from __future__ import annotations

import copy
import dataclasses

import torch
from torch import nn

from beeline.config import OptimizerConfig
from beeline.objectives import Batch, Context, Needs, Objective, ObjectiveConfig, Turns
from beeline.objectives.learner import Learner
from beeline.objectives.lines import point
from beeline.objectives.perceptual import l2
from beeline.sampling.few_step import FewStep
from beeline.schedule import SIGMA_MAX
from beeline.settings import ShareBelow1, Steps


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConsistencyConfig(ObjectiveConfig):
    """Consistency distillation (Song et al. 2023): real images, the teacher in the loop, a slow copy as the target."""

    num_steps: Steps = 6
    decay: ShareBelow1 = 0.9
    """Of the target network, per step."""
    weighted: bool = False
    """Learn the weight of the loss."""

    def needs(self) -> Needs:
        return Needs(images=True, models=("teacher",))

    def sampling(self) -> FewStep:
        return FewStep(num_steps=self.num_steps, rule="fresh_noise", trained_steps=None)

    def about(self) -> str:
        return "consistency distillation"

    def build(self, context: Context) -> Consistency:
        return Consistency(self, context)


class Consistency(Objective):
    """Runs one Euler step of the teacher's ODE between two levels."""

    def __init__(self, config: ConsistencyConfig, context: Context) -> None:
        self.decay, self.teacher, self.target = config.decay, context.models["teacher"], copy.deepcopy(context.average)
        self.log_weight = nn.Parameter(torch.zeros(()), requires_grad=config.weighted)
        self.kept = nn.ModuleDict({"target": self.target, "weighting": nn.ParameterDict({"log_weight": self.log_weight})})

    def backward(
        self, student: Learner, critic: Learner | None, batch: Batch, generator: torch.Generator
    ) -> dict[str, torch.Tensor]:
        assert batch.real is not None
        assert batch.noise is None
        sigma, following = (torch.full((batch.size,), level, device=batch.real.device) for level in (2.0, 1.0))
        noise = torch.randn(batch.real.shape, generator=generator, device=batch.real.device)
        x = point(batch.real, noise, sigma, "ve")
        with torch.no_grad():
            ahead = x + (1.0 - 2.0) * (x - self.teacher(x, sigma, batch.real_labels)) / 2.0
            target = self.target(ahead, following, batch.real_labels)
        loss = l2(student(x, sigma, batch.real_labels), target).mean()
        log_weight = self.log_weight
        (batch.weight * (log_weight.exp() * loss - log_weight)).backward()
        return {"consistency": loss.detach()}

    @torch.no_grad()
    def after_step(self, student: nn.Module) -> None:
        for ours, theirs in zip(self.target.parameters(), student.parameters(), strict=True):
            ours.lerp_(theirs, 1 - self.decay)

    def state(self) -> nn.Module:
        return self.kept


@dataclasses.dataclass(frozen=True, kw_only=True)
class MatchingConfig(ObjectiveConfig):
    """Distribution matching (Yin et al. 2024): fresh noise, the teacher's score, and a critic that learns the student's."""

    num_steps: Steps = 6
    every: Steps = 5
    """The student learns in the last of so many steps, the critic in the others."""
    optimizer: OptimizerConfig = OptimizerConfig(lr=1e-3)
    """Of the critic."""

    def needs(self) -> Needs:
        return Needs(noise=True, models=("teacher",))

    def sampling(self) -> FewStep:
        return FewStep(num_steps=self.num_steps, trained_steps=(0,))

    def about(self) -> str:
        return "distribution matching"

    def build(self, context: Context) -> Matching:
        return Matching(self, context)


class Matching(Objective):
    """Uses the difference of two scores at one level."""

    def __init__(self, config: MatchingConfig, context: Context) -> None:
        self.every, self.teacher = config.every, context.models["teacher"]
        self.critic = copy.deepcopy(context.average).train().requires_grad_(True)
        self.critic_optimizer = config.optimizer
        self.followed = 0

    def turns(self, step: int) -> Turns:
        last = step % self.every == self.every - 1
        return Turns(student=last, critic=not last)

    def backward(
        self, student: Learner, critic: Learner | None, batch: Batch, generator: torch.Generator
    ) -> dict[str, torch.Tensor]:
        assert critic is not None
        assert batch.noise is not None
        assert batch.x1 is None
        learns, device = self.turns(batch.step).student, batch.noise.device
        start, level = (torch.full((batch.size,), sigma, device=device) for sigma in (SIGMA_MAX, 1.0))
        with torch.set_grad_enabled(learns):
            images = student(SIGMA_MAX * batch.noise, start, batch.labels)
        x = images.detach() + torch.randn(images.shape, generator=generator, device=device)
        if not learns:
            loss = l2(critic(x, level, batch.labels), images).mean()
            (batch.weight * loss).backward()
            return {"fake": loss.detach()}
        with torch.no_grad():
            gap = critic.frozen(x, level, batch.labels) - self.teacher(x, level, batch.labels)
        loss = l2(images, images.detach() - gap).mean()
        (batch.weight * loss).backward()
        return {"gap": loss.detach()}

    def after_step(self, student: nn.Module) -> None:
        self.followed += 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class JumpConfig(ObjectiveConfig):
    """Pairs, and a student that takes the level at which a jump ends, here always 0."""

    def needs(self) -> Needs:
        return Needs(pairs=True, second_level=True)

    def sampling(self) -> FewStep:
        return FewStep(num_steps=6)

    def about(self) -> str:
        return "jumps to level 0"

    def build(self, context: Context) -> Jump:
        return Jump()


class Jump(Objective):
    """Predicts the end of a jump from pure noise."""

    def backward(
        self, student: Learner, critic: Learner | None, batch: Batch, generator: torch.Generator
    ) -> dict[str, torch.Tensor]:
        assert batch.noise is not None
        assert batch.x1 is not None
        start, end = (torch.full((batch.size,), sigma, device=batch.x1.device) for sigma in (SIGMA_MAX, 0.0))
        loss = l2(student(SIGMA_MAX * batch.noise, start, batch.labels, None, end), batch.x1).mean()
        (batch.weight * loss).backward()
        return {"lines": loss.detach()}
