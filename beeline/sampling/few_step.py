"""Few-step sampling of students: a step list, and the rule that leads from one noise level to the next (LMM, appendix A.4).

Sampling starts at x0 = sigma_max noise. Each step predicts the image at the current level and moves to the next level; the
last prediction is the image. A rule is an entry of `RULES`; your own method may add one.

A flow map is a denoiser with a second level, g(x, t, s): the jump from level t to level s is the point of the line through x
and g, G(x, t -> s) = (s/t) x + (1 - s/t) g (Kim et al. 2024, eq. 9). For such students the rule "line" makes these jumps.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import re
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Protocol

import numpy as np
import torch

from beeline.denoiser import Denoiser
from beeline.errors import BeelineError
from beeline.objectives.lines import Line
from beeline.objectives.maps import curves
from beeline.schedule import SIGMA_MIN, check_steps, edm_sigmas
from beeline.settings import STEPS, Amount, Index, Positive, Settings, Some, Steps, added

Fresh = Callable[[], torch.Tensor]
Step = int | float
"""An index into the student's levels (int), or a noise level (float)."""


class Predict(Protocol):
    """The student: predicts images, float64 (B, C, H, W), from points `x`, float64 (B, C, H, W), at noise level `sigma`.

    `to` is the level at which a flow map's jump ends, by default `sigma`. Other students ignore it.
    """

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
    image = predict(x, sigma, 0.0)
    return image + following * noise if following else image


def line(
    predict: Predict, x: torch.Tensor, sigma: float, following: float, *, noise: torch.Tensor, fresh: Fresh
) -> torch.Tensor:
    """Move along the segment from x to the prediction: Euler's method, and the jump of a flow map."""
    image = predict(x, sigma, following)
    return following / sigma * x + (1 - following / sigma) * image if following else image


def fresh_noise(
    predict: Predict, x: torch.Tensor, sigma: float, following: float, *, noise: torch.Tensor, fresh: Fresh
) -> torch.Tensor:
    """Add new noise to the prediction: multistep sampling of consistency models (Song et al. 2023, algorithm 1)."""
    image = predict(x, sigma, 0.0)
    return image + max(following**2 - SIGMA_MIN**2, 0.0) ** 0.5 * fresh() if following else image


def gamma_sampling(
    predict: Predict,
    x: torch.Tensor,
    sigma: float,
    following: float,
    *,
    noise: torch.Tensor,
    fresh: Fresh,
    gamma: float,
) -> torch.Tensor:
    """Move to sqrt(1 - gamma^2) `following`, then add new noise of gamma `following` (CTM; Kim et al. 2024, algorithm 3).

    gamma 0 is "line" and gamma 1 is "fresh_noise", up to sigma_min.
    """
    end = (1 - gamma**2) ** 0.5 * following
    reached = line(predict, x, sigma, end, noise=noise, fresh=fresh)
    return reached + gamma * following * fresh() if gamma * following else reached


def acceleration(
    predict: Predict,
    x: torch.Tensor,
    sigma: float,
    following: float,
    *,
    noise: torch.Tensor,
    fresh: Fresh,
    guess: torch.Tensor | None = None,
) -> torch.Tensor:
    """Move along a curve of constant acceleration, which starts towards the first guess (CAF)."""
    if guess is None:
        raise BeelineError("the rule 'acceleration' needs a student that makes a first guess (CAF); choose another rule")
    image = predict(x, sigma, 0.0)
    return curves.move(x, image, guess, noise, sigma, following) if following else image


ACCELERATION = "acceleration"
RULES: dict[str, Rule] = {"same_noise": same_noise, "line": line, "fresh_noise": fresh_noise, ACCELERATION: acceleration}
"""Rules by name. In addition, "gamma <value>", for example "gamma 0.5", is `gamma_sampling`."""
GAMMA = "gamma "


def rule_of(name: str) -> Rule:
    """The rule called `name`. Raises KeyError for an unknown one."""
    if name.startswith(GAMMA):
        return functools.partial(gamma_sampling, gamma=float(name.removeprefix(GAMMA)))
    return RULES[name]


class Registered:
    """Condition of a setting: the name of a rule. A gamma is written in one way only, because the name labels figures."""

    def allows(self, value: str) -> bool:
        return value in RULES or re.fullmatch(GAMMA + r"(0|1|0\.[0-9]{0,8}[1-9])", value) is not None

    def __str__(self) -> str:
        names = ", ".join(RULES)
        gamma = "gamma with a number from 0 to 1, for example gamma 0.5"
        return f"that is {names} or {gamma} (or another, once the module that adds it to RULES is imported)"


RuleName = Annotated[str, Registered()]


