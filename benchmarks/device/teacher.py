"""EDM training of the recipe's teacher: loss and augmentation against the CPU, dropout, average, resume."""

from __future__ import annotations

import copy
import functools
import io
import math
from dataclasses import replace
from typing import Any, Literal

import torch

from beeline.augmentation import augment
from beeline.noise import stream_seed
from beeline.objectives.edm import edm_loss
from beeline.objectives.ema import ema_update
from beeline.objectives.learner import Learner
from beeline.recipes import RECIPES
from benchmarks.device.checks import Check, Checks, Outcome, SameDraws, Setting, at_most, identical, relative, worst
from benchmarks.device.networks import classes, images, network_config, random_denoiser
from benchmarks.device.training import STEPS, state_of, tensors

Precision = Literal["fp32", "bf16"]
LIMITS: dict[str, dict[str, float]] = {
    "fp32": {"loss": 1e-4, "gradient": 2e-3, "augmented images": 1e-4},
    "bf16": {"loss": 2e-2, "gradient": 0.1, "augmented images": 1e-4},
}


class Teacher:
    """A teacher in training, with steps as in trainers/train_teacher.py."""

    def __init__(self, setting: Setting, precision: Precision, device: torch.device, dropout: float) -> None:
        self.config = RECIPES["cifar10"](0).teacher
        network = replace(network_config(setting), dropout=dropout)
        self.model = random_denoiser(network).to(device).train().requires_grad_(True)
        self.average = copy.deepcopy(self.model).eval().requires_grad_(False)
        self.learner = Learner(self.model, self.config.optimizer, precision=precision)
        self.device, count = device, 2 if setting.small else 4
        self.images = images(network, count, 0).to(device)
        self.labels = classes(network, count)
        self.number = 0

    def loss(self, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute the loss of the batch, and the augmented images."""
        augmented, given = augment(self.images, 0.5, generator)
        return edm_loss(self.learner, augmented, self.labels, generator, given), augmented

    def step(self) -> dict[str, float]:
        """Run one step with the random numbers that the trainer draws."""
        torch.manual_seed(stream_seed(0, "global", self.number))
        loss, _ = self.loss(torch.Generator(self.device).manual_seed(stream_seed(0, "step", self.number)))
        loss.backward()
        figures = self.learner.update(self.number, self.config.iterations)
        self.number += 1
        ema_update(self.average, self.model, self.config.ema_half_life, self.number, self.config.ema_ramp)
        return {"loss": float(loss.detach()), **figures}

    def state_dict(self) -> dict[str, Any]:
        """Return the state as the trainer's checkpoint holds it."""
        return {"number": self.number, "ema": self.average.state_dict(), "learner": self.learner.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Invert `state_dict`."""
        self.number = state["number"]
        self.average.load_state_dict(state["ema"])
        self.learner.load_state_dict(state["learner"])


def checks(setting: Setting) -> Checks:
    """List the checks of this section."""
    cpu = torch.device("cpu")

    def gradients(precision: Precision, device: torch.device) -> tuple[float, torch.Tensor, list[torch.Tensor]]:
        teacher = Teacher(setting, precision, device, dropout=0.0)
        with SameDraws(0):
            loss, augmented = teacher.loss(torch.Generator(device).manual_seed(0))
            loss.backward()
        return float(loss.detach()), augmented.cpu(), [p.grad.cpu() for p in teacher.learner.parameters if p.grad is not None]

    reference = functools.cache(lambda: gradients("fp32", cpu))

    def against_cpu(precision: Precision) -> Outcome:
        found, wanted = gradients(precision, setting.device), reference()
        values = {
            "loss": abs(found[0] - wanted[0]) / abs(wanted[0]),
            "augmented images": relative([found[1]], [wanted[1]]),
            "gradient": relative(found[2], wanted[2]),
        }
        return worst(values, LIMITS[precision])

    @functools.cache
    def trained(precision: Precision) -> dict[str, Any]:
        teacher = Teacher(setting, precision, setting.device, dropout=0.13)
        figures, checkpoint = [], io.BytesIO()
        for number in range(STEPS):
            if number == STEPS // 2:
                torch.save(teacher.state_dict(), checkpoint)
            figures.append(teacher.step())
        state = torch.load(io.BytesIO(checkpoint.getvalue()), map_location="cpu", weights_only=True)
        resumed = Teacher(setting, precision, setting.device, dropout=0.13)
        resumed.load_state_dict(state)
        while resumed.number < STEPS:
            resumed.step()
        return {"figures": figures, "undisturbed": state_of(teacher), "resumed": state_of(resumed), "state": state}

    def finite(precision: Precision) -> Outcome:
        figures = trained(precision)["figures"]
        bad = sum(not math.isfinite(value) for row in figures for value in row.values()) + sum(
            row["skipped"] for row in figures
        )
        return at_most(float(bad), 0.0, figures=figures)

    def on_cpu() -> Outcome:
        state, teacher = trained("fp32")["state"], Teacher(setting, "fp32", cpu, dropout=0.13)
        teacher.load_state_dict(state)
        outcome = identical(state_of(teacher), tensors(state))
        teacher.step()
        return outcome

    for precision in ("fp32", "bf16"):
        yield Check(f"{precision}, loss and gradient against the CPU's fp32", lambda p=precision: against_cpu(p))
        yield Check(f"{precision}, not finite or skipped in {STEPS} steps", lambda p=precision: finite(p))
        yield Check(
            f"{precision}, resumed from a checkpoint, dropout and all",
            lambda p=precision: identical(trained(p)["resumed"], trained(p)["undisturbed"]),
        )
    yield Check("the checkpoint loads on the CPU and goes on there", on_cpu)
