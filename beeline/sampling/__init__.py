"""Sampling: from noise to images.

A `Sampling` says how: by an ODE solver (teachers, solvers.py and adams.py) or by a step list and a rule (students,
few_step.py). All functions return float32 images (B, C, H, W), nominally in [-1, 1]; the state between evaluations is float64.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import cast, get_args

import torch

from beeline.denoiser import Denoiser
from beeline.errors import BeelineError
from beeline.noise import stream_seed, unit_noise
from beeline.sampling.adams import adams
from beeline.sampling.few_step import RuleName, Step, few_step, parse_steps, write_steps
from beeline.sampling.solvers import Solver, evaluations, solve

GUESS = "guess"


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Sampling:
    """A method to sample a model: by `solver` with `num_steps` levels, or at `steps`: indices into the student's schedule
    (int), or noise levels (float).

    Two samplings are equal if their labels are: index 1 and noise level 1.0 differ, though Python's numbers are equal.
    """

    solver: Solver = "heun"
    num_steps: int = 18
    steps: tuple[Step, ...] | None = None
    rule: RuleName | None = None
    """Sampling rule for `steps`; None for the student's own."""
    guess: bool = False
    """Whether the student makes a first guess, with an evaluation of its own (FewStep.guess)."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sampling) and self.label == other.label

    def __hash__(self) -> int:
        return hash(self.label)

    @property
    def nfe(self) -> int:
        """Network evaluations per image."""
        return evaluations(self.solver, self.num_steps) if self.steps is None else len(self.steps) + self.guess

    @property
    def label(self) -> str:
        """Name in tables and metrics.json: "heun 18", "0,8", "0,0.821", "0,8 fresh_noise"; "0,8 guess" with a guess."""
        if self.steps is None:
            return f"{self.solver} {self.num_steps}"
        return " ".join([write_steps(self.steps), *([self.rule] if self.rule else []), *[GUESS] * self.guess])

    @property
    def slug(self) -> str:
        """Name in file names: "heun-18", "0-8"."""
        return slug_of(self.label)

    @property
    def plain(self) -> bool:
        """Whether this is a step list with the student's own rule."""
        return self.steps is not None and self.rule is None

    @property
    def text(self) -> str:
        """Name in prose: "steps 0,8" or "heun 18"."""
        return self.label if self.steps is None else f"steps {self.label}"

    @property
    def evaluations(self) -> str:
        """NFE in prose: "1 evaluation"."""
        return f"{self.nfe} evaluation{'s' * (self.nfe != 1)}"

    @staticmethod
    def parse(label: str) -> Sampling:
        """The inverse of `label`. Raises ValueError for anything else."""
        first, *rest = label.split(" ")
        try:
            if first in get_args(Solver):
                (num_steps,) = map(int, rest)
                sampling = Sampling(solver=cast(Solver, first), num_steps=num_steps)
            else:
                guess = rest[-1:] == [GUESS]
                rule = " ".join(rest[:-1] if guess else rest) or None
                sampling = Sampling(steps=parse_steps(first), rule=rule, guess=guess)
        except (ValueError, BeelineError) as error:
            raise ValueError(f"{label!r:.60} is not the label of a sampling") from error
        if sampling.label != label or sampling.nfe < 1:
            raise ValueError(f"{label!r:.60} is not the label of a sampling")
        return sampling


def slug_of(label: str) -> str:
    """The label of a `Sampling` in the form that file names use."""
    return label.replace(" ", "-").replace(",", "-")


def sample(
    model: Denoiser,
    indices: Sequence[int],
    labels: torch.Tensor | None,
    sampling: Sampling,
    *,
    seed: int,
    guidance: float | None = None,
) -> torch.Tensor:
    """Images (n, C, H, W) from the noise of (seed, indices), on the model's device; `labels` (n,) or one-hot (n, K).
    `guidance` as `sample_from` takes it."""
    device = next(model.parameters()).device

    def noise(which_seed: int) -> torch.Tensor:
        return torch.from_numpy(unit_noise(which_seed, indices, model.image_shape)).to(device)

    def fresh(number: int) -> torch.Tensor:
        return noise(stream_seed(seed, "fresh", number))

    return sample_from(model, noise(seed), labels, sampling, fresh=fresh, guidance=guidance)


