"""Few-step sampling of students: a step list, and the rule that leads from one noise level to the next (LMM, appendix A.4).

Sampling starts at x0 = sigma_max noise. Each step predicts the image at the current level and moves to the next level; the
last prediction is the image. A rule is an entry of `RULES`; your own method may add one.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Protocol

import torch
from torch import nn

from beeline.errors import BeelineError
from beeline.objectives.lines import Line
from beeline.schedule import SIGMA_MIN, check_steps, edm_sigmas
from beeline.settings import Index, Settings, Some, Steps

Fresh = Callable[[], torch.Tensor]


class Predict(Protocol):
    """The student: predicts images, float64 (B, C, H, W), from points `x`, float64 (B, C, H, W), at noise level `sigma`."""

    def __call__(self, x: torch.Tensor, sigma: float, to: float | None = None) -> torch.Tensor: ...


class Rule(Protocol):
    """A step from `x` at level `sigma` to level `following`. Returns the image if `following` is 0. All float64 (B, C, H, W).

    `noise` is the unit-variance noise that sampling started from; `fresh()` returns new noise for this transition.
    """

    def __call__(
        self, predict: Predict, x: torch.Tensor, sigma: float, following: float, *, noise: torch.Tensor, fresh: Fresh
    ) -> torch.Tensor: ...


def same_noise(
    predict: Predict, x: torch.Tensor, sigma: float, following: float, *, noise: torch.Tensor, fresh: Fresh
) -> torch.Tensor:
    """Move to the point of the line "ve" with the noise that sampling started from."""
    image = predict(x, sigma)
    return image + following * noise if following else image


def line(
    predict: Predict, x: torch.Tensor, sigma: float, following: float, *, noise: torch.Tensor, fresh: Fresh
) -> torch.Tensor:
    """Move along the segment from x to the prediction: Euler's method."""
    image = predict(x, sigma)
    return following / sigma * x + (1 - following / sigma) * image if following else image


def fresh_noise(
    predict: Predict, x: torch.Tensor, sigma: float, following: float, *, noise: torch.Tensor, fresh: Fresh
) -> torch.Tensor:
    """Add new noise to the prediction: multistep sampling of consistency models (Song et al. 2023, algorithm 1)."""
    image = predict(x, sigma)
    return image + max(following**2 - SIGMA_MIN**2, 0.0) ** 0.5 * fresh() if following else image


RULES: dict[str, Rule] = {"same_noise": same_noise, "line": line, "fresh_noise": fresh_noise}


class Registered:
    """Condition of a setting: a name in RULES."""

    def allows(self, value: str) -> bool:
        return value in RULES

    def __str__(self) -> str:
        return f"that is {' or '.join(RULES)} (or another, once the module that adds it to RULES is imported)"


RuleName = Annotated[str, Registered()]


@dataclasses.dataclass(frozen=True, kw_only=True)
class FewStep(Settings):
    """Levels and line that a student was trained on, and its sampling rule. Saved in the student's config.json."""

    num_steps: Steps
    """Levels of the EDM schedule that step indices refer to."""
    rule: RuleName = "line"
    """Rule that computes the next point."""
    line: Line = "lerp"
    """Line whose points the student was trained on (beeline.objectives.lines)."""
    trained_steps: Some[Index] | None = None
    """Indices that the student was trained on; None for all of them. SOT trains on some."""

    def check(self, steps: Sequence[int]) -> tuple[int, ...]:
        """Return `steps` as a tuple. Raises BeelineError for steps outside the schedule, or that the student has not seen."""
        try:
            steps = check_steps(steps, self.num_steps)
        except ValueError as error:
            raise BeelineError(str(error)) from error
        unseen = [] if self.trained_steps is None else sorted(set(steps) - set(self.trained_steps))
        if unseen:
            raise BeelineError(
                f"steps {steps} were asked for, but this student was trained with SOT on {self.trained_steps} alone and "
                f"has never seen level {unseen[0]}; sample it at those steps, or use a student trained on all levels"
            )
        return steps


def few_step(
    denoiser: nn.Module,
    latents: torch.Tensor,
    labels: torch.Tensor | None,
    *,
    steps: Sequence[int],
    how: FewStep,
    fresh: Callable[[int], torch.Tensor] | None = None,
) -> torch.Tensor:
    """Draw images, float32 (B, C, H, W), from unit-variance noise `latents` (B, C, H, W): one evaluation per entry of `steps`.

    `fresh(n)` returns unit-variance noise (B, C, H, W) for the n-th transition, for rules that need it.
    """
    steps = how.check(steps)
    levels = edm_sigmas(how.num_steps).tolist()
    sigmas = [*(levels[i] for i in steps), 0.0]
    noise = latents.to(torch.float64)

    def predict(x: torch.Tensor, sigma: float, to: float | None = None) -> torch.Tensor:
        level = torch.full((len(x),), sigma, device=x.device)
        options: dict[str, Any] = {} if to is None else {"to": torch.full((len(x),), to, device=x.device)}
        return denoiser(x.to(torch.float32), level, labels, **options).to(torch.float64)

    def new(n: int) -> torch.Tensor:
        if fresh is None:
            raise ValueError(f"the rule {how.rule} needs the argument `fresh`")
        return fresh(n).to(torch.float64)

    x, rule = noise * sigmas[0], RULES[how.rule]
    for n in range(len(steps)):
        x = rule(predict, x, sigmas[n], sigmas[n + 1], noise=noise, fresh=lambda n=n: new(n))
    return x.to(torch.float32)


def parse_steps(text: str) -> tuple[int, ...]:
    """Parse "0,8" as (0, 8). Raises BeelineError for anything else."""
    if re.fullmatch("[0-9]{1,9}(,[0-9]{1,9})*", text) is None:
        raise BeelineError(f"steps {text!r} are not indices separated by commas, for example 0 or 0,8")
    return tuple(int(part) for part in text.split(","))
