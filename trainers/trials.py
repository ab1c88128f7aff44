"""The trials of a sweep: what each one changes, how it trains, and ASHA over all of them.

A trial is a student in <sweep>/trials/<number>/, with a log, checkpoints and rungs.json, its measurements so far. After a
crash the same command continues: each trial from its checkpoint, and ASHA from the rungs of all trials in all runs.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from ray import tune
from ray.tune.schedulers import ASHAScheduler, TrialScheduler

from beeline.config import StudentConfig, SweepConfig
from beeline.errors import BeelineError, reading
from beeline.files.layout import check_layout
from beeline.metrics.measures import VALIDATION
from beeline.noise import stream
from beeline.numerics import set_numerics
from beeline.objectives.lmm import LinesMatchingConfig
from beeline.sampling.few_step import parse_steps
from pipeline import prometheus
from pipeline.storage import Folder
from trainers import checkpoints, loop
from trainers.student import student_training
from trainers.training import Training

RUNGS = "rungs.json"
REDUCTION = 2  # ASHA keeps the better half at each rung


def folder_name(number: int) -> str:
    """Folder of trial `number`, relative to the sweep's folder."""
    return f"trials/{number:04d}"


def settings(number: int, sweep: SweepConfig, seed: int) -> dict[str, Any]:
    """Settings of trial `number`. Step schedules take turns, so that each gets equally many trials; the rest is random.

    Learning rates are log-uniform within their bounds. The result depends on (seed, number) alone: a larger sweep keeps its
    first trials unchanged.
    """
    draw = stream(seed, "trial", number)
    schedule = sweep.schedules[number % len(sweep.schedules)]
    return {
        "trial": number,
        "steps": schedule,
        "nfe": len(parse_steps(schedule)),
        "lr": _log_uniform(draw.random(), sweep.learning_rates),
        "critic_lr": _log_uniform(draw.random(), sweep.critic_learning_rates),
        "adversarial_weight": float(draw.choice(sweep.adversarial_weights)),
        "ema_half_life": float(draw.choice(sweep.ema_half_lives)),
    }


def _log_uniform(u: float, bounds: tuple[float, float]) -> float:
    low, high = (math.log(bound) for bound in bounds)
    return float(f"{math.exp(low + u * (high - low)):.3g}")


def can_vary(student: StudentConfig) -> bool:
    """Whether a sweep can vary the student: one of its phases is lines matching, and it is not a set."""
    return varied_phase(student) is not None and student.subsets == 1


def varied_phase(student: StudentConfig) -> tuple[str, LinesMatchingConfig] | None:
    """The last phase of lines matching, and its objective; None if there is none."""
    lines = {name: phase.objective for name, phase in student.phases.items()}
    found = [(name, each) for name, each in lines.items() if isinstance(each, LinesMatchingConfig)]
    return found[-1] if found else None


def config_of(trial: Mapping[str, Any], sweep: SweepConfig, student: StudentConfig) -> StudentConfig:
    """Config of the student of a trial with these `settings`: the last phase of lines matching of `student`, from the sweep's
    shared student.

    Raises BeelineError if no phase is lines matching: a sweep varies its settings.
    """
    if student.subsets > 1:
        raise BeelineError(
            f"{student.name!r} is a set of {student.subsets} students; a sweep varies one. Choose another --student"
        )
    if (varied := varied_phase(student)) is None:
        methods = "; ".join(phase.objective.about() for phase in student.phases.values())
        raise BeelineError(
            f"the phases of {student.name!r} are {methods}; a sweep varies settings of lines matching. Choose a student with "
            "--student"
        )
    name, lines = varied
    phase = student.phases[name]
    critic = lines.discriminator
    objective = replace(
        lines,
        steps=tuple(map(int, trial["steps"].split(","))),
        adversarial_weight=trial["adversarial_weight"],
        discriminator=replace(critic, optimizer=replace(critic.optimizer, lr=trial["critic_lr"])),
    )
    optimizer = replace(phase.optimizer, lr=trial["lr"])
    return replace(
        student,
        name=f"trial-{trial['trial']:04d}",
        init=sweep.init,
        phases={name: replace(phase, iterations=sweep.iterations, optimizer=optimizer, objective=objective)},
        ema_half_lives=(trial["ema_half_life"],),
        validate_every=rung_of(sweep),
        checkpoint_every=rung_of(sweep),
        log_every=rung_of(sweep),
        trackers=(),
    )


def trials_of(sweep: SweepConfig, student: StudentConfig) -> dict[int, StudentConfig]:
    """The student of each trial, by number. Raises BeelineError as `config_of` does."""
    return {k: config_of(settings(k, sweep, student.seed), sweep, student) for k in range(sweep.trials)}