@torch.inference_mode()
def sample_from(
    model: Denoiser,
    latents: torch.Tensor,
    labels: torch.Tensor | None,
    sampling: Sampling,
    *,
    fresh: Callable[[int], torch.Tensor] | None = None,
    guidance: float | None = None,
) -> torch.Tensor:
    """Images (n, C, H, W) from unit-variance noise `latents` (n, C, H, W); `fresh` as `few_step` takes it.

    `guidance`: weight of guidance, by default the student's own. Raises BeelineError for steps, rules, levels or guidance that
    the model does not have.
    """
    how = model.few_step
    if guidance is None:
        guidance = 0.0 if how is None else how.guidance
    if guidance and not model.takes_guidance:
        raise BeelineError(f"guidance {guidance:g} was given, but this model takes no weight of guidance; leave it out")
    if sampling.steps is not None:
        if how is None:
            raise BeelineError("steps were given, but this model is a teacher; use solver= and num_steps= instead")
        how = dataclasses.replace(how, rule=sampling.rule or how.rule, guidance=guidance)
        return few_step(model, latents, labels, steps=sampling.steps, how=how, fresh=fresh)
    if how is not None:
        how.check_solver()
    if sampling.rule is not None:
        raise BeelineError(f"the rule {sampling.rule!r} was given, but this model is sampled by a solver, without rules")
    if sampling.solver == "calibrated":
        if model.levels is None:
            raise BeelineError("this model has no calibrated levels; find them with: python -m beeline.calibrate FOLDER")
        return adams(model, latents, labels, levels=model.levels)
    denoiser = functools.partial(model, guidance=torch.tensor(guidance)) if guidance else model
    return solve(denoiser, latents, labels, solver=sampling.solver, num_steps=sampling.num_steps)


def batches(count: int, size: int) -> Iterator[range]:
    """Consecutive ranges of at most `size` that cover range(count)."""
    return (range(start, min(start + size, count)) for start in range(0, count, size))


def generate(
    model: Denoiser,
    n: int,
    *,
    seed: int = 0,
    labels: torch.Tensor | None = None,
    steps: Sequence[Step] | None = None,
    rule: str | None = None,
    solver: Solver | None = None,
    num_steps: int = 18,
    guidance: float | None = None,
    batch_size: int = 256,
) -> torch.Tensor:
    """`n` images, float32 (n, C, H, W) in [-1, 1]; image i depends on (seed, i) and its label alone.

    Students: `steps`, one evaluation each, and one for the first guess of a student that makes one (indices into the schedule,
    or noise levels as floats: (0, 0.821)), and a sampling `rule` other than the student's own. Teachers, and students that
    follow an ODE: `solver` "heun" (2 num_steps - 1 evaluations), "euler" (num_steps), or "calibrated" (one for each level that
    beeline.calibrate found; `num_steps` is ignored). The default is one step for students and "heun" for teachers. Models that
    take it: weight of `guidance`, 0 for none; the default is the student's own. A conditional model without `labels` takes
    class i mod K for image i.
    """
    if labels is None and model.label_dim:
        labels = torch.arange(n) % model.label_dim
    if labels is not None and len(labels) != n:
        raise ValueError(f"{len(labels)} labels for {n} images; pass one per image")
    if steps is None and solver is None and model.few_step is not None:
        steps = (0,)
    if steps is not None and solver is not None:
        raise ValueError("steps and a solver were given; choose one")
    sampling = Sampling(solver=solver or "heun", num_steps=num_steps, steps=None if steps is None else tuple(steps), rule=rule)
    parts = [
        sample(model, rows, None if labels is None else labels[rows.start : rows.stop], sampling, seed=seed, guidance=guidance)
        for rows in batches(n, batch_size)
    ]
    return torch.cat(parts).clamp(-1, 1) if parts else torch.empty(0, *model.image_shape)
