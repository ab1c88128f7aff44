"""The rows of a table: the ways in which a model is sampled, and samples drawn in one of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch

from beeline.config import EvaluateConfig
from beeline.denoiser import Denoiser
from beeline.errors import BeelineError
from beeline.noise import stream_seed
from beeline.sampling.few_step import FewStep, RuleName, parse_steps
from beeline.sampling.samplers import Solver, batches, evaluations, sample


@dataclasses.dataclass(frozen=True)
class Row:
    """One way of sampling a model: by `steps` (students; `rule` only where it is not the student's own) or by `solver` and
    `num_steps` (teachers)."""

    nfe: int
    steps: tuple[int, ...] | None
    solver: Solver | None
    num_steps: int
    rule: RuleName | None = None

    @property
    def label(self) -> str:
        """As tables name it: "heun 18" or "0,8" or "0,8 fresh_noise"."""
        if self.steps is None:
            return f"{self.solver} {self.num_steps}"
        return " ".join([",".join(map(str, self.steps)), *([self.rule] if self.rule else [])])

    @property
    def slug(self) -> str:
        """As files name it: heun-18, 0-8."""
        return slug_of(self.label)


def slug_of(label: str) -> str:
    """A row's label as files name it."""
    return label.replace(" ", "-").replace(",", "-")


def rows_for(model: Denoiser, config: EvaluateConfig) -> list[Row]:
    """The rows that `config` asks of this model. Raises BeelineError as `rows_of` does."""
    return rows_of(model.few_step, config, levels=None if model.levels is None else len(model.levels))


def rows_of(few_step: FewStep | None, config: EvaluateConfig, *, levels: int | None) -> list[Row]:
    """The rows that `config` asks of a student that is sampled by `few_step`, or of a teacher (None) whose calibrated solver
    has `levels` levels. Needs no network: planning counts the same rows.

    Raises BeelineError for steps that a student was not trained on, for evaluations that a solver cannot have, and for a
    calibrated solver that is missing.
    """
    if few_step is None:
        if config.solver == "calibrated":
            if levels is None:
                raise BeelineError("this teacher has no calibrated levels; find them with: python -m beeline.calibrate FOLDER")
            return [Row(levels, None, "calibrated", levels)]
        return [teacher_row(nfe, config.solver) for nfe in dict.fromkeys(config.nfe)]
    rows = []
    for text in dict.fromkeys(config.steps):
        steps = few_step.check(parse_steps(text))
        rule = None if config.rule in ("trained", few_step.rule) else config.rule
        rows.append(Row(len(steps), steps, None, few_step.num_steps, rule))
    return rows


def teacher_row(nfe: int, solver: str = "auto") -> Row:
    """The row of a teacher at `nfe` evaluations. "auto" is Heun for odd counts of 15 and more, Euler below: few-step Heun
    explodes and is no fair baseline. Raises BeelineError for counts that the solver cannot have."""
    chosen: Solver = "heun" if solver == "heun" or (solver == "auto" and nfe >= 15) else "euler"
    if nfe < 1 or (chosen == "heun" and nfe % 2 == 0):
        raise BeelineError(
            f"nfe {nfe} cannot be had with solver {solver!r}: Heun takes odd counts, Euler any from 1; "
            '"auto" is Heun from 15 on and Euler below'
        )
    num_steps = (nfe + 1) // 2 if chosen == "heun" else nfe
    assert evaluations(chosen, num_steps) == nfe
    return Row(nfe, None, chosen, num_steps)


def draw(model: Denoiser, row: Row, indices: Sequence[int], labels: np.ndarray, *, seed: int, batch_size: int) -> torch.Tensor:
    """Samples (n, C, H, W) in [-1, 1] on the model's device for noise (seed, indices) and classes `labels` (n,); NaN where the
    model's are not finite."""
    device = next(model.parameters()).device
    how = dataclasses.replace(model.few_step, rule=row.rule) if model.few_step is not None and row.rule else None
    parts = []
    for batch in batches(len(indices), batch_size):
        classes = torch.from_numpy(labels[batch.start : batch.stop]).to(device) if model.label_dim else None
        parts.append(
            sample(
                model, indices[batch.start : batch.stop], classes, seed=seed,
                steps=row.steps, solver=row.solver or "heun", num_steps=row.num_steps, how=how,
            )
        )  # fmt: skip
    made = torch.cat(parts)
    return made.clamp(-1, 1).masked_fill(~made.isfinite(), torch.nan)


def noise_seed(config: EvaluateConfig, number: int) -> int:
    """The seed of draw `number`: 63 bits of their own, never that of the training pairs."""
    return stream_seed(config.seed, "draw", number)
