"""A custom method outside the project: settings, a target network, a sampling rule, a recipe."""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import replace

import torch
from torch import nn

from beeline.config import PhaseConfig, Recipe
from beeline.denoiser import Denoiser
from beeline.objectives import Batch, Context, Needs, Objective, ObjectiveConfig
from beeline.objectives.ema import ema_update
from beeline.objectives.learner import Learner
from beeline.objectives.lines import point
from beeline.objectives.perceptual import l2
from beeline.recipes import digits
from beeline.sampling.few_step import RULES, FewStep, Fresh, Predict
from beeline.schedule import edm_sigmas
from beeline.settings import HalfLife, Steps


def damped(
    predict: Predict, x: torch.Tensor, sigma: float, following: float, *, noise: torch.Tensor, fresh: Fresh
) -> torch.Tensor:
    """Move halfway by the rule "line" and halfway by "same_noise"."""
    image = predict(x, sigma)
    return (following / sigma * (x - image) + following * noise) / 2 + image if following else image


RULES["damped"] = damped


@dataclasses.dataclass(frozen=True, kw_only=True)
class SelfConsistencyConfig(ObjectiveConfig):
    """Consistency distillation (Song et al. 2023) with one Euler step of the teacher between neighbouring levels."""

    half_life: HalfLife = 5.0
    """Of the target network, in steps."""
    num_steps: Steps = 18

    def needs(self) -> Needs:
        return Needs(images=True, models=("teacher",))

    def sampling(self) -> FewStep:
        return FewStep(num_steps=self.num_steps, rule="damped", line="ve")

    def about(self) -> str:
        return f"self-consistency, half-life {self.half_life:g}"

    def build(self, context: Context) -> SelfConsistency:
        return SelfConsistency(self, context)


class SelfConsistency(Objective):
    """A training step of self-consistency."""

    def __init__(self, config: SelfConsistencyConfig, context: Context) -> None:
        self.config, self.teacher = config, context.models["teacher"]
        self.target: Denoiser = copy.deepcopy(context.average)
        self.levels = edm_sigmas(config.num_steps).to(torch.float32)

    def backward(
        self, student: Learner, critic: Learner | None, batch: Batch, generator: torch.Generator
    ) -> dict[str, torch.Tensor]:
        assert batch.real is not None
        index = torch.randint(len(self.levels) - 1, (batch.size,), generator=generator)
        sigma, following = self.levels[index], self.levels[index + 1]
        x = point(batch.real, torch.randn(batch.real.shape, generator=generator), sigma, "ve")
        with torch.no_grad():
            slope = (x - self.teacher(x, sigma, batch.real_labels)) / sigma.reshape(-1, 1, 1, 1)
            ahead = x + (following - sigma).reshape(-1, 1, 1, 1) * slope
            target = self.target(ahead, following, batch.real_labels)
        loss = l2(student(x, sigma, batch.real_labels), target).mean()
        (batch.weight * loss).backward()
        return {"consistency": loss.detach()}

    def after_step(self, student: nn.Module) -> None:
        ema_update(self.target, student, self.config.half_life, 1, 0.0)

    def state(self) -> nn.Module:
        return self.target


def tiny(seed: int = 0) -> Recipe:
    """The digits recipe with this method as the main student."""
    recipe = digits(seed)
    optimizer = recipe.main.phases["reconstruction"].optimizer
    phase = PhaseConfig(iterations=12, optimizer=optimizer, objective=SelfConsistencyConfig())
    ours = replace(
        recipe.main, name="ours", phases={"consistency": phase}, batch_size=16, checkpoint_every=4, log_every=1
    )  # fmt: skip
    pairs = replace(recipe.pairs, count=100, shard_size=50, batch_size=50, num_steps=3)
    return replace(recipe, pairs=pairs, students={"ours": ours, "l2": recipe.students["l2"]})