def rung_of(sweep: SweepConfig) -> int:
    """Iterations between measurements, and ASHA's first rung. Each later rung doubles the one before it."""
    return max(1, sweep.iterations // REDUCTION ** (sweep.rungs - 1))


def rungs_in(folder: Folder) -> list[dict[str, Any]]:
    """Measurements so far of the trial in `folder`."""
    with reading(f"{folder}/{RUNGS} is damaged", "remove it and run the sweep again"):
        rungs = folder.read_json(RUNGS) or []
        check_layout(rungs, [{"step": 0, VALIDATION: float}])
        return rungs


class Trial(Training):
    """A student that reports each validation to Tune."""

    def validate(self, step: int) -> dict[str, float]:
        """Write a sheet of samples, and record and report the distance. Keeps no best student: the last one is the result."""
        assert self.validation is not None
        figures, sheet = self.validation.judge(self.average())
        self.folder.write("samples.png", sheet)
        rungs = [rung for rung in rungs_in(self.folder) if rung["step"] < step]
        self.folder.write_json(RUNGS, [*rungs, {"step": step, VALIDATION: figures[VALIDATION]}])
        if step < self.iterations:  # after the last step, ASHA would stop the trial before it is published
            tune.report({"step": step, VALIDATION: figures[VALIDATION]})
        return figures


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shared:
    """Inputs that all trials of a sweep share. `folder` is the sweep's; `pairs` and `images` are the plans of those stages."""

    workspace: Folder
    recipe: str
    sweep: SweepConfig
    folder: Folder
    pairs: dict[str, Any]
    images: dict[str, Any]


def run_trial(config: Mapping[str, Any], *, shared: Shared, configs: Mapping[int, StudentConfig]) -> None:
    """Tune's trainable: the loop of train_lmm.py in this process, from the trial's newest checkpoint."""
    sweep = shared.sweep
    set_numerics()
    torch.set_num_threads(sweep.threads)
    number = int(config["trial"])
    student, place = configs[number], shared.folder / folder_name(number)
    session = loop.Session(
        device=torch.device("cuda" if sweep.gpus else "cpu"),
        folder=place,
        trackers=[prometheus.TrainingGauges(f"sweeps/{sweep.name}/{folder_name(number)}")],
    )
    every = student.checkpoint_every
    loop.train(
        lambda session: student_training(
            session=session,
            workspace=shared.workspace,
            recipe=shared.recipe,
            config=student,
            pairs=shared.pairs,
            images=shared.images,
            task=Trial,
        ),
        session,
        loop.Cadence(log_every=every, checkpoint_every=every, validate_every=every),
        functools.partial(checkpoints.newest, place),
    )


class PerSchedule(TrialScheduler):
    """One ASHA for each step schedule, on the training step: in a single ASHA, easy schedules would stop hard ones.

    `trials` holds the settings of each trial, `rungs` its measurements in earlier runs, which count as well.
    """

    def __init__(
        self, sweep: SweepConfig, trials: Mapping[int, Mapping[str, Any]], rungs: Mapping[int, list[dict[str, Any]]]
    ) -> None:
        super().__init__()
        self.trials = trials
        self._of = {
            steps: ASHAScheduler(
                time_attr="step", metric=VALIDATION, mode="min", max_t=sweep.iterations, grace_period=rung_of(sweep),
                reduction_factor=REDUCTION,
            )
            for steps in sweep.schedules
        }  # fmt: skip
        controller: Any = None
        for number, trial_rungs in rungs.items():
            earlier: Any = SimpleNamespace(trial_id=f"earlier-{number}", config={"trial": number})
            self.on_trial_add(controller, earlier)
            for rung in trial_rungs:
                self.on_trial_result(controller, earlier, rung)

    def _asha(self, trial: Any) -> ASHAScheduler:
        return self._of[self.trials[trial.config["trial"]]["steps"]]

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        self._asha(trial).on_trial_add(tune_controller, trial)

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        if not math.isfinite(result[VALIDATION]):  # ASHA would not stop NaN: no comparison with it is true
            return TrialScheduler.STOP
        return self._asha(trial).on_trial_result(tune_controller, trial, result)

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        self._asha(trial).on_trial_complete(tune_controller, trial, result)

    def on_trial_error(self, tune_controller: Any, trial: Any) -> None:
        self._asha(trial).on_trial_error(tune_controller, trial)

    def on_trial_remove(self, tune_controller: Any, trial: Any) -> None:
        self._asha(trial).on_trial_remove(tune_controller, trial)

    def choose_trial_to_run(self, tune_controller: Any, **kwargs: Any) -> Any:
        return next(iter(self._of.values())).choose_trial_to_run(tune_controller, **kwargs)

    def debug_string(self) -> str:
        return "; ".join(f"steps {steps}: {asha.debug_string()}" for steps, asha in self._of.items())
