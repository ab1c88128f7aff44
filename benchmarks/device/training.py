"""Both phases of the paper's CIFAR-10 student, with its losses and two averages: against the CPU, compiled, resumed."""

from __future__ import annotations

import contextlib
import functools
import io
import math
from typing import Any, Literal, Protocol

import torch

from beeline.features.backbones import BACKBONES
from beeline.noise import stream_seed
from benchmarks.device.checks import (
    Check,
    Checks,
    Outcome,
    SameDraws,
    Setting,
    at_most,
    identical,
    relative,
    start_compiling,
    worst,
)
from benchmarks.device.measuring import KINKS
from benchmarks.device.networks import backbone, batch_of, network_config, random_denoiser, student_config
from benchmarks.training import Step

Precision = Literal["fp32", "bf16"]
PHASES = ("reconstruction", "adversarial")
# Relative errors of float32 against the CPU. In bf16 the limit is these values or twice the error of bf16 on the CPU.
LIMITS: dict[str, dict[str, float]] = {
    "fp32": {"losses": 1e-3, "student's gradient": KINKS, "critic's gradient": 5e-3},
    "bf16": {"losses": 2e-2, "student's gradient": 0.05, "critic's gradient": 0.05},
}
STEPS = 4  # steps of a run that is interrupted halfway
SIGNS = ("real_positive", "fake_positive")  # shares over few images, so they jump


class HasState(Protocol):
    """An object with a state for a checkpoint."""

    def state_dict(self) -> dict[str, Any]: ...


class Runs:
    """Training runs, each run once and cached."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.network = network_config(setting, augment_dim=0)
        self.model = random_denoiser(self.network)
        self.networks: dict[str, Any] = {name: backbone(name) for name in BACKBONES}
        self.few = 2 if setting.small else 4
        self.many = 2 if setting.small else 64  # as in benchmarks.training: compiled code is reused for the same shape
        self.reference = functools.cache(self._reference)
        self.trained = functools.cache(self._trained)
        self.compiled = functools.lru_cache(1)(self._compiled)

    def step(self, phase: str, precision: Precision, device: torch.device, *, compiled: bool = False) -> Step:
        """Build a new student's step on `device`."""
        config = student_config(self.setting, precision=precision, compiled=compiled)
        model = random_denoiser(self.network).to(device)
        return Step(model, self.networks, config, config.phases[phase])

    def _compiled(self, phase: str, precision: Precision) -> Step:
        start_compiling()
        return self.step(phase, precision, self.setting.device, compiled=True)

    def gradients(self, step: Step, count: int, *, same_draws: bool = True) -> dict[str, Any]:
        """Compute figures and gradients of one batch; with `same_draws`, all devices use the CPU's random numbers."""
        batch = batch_of(self.setting, self.network, count, step.device)
        with SameDraws(0) if same_draws else contextlib.nullcontext():
            figures = step.objective.backward(step.student, step.critic, batch, torch.Generator(step.device).manual_seed(0))
        return results(step, figures)

    def _reference(self, phase: str, precision: Precision) -> dict[str, Any]:
        return self.gradients(self.step(phase, precision, torch.device("cpu")), self.few)

    def limits(self, phase: str, precision: Precision) -> dict[str, float]:
        """Return the limits of relative errors: see LIMITS."""
        limits = LIMITS[precision]
        if precision == "fp32":
            return limits
        of_cpu = difference(self.reference(phase, "bf16"), self.reference(phase, "fp32"))
        return {name: max(limits[name], 2 * error) for name, error in of_cpu.items()}

    def _trained(self, phase: str, precision: Precision, compiled: bool) -> dict[str, Any]:
        """Train for STEPS steps; return the run, its checkpoint from halfway, and the run resumed from there."""
        device, half = self.setting.device, STEPS // 2
        count = self.many if compiled else self.few
        batch = batch_of(self.setting, self.network, count, device)
        step = self.compiled(phase, precision) if compiled else self.step(phase, precision, device)
        figures, checkpoint = [], b""
        for number in range(STEPS):
            if number == half:
                checkpoint = saved(step)
            figures.append(one(step, batch, number))
        undisturbed = state_of(step)
        if not compiled:  # another one, as after a restart; what takes a minute to compile takes its old state instead
            step = self.step(phase, precision, device)
        step.load_state_dict(torch.load(io.BytesIO(checkpoint), map_location="cpu", weights_only=True))
        for number in range(half, STEPS):
            one(step, batch, number)
        return {"figures": figures, "checkpoint": checkpoint, "undisturbed": undisturbed, "resumed": state_of(step)}


