"""Both phases with compiled networks: compared with eager ones, run for several steps, resumed."""

from __future__ import annotations

from benchmarks.device.checks import COMPILING, NONE, Check, Checks, Outcome, Setting, compiling_troubles, worst
from benchmarks.device.training import PHASES, STEPS, Precision, Runs, difference, finite, resumed


def checks(setting: Setting) -> Checks:
    """List the checks of this section."""
    runs = Runs(setting)

    def against_eager(phase: str, precision: Precision) -> Outcome:
        eager = runs.gradients(runs.step(phase, precision, setting.device), runs.many, same_draws=False)
        step = runs.compiled(phase, precision)
        values = difference(runs.gradients(step, runs.many, same_draws=False), eager)
        for learner in (step.student, step.critic):
            if learner is not None:
                learner.optimizer.zero_grad(set_to_none=True)
        troubles = compiling_troubles()
        return worst(values | troubles, runs.limits(phase, precision) | dict.fromkeys(troubles, NONE))

    def all_of(phase: str, precision: Precision) -> Checks:
        name = f"{phase} {precision} compiled"
        yield Check(f"{name}, losses and gradients against eager", lambda: against_eager(phase, precision), COMPILING)
        yield Check(f"{name}, not finite or skipped in {STEPS} steps", lambda: finite(runs, phase, precision, True), COMPILING)
        yield Check(f"{name}, resumed from a checkpoint", lambda: resumed(runs, phase, precision, True), COMPILING)
        runs.trained.cache_clear()

    for phase in PHASES:
        yield from all_of(phase, "bf16")
    yield from all_of("reconstruction", "fp32")
