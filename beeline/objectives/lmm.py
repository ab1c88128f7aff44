"""Lines matching (Matityahu & Fattal 2024): the student predicts the end of a line from any point on it.

    L = L_lines + weight lambda L_adv

L_lines is a distance in pixels or in features (eq. 3). L_adv is the hinge loss of a discriminator that compares the student's
images with real ones. The distance, the levels or SOT steps, and the adversarial weight are settings.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any, Literal

import torch

from beeline.objectives import Batch, Context, Needs, Objective, ObjectiveConfig, distances, lines
from beeline.objectives.adversarial import AdversarialSettings
from beeline.objectives.distances import DISTANCES, DistanceSettings, Kind
from beeline.objectives.learner import Learner
from beeline.sampling.few_step import FewStep
from beeline.settings import Index, Some, Steps

LOSS = "lines"
"""The figure of the distance in a log."""


def loss_label(settings: Mapping[str, Any]) -> str:
    """The loss of an objective with these settings (of a JSON file), so that losses of other kinds are told apart."""
    return f"lines: {distances.label(settings)}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinesMatchingConfig(DistanceSettings, AdversarialSettings, ObjectiveConfig):
    """Lines matching. Training levels follow `levels`, or, with `steps` (SOT), only those steps are drawn."""

    num_steps: Steps = 18
    """Levels of the EDM schedule."""
    line: Literal["ve", "lerp"] = "lerp"
    """Line between image and x0. "lerp" is the segment: at sigma_max the student trains on exactly what it samples from. "ve"
    adds noise to the image: at sigma_max the input still holds the image, which is missing when the student samples."""
    rule: Literal["same_noise", "line", "fresh_noise"] = "line"
    """Sampling rule: "line" for the line "lerp", "same_noise" for "ve"."""
    levels: Literal["schedule", "sigma"] = "schedule"
    """Distribution of the training levels: uniform over the schedule, or uniform in sigma."""
    steps: Some[Index] | None = None
    """SOT: schedule indices to train, starting with 0."""
    distance: Kind = "probe"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps is not None:
            rising = self.steps[0] == 0 and all(a < b for a, b in itertools.pairwise(self.steps))
            self.require(rising, "steps", "increasing indices from 0, the level of pure noise, for example 0 or 0 8")
            self.require(self.steps[-1] < self.num_steps, "steps", f"indices below num_steps, {self.num_steps}")
        follows = (self.line, self.rule) not in (("ve", "line"), ("lerp", "same_noise"))
        self.require(follows, "rule", f"a rule that follows the line {self.line!r}: same_noise with ve, line with lerp")

    def needs(self) -> Needs:
        """Pairs; real images for the adversarial term; feature networks of the distance and the discriminator."""
        names = dict.fromkeys((*self.distance_features, *self.adversarial_features))
        return Needs(pairs=True, images=self.adversarial_weight > 0, features=tuple(names))

    def sampling(self) -> FewStep:
        """Sampling at any levels, or only at the steps of SOT."""
        return FewStep(num_steps=self.num_steps, rule=self.rule, line=self.line, trained_steps=self.steps)

    def about(self) -> str:
        """Describe the objective, like "lines, perceptual distance (probe), adversarial term, SOT at steps 0"."""
        parts = ["lines", DISTANCES[self.distance], *["adversarial term"] * (self.adversarial_weight > 0)]
        return ", ".join([*parts, *([] if self.steps is None else [f"SOT at steps {','.join(map(str, self.steps))}"])])

    def build(self, context: Context) -> LinesMatching:
        """Build the objective, with a discriminator if there is an adversarial term."""
        return LinesMatching(self, context)

    def representative(self) -> LinesMatchingConfig:
        """Replace weights, levels and the discriminator's learning rate by defaults that do not affect the cost."""
        return dataclasses.replace(
            self,
            steps=None,
            pixel_weight=0.0,
            **self.adversarial_cost,
        )


class LinesMatching(Objective):
    """Training step of lines matching."""

    def __init__(self, config: LinesMatchingConfig, context: Context) -> None:
        self.config = config
        self._distance = config.build_distance(context)
        self.adversary = config.build_adversary(context)
        if self.adversary is not None:
            self.critic, self.critic_optimizer = self.adversary.discriminator, self.adversary.optimizer

    def backward(
        self, student: Learner, critic: Learner | None, batch: Batch, generator: torch.Generator
    ) -> dict[str, torch.Tensor]:
        """Compute gradients. Figures: "lines" and, with a discriminator, its losses and the shares of positive logits."""
        assert batch.x1 is not None
        assert batch.noise is not None
        config = self.config
        sigma = lines.draw_levels(
            batch.size, num_steps=config.num_steps, law=config.levels, steps=config.steps, generator=generator
        )
        images = student(lines.point(batch.x1, batch.noise, sigma, config.line), sigma, batch.labels)
        loss = self._distance(images, batch.x1).mean()
        figures = {LOSS: loss.detach()}
        if critic is None:
            (batch.weight * loss).backward()
            return figures
        assert self.adversary is not None
        return figures | self.adversary.backward(student, critic, images, batch.labels, loss, batch, generator)
