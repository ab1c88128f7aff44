"""The samplings that an evaluation asks for, and samples drawn by one of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from beeline.config import EvaluateConfig
from beeline.denoiser import Denoiser
from beeline.errors import BeelineError
from beeline.noise import stream_seed
from beeline.sampling import Sampling, batches, sample
from beeline.sampling.few_step import FewStep, parse_steps
from beeline.sampling.solvers import Solver


def samplings_for(model: Denoiser, config: EvaluateConfig) -> list[Sampling]:
    """The samplings that `config` asks for. Raises BeelineError like `samplings_of`."""
    return samplings_of(model.few_step, config, levels=None if model.levels is None else len(model.levels))


def samplings_of(few_step: FewStep | None, config: EvaluateConfig, *, levels: int | None) -> list[Sampling]:
    """The samplings that `config` asks for, of a student that is sampled by `few_step`, or of a teacher (None) whose calibrated
    solver has `levels` levels. Needs no network: planning counts the same samplings.

    Raises BeelineError for steps that a student was not trained on, for numbers of evaluations that a solver does not allow,
    and for a calibrated solver that is missing.
    """
    if few_step is None:
        if config.solver == "calibrated":
            if levels is None:
                raise BeelineError("this teacher has no calibrated levels; find them with: python -m beeline.calibrate FOLDER")
            return [Sampling(solver="calibrated", num_steps=levels)]
        return [teacher_sampling(nfe, config.solver) for nfe in dict.fromkeys(config.nfe)]
    steps = [few_step.check(parse_steps(text)) for text in config.steps]
    rule = None if config.rule in ("trained", few_step.rule) else config.rule
    return list(dict.fromkeys(Sampling(steps=schedule, rule=rule, guess=few_step.guess) for schedule in steps))


def teacher_sampling(nfe: int, solver: str = "auto") -> Sampling:
    """The sampling of a teacher with `nfe` evaluations. "auto" is Heun for odd counts of 15 and more, Euler below: few-step
    Heun explodes and is not a fair baseline. Raises BeelineError for counts that the solver does not allow."""
    chosen: Solver = "heun" if solver == "heun" or (solver == "auto" and nfe >= 15) else "euler"
    if nfe < 1 or (chosen == "heun" and nfe % 2 == 0):
        raise BeelineError(
            f"nfe {nfe} is not possible with solver {solver!r}; expected an odd number for Heun, any from 1 on for Euler; "
            '"auto" is Heun from 15 on and Euler below'
        )
    return Sampling(solver=chosen, num_steps=(nfe + 1) // 2 if chosen == "heun" else nfe)


def draw(
    model: Denoiser, sampling: Sampling, indices: Sequence[int], labels: np.ndarray, *, seed: int, batch_size: int
) -> torch.Tensor:
    """Draw samples (n, C, H, W) in [-1, 1], on the model's device, from the noise of (seed, indices) and classes `labels` (n,).

    Values that are not finite become NaN.
    """
    device = next(model.parameters()).device
    parts = []
    for batch in batches(len(indices), batch_size):
        rows = slice(batch.start, batch.stop)
        classes = torch.from_numpy(labels[rows]).to(device) if model.label_dim else None
        parts.append(sample(model, indices[rows], classes, sampling, seed=seed))
    images = torch.cat(parts)
    return images.clamp(-1, 1).masked_fill(~images.isfinite(), torch.nan)


def noise_seed(config: EvaluateConfig, number: int) -> int:
    """The seed of draw `number`: 63 bits, never the seed of the training pairs."""
    return stream_seed(config.seed, "draw", number)