def results(step: Step, figures: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Collect figures and gradients on the CPU."""
    critic = [] if step.critic is None else step.critic.parameters
    return {
        "figures": {name: float(value) for name, value in figures.items() if name not in SIGNS},
        "student": [p.grad.cpu() for p in step.student.parameters if p.grad is not None],
        "critic": [p.grad.cpu() for p in critic if p.grad is not None],
    }


def one(step: Step, batch: Any, number: int) -> dict[str, float]:
    """Run one step with the random numbers that the trainer draws."""
    torch.manual_seed(stream_seed(0, "global", number))
    generator = torch.Generator(step.device).manual_seed(stream_seed(0, "step", number))
    return {name: float(value) for name, value in step(batch, generator).items()}


def saved(step: Step) -> bytes:
    """Encode the checkpoint as the trainer writes it."""
    buffer = io.BytesIO()
    torch.save(step.state_dict(), buffer)
    return buffer.getvalue()


def tensors(state: Any) -> list[torch.Tensor]:
    """List all tensors of a nested state, in order."""
    if isinstance(state, torch.Tensor):
        return [state]
    parts = state.values() if isinstance(state, dict) else state if isinstance(state, list | tuple) else ()
    return [tensor for part in parts for tensor in tensors(part)]


def state_of(step: HasState) -> list[torch.Tensor]:
    """List all tensors of a step's state, on the CPU."""
    return [tensor.detach().cpu().clone() for tensor in tensors(step.state_dict())]


def difference(found: dict[str, Any], wanted: dict[str, Any]) -> dict[str, float]:
    """Compute relative errors, by the names of LIMITS."""
    losses = (abs(found["figures"][key] - value) / max(abs(value), 0.1) for key, value in wanted["figures"].items())
    made = {"losses": max(losses), "student's gradient": relative(found["student"], wanted["student"])}
    return made | ({"critic's gradient": relative(found["critic"], wanted["critic"])} if wanted["critic"] else {})


def finite(runs: Runs, phase: str, precision: Precision, compiled: bool) -> Outcome:
    """Count figures of a run that are not finite, and skipped steps."""
    figures = runs.trained(phase, precision, compiled)["figures"]
    bad = sum(not math.isfinite(value) for row in figures for value in row.values()) + sum(row["skipped"] for row in figures)
    return at_most(float(bad), 0.0, figures=figures)


def resumed(runs: Runs, phase: str, precision: Precision, compiled: bool) -> Outcome:
    """Check that the run resumed from a checkpoint ends like the undisturbed one."""
    made = runs.trained(phase, precision, compiled)
    return identical(made["resumed"], made["undisturbed"])


def checks(setting: Setting) -> Checks:
    """List the checks of this section."""
    runs = Runs(setting)

    def against_cpu(phase: str, precision: Precision) -> Outcome:
        found = runs.gradients(runs.step(phase, precision, setting.device), runs.few)
        wanted = runs.reference(phase, "fp32")
        made = worst(difference(found, wanted), runs.limits(phase, precision))
        return Outcome(
            passed=made.passed, figure=made.figure, expected=made.expected,
            details={**made.details, "found": found["figures"], "cpu": wanted["figures"]},
        )  # fmt: skip

    def on_cpu(phase: str, precision: Precision) -> Outcome:
        checkpoint = io.BytesIO(runs.trained(phase, precision, False)["checkpoint"])
        state = torch.load(checkpoint, map_location="cpu", weights_only=True)
        step = runs.step(phase, precision, torch.device("cpu"))
        step.load_state_dict(state)
        return identical(state_of(step), tensors(state))

    for phase in PHASES:
        for precision in ("fp32", "bf16"):
            name = f"{phase} {precision}"
            yield Check(f"{name}, losses and gradients against the CPU's fp32", lambda p=phase, q=precision: against_cpu(p, q))
            yield Check(
                f"{name}, not finite or skipped in {STEPS} steps", lambda p=phase, q=precision: finite(runs, p, q, False)
            )
            yield Check(f"{name}, resumed from a checkpoint", lambda p=phase, q=precision: resumed(runs, p, q, False))
            yield Check(f"{name}, the checkpoint loads on the CPU", lambda p=phase, q=precision: on_cpu(p, q))
        runs.trained.cache_clear()