@dataclasses.dataclass(frozen=True, kw_only=True)
class FewStep(Settings):
    """Levels and line that a student was trained on, and its sampling rule. Saved in the student's config.json."""

    num_steps: Steps
    """Levels of the EDM schedule that step indices refer to."""
    levels: Some[Positive] | None = None
    """Noise levels of its own, `num_steps` of them and falling, in place of the EDM schedule."""
    rule: RuleName = "line"
    """Rule that computes the next point."""
    line: Line = "lerp"
    """Line whose points the student was trained on (beeline.objectives.lines)."""
    trained_steps: Some[Index] | None = None
    """Indices that the student was trained on; None for all noise levels. SOT trains on some."""
    guidance: Amount = added(0.0)
    """Weight of guidance, for students that take it; another can be asked for."""
    guess: bool = added(False)
    """Whether the student makes a first guess at the start of a trajectory, which costs one more evaluation."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.levels is not None:
            falling = all(a > b for a, b in itertools.pairwise(self.levels))
            self.require(falling and len(self.levels) == self.num_steps, "levels", f"{self.num_steps} falling noise levels")

    def check_solver(self) -> None:
        """Raise BeelineError for a student that no ODE solver can sample.

        The rule "line" is Euler's method on dx/dsigma = (x - D) / sigma. A student with this rule at all levels follows that
        ODE, and any solver may integrate it.
        """
        if self.rule != "line" or self.trained_steps is not None:
            levels = "all levels" if self.trained_steps is None else f"steps {self.trained_steps} alone"
            raise BeelineError(
                f"this student was trained on {levels} for the rule {self.rule!r}, and follows no ODE; a solver needs one of "
                "all levels with the rule 'line', such as a rectified flow"
            )

    def check(self, steps: Sequence[Step]) -> tuple[Step, ...]:
        """Return `steps` as a tuple. Raises BeelineError for steps outside the schedule, or that the student has not seen.

        Integers are indices into the schedule, floats are noise levels. The first is the level of pure noise.
        """
        steps = tuple(float(step) if isinstance(step, float) else int(step) for step in steps)
        try:
            if not any(isinstance(step, float) for step in steps):
                steps = check_steps([int(step) for step in steps], self.num_steps)
            sigmas = self.sigmas(steps)
            if sigmas[0] != self.sigmas((0,))[0] or not all(a > b for a, b in itertools.pairwise([*sigmas, 0.0])):
                start = f"{self.sigmas((0,))[0]:g}"
                raise ValueError(
                    f"steps are {steps}; their noise levels must fall from pure noise, 0 or {start}, and stay above 0"
                )
        except (ValueError, IndexError) as error:
            raise BeelineError(str(error)) from error
        if unseen := self.unseen(steps):
            raise BeelineError(
                f"steps {steps} were asked for, but this student was trained with SOT on {self.trained_steps} alone and "
                f"has never seen level {unseen[0]}; sample it at those steps, or use a student trained on all levels"
            )
        return steps

    def unseen(self, steps: Sequence[Step]) -> list[Step]:
        """Those of `steps` whose noise levels the student was not trained on."""
        if self.trained_steps is None:
            return []
        levels = self.sigmas(self.trained_steps)
        return [step for step in steps if step not in (levels if isinstance(step, float) else self.trained_steps)]

    def sigmas(self, steps: Sequence[Step]) -> list[float]:
        """Noise levels of `steps`. Raises IndexError for an index outside the schedule."""
        schedule = edm_sigmas(self.num_steps).tolist() if self.levels is None else self.levels
        outside = [step for step in steps if isinstance(step, int) and not 0 <= step < len(schedule)]
        if outside:
            raise IndexError(f"step {outside[0]} is outside of the schedule's {len(schedule)} levels")
        return [step if isinstance(step, float) else schedule[step] for step in steps]


def few_step(
    denoiser: Denoiser | Callable[..., torch.Tensor],
    latents: torch.Tensor,
    labels: torch.Tensor | None,
    *,
    steps: Sequence[Step],
    how: FewStep,
    fresh: Callable[[int], torch.Tensor] | None = None,
) -> torch.Tensor:
    """Draw images, float32 (B, C, H, W), from unit-variance noise `latents` (B, C, H, W): one evaluation per entry of `steps`,
    after one for the first guess of a student that makes one.

    `fresh(n)` returns unit-variance noise (B, C, H, W) for the n-th transition, for rules that need it.
    """
    steps = how.check(steps)
    sigmas = [*how.sigmas(steps), 0.0]
    noise = latents.to(torch.float64)
    jumps = isinstance(denoiser, Denoiser) and denoiser.takes_second_level
    always: dict[str, Any] = {"guidance": torch.tensor(how.guidance)} if how.guidance else {}

    def predict(x: torch.Tensor, sigma: float, to: float | None = None) -> torch.Tensor:
        level = torch.full((len(x),), sigma, device=x.device)
        options = {"to": torch.full((len(x),), to, device=x.device)} if jumps and to is not None else {}
        return denoiser(x.to(torch.float32), level, labels, **always, **options).to(torch.float64)

    def new(n: int) -> torch.Tensor:
        if fresh is None:
            raise ValueError(f"the rule {how.rule} needs the argument `fresh`")
        return fresh(n).to(torch.float64)

    x, rule = noise * sigmas[0], rule_of(how.rule)
    if isinstance(denoiser, Denoiser) and denoiser.guess is not None:
        guess = denoiser.guess(x.to(torch.float32), torch.full((len(x),), sigmas[0], device=x.device), labels)
        always["guess"] = guess
        if rule is acceleration:
            rule = functools.partial(acceleration, guess=guess.to(torch.float64))
    for n in range(len(steps)):
        x = rule(predict, x, sigmas[n], sigmas[n + 1], noise=noise, fresh=lambda n=n: new(n))
    return x.to(torch.float32)


def parse_steps(text: str) -> tuple[Step, ...]:
    """Parse "0,8" as (0, 8), and "0,0.821" as (0, 0.821): a number with a decimal point is a noise level.

    Raises BeelineError for anything else.
    """
    if re.fullmatch(STEPS, text) is None:
        raise BeelineError(
            f"steps {text!r} are not indices or noise levels separated by commas, for example 0 or 0,8 or 0,0.821"
        )
    return tuple(float(part) if "." in part else int(part) for part in text.split(","))


def write_steps(steps: Sequence[Step]) -> str:
    """The inverse of `parse_steps`: "0,0.821" of (0, 0.821). A noise level never has an exponent."""
    return ",".join(np.format_float_positional(step, trim="0") if isinstance(step, float) else str(step) for step in steps)
