"""BOOT: on Gaussian data the student that follows the teacher's steps is the minimiser, and the ODE itself in the limit."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any, Literal

import pytest
import small
import torch
from torch import nn

from beeline import counting
from beeline.checkpoint import build
from beeline.config import OptimizerConfig, ProbeNetworkConfig
from beeline.objectives import Batch, Context, Needs
from beeline.objectives.learner import Learner
from beeline.objectives.maps.boot import BootConfig
from beeline.sampling.few_step import few_step
from beeline.sampling.solvers import ode_step, solve
from beeline.schedule import SIGMA_MAX, edm_sigmas

OPTIMIZER = OptimizerConfig(lr=1e-3)
DATA = 0.5  # standard deviation of the images
Solver = Literal["euler", "heun"]


def teacher(x: torch.Tensor, sigma: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
    """The exact denoiser of Gaussian data."""
    return DATA**2 / (DATA**2 + sigma.reshape(-1, 1, 1, 1) ** 2) * x


class Jumps(nn.Module):
    """The flow map g(x, 80, s) = c(s) x with one coefficient for each level s of a schedule and for 0; `given`: those."""

    def __init__(self, num_steps: int, given: torch.Tensor) -> None:
        super().__init__()
        self.levels = torch.cat([edm_sigmas(num_steps), torch.zeros(1)])
        self.coefficients = nn.Parameter(given.clone())

    def forward(
        self, x: torch.Tensor, sigma: torch.Tensor, labels: torch.Tensor | None, augment: None, to: torch.Tensor
    ) -> torch.Tensor:
        assert bool((sigma == SIGMA_MAX).all())
        index = (self.levels - to.double().reshape(-1, 1)).abs().argmin(dim=1)
        return self.coefficients[index].reshape(-1, 1, 1, 1) * x


def followed(num_steps: int, solver: Solver) -> torch.Tensor:
    """Coefficients c(s) of the points that the teacher's steps reach from 80 z: (1 - s/80) c(s) 80 z = x_s - s z."""
    levels = torch.cat([edm_sigmas(num_steps), torch.zeros(1)])
    points = [torch.full((1, 1, 1, 1), SIGMA_MAX, dtype=torch.float64)]
    for s, u in itertools.pairwise(levels):
        points.append(ode_step(teacher, points[-1], s.reshape(1), u.reshape(1), None, solver=solver))
    return coefficients(torch.cat(points).flatten(), levels)


def exact(num_steps: int) -> torch.Tensor:
    """The same of the ODE's solution."""
    levels = torch.cat([edm_sigmas(num_steps), torch.zeros(1)])
    return coefficients(SIGMA_MAX * ((DATA**2 + levels**2) / (DATA**2 + SIGMA_MAX**2)).sqrt(), levels)


def coefficients(points: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    return torch.cat([torch.full((1,), 7.0), (points - levels)[1:] / (SIGMA_MAX - levels[1:])])  # any value at 80


def trained(given: torch.Tensor, config: BootConfig, weight: float = 1.0) -> tuple[float, torch.Tensor]:
    """The loss, and its gradient with respect to the coefficients."""
    student = Jumps(config.num_steps, given)
    z = torch.randn(1024, 1, 1, 1, generator=torch.Generator().manual_seed(1))
    context: dict[str, Any] = {"models": {"teacher": teacher}, "features": {}, "average": student}
    objective = config.build(Context(image_shape=(1, 1, 1), num_classes=0, **context))
    batch = Batch(size=len(z), step=0, total=10, noise=z, weight=weight)
    figures = objective.backward(Learner(student, OPTIMIZER), None, batch, torch.Generator().manual_seed(3))
    assert student.coefficients.grad is not None
    return float(figures["boot"]), student.coefficients.grad


@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_following_the_teachers_steps_is_the_minimiser(solver: Solver) -> None:
    """The boundary is exact whatever the network says at level 80: its coefficient there is arbitrary here."""
    config = BootConfig(num_steps=12, solver=solver)
    given = followed(12, solver)
    assert float(trained(given, config)[1].abs().max()) < 1e-3
    for level in range(1, 13):
        off = given.clone()
        off[level] += 1e-3
        assert float(trained(off, config)[1][level]) > 0.1
    torch.testing.assert_close(trained(1.1 * given, config, weight=0.5)[1], 0.5 * trained(1.1 * given, config)[1])
    z = torch.randn(5, 1, 1, 1, generator=torch.Generator().manual_seed(1))
    images = solve(teacher, z, None, solver=solver, num_steps=12)
    torch.testing.assert_close(given[-1].float() * SIGMA_MAX * z, images, rtol=1e-4, atol=1e-6)


def test_the_odes_map_is_the_fixed_point_of_a_fine_grid() -> None:
    """Its loss falls with the square of the step; that of another map does not."""
    losses = [trained(exact(steps), BootConfig(num_steps=steps))[0] for steps in (32, 128)]
    assert losses[1] < losses[0] / 8
    others = [trained(1.1 * exact(steps), BootConfig(num_steps=steps))[0] for steps in (32, 128)]
    assert losses[1] < 0.1 * others[1]
    assert others[1] > others[0] / 4


def test_the_weight_keeps_the_gradient_of_all_levels_alike() -> None:
    """The gradient of a coefficient is 2 (1 - u/s)^-2 ((1 - u/80) 80)^2 (c - c*) mean(z^2), at the rows of its level u."""
    config, levels, given = BootConfig(num_steps=12), torch.cat([edm_sigmas(12), torch.zeros(1)]), followed(12, "euler")
    index = torch.randint(12, (1024,), generator=torch.Generator().manual_seed(3))
    z = torch.randn(1024, generator=torch.Generator().manual_seed(1))
    for level in (1, 7, 12):
        off = given.clone()
        off[level] += 0.01
        u, s = levels[level], levels[level - 1]
        rows = z.square()[index == level - 1].sum() / 1024
        wanted = 0.02 * (1 - u / s) ** -2 * ((1 - u / SIGMA_MAX) * SIGMA_MAX) ** 2 * rows
        assert float(trained(off, config)[1][level]) == pytest.approx(float(wanted), rel=1e-3)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("labelled", [True, False])
def test_a_network_learns(precision: Literal["fp32", "bf16"], labelled: bool) -> None:
    """The teacher is an exact denoiser of Gaussian images, and the student a network with a second level."""
    torch.manual_seed(0)
    network = dataclasses.replace(small.NETWORK, label_dim=small.CLASSES if labelled else 0, second_level=True)
    student = build(network).train()
    context: dict[str, Any] = {"models": {"teacher": teacher}, "features": {}, "average": student}
    config = BootConfig(num_steps=4)
    objective = config.build(Context(image_shape=(1, 8, 8), num_classes=network.label_dim, **context))
    labels = torch.eye(small.CLASSES)[torch.arange(8) % small.CLASSES] if labelled else None
    learner = Learner(student, OptimizerConfig(lr=1e-2), precision=precision)
    z = torch.randn(8, 1, 8, 8)
    for step in range(40):
        generator = torch.Generator().manual_seed(step)
        objective.backward(learner, None, Batch(size=8, step=step, total=40, noise=z, labels=labels), generator)
        assert not learner.update(step, 40)["skipped"]
    student.eval()
    classes = None if labels is None else labels.argmax(dim=1)
    images = few_step(student, z, classes, steps=(0,), how=config.sampling())
    wanted = solve(teacher, z, None, solver="euler", num_steps=4)
    assert float((images - wanted).detach().square().mean() / wanted.square().mean()) < 0.5


def test_cost_is_that_of_the_networks_calls() -> None:
    """A student's step with gradients is about three evaluations; its target is one, the teacher's step one or two."""
    network = dataclasses.replace(small.NETWORK, second_level=True)
    one, probe = counting.evaluation(network), ProbeNetworkConfig(widths=(8, 12), strides=(1, 2))
    for config, evaluations in ((BootConfig(), 1), (BootConfig(solver="heun"), 2)):
        flops = counting.phase_flops(small.NETWORK, probe, config)
        assert flops == pytest.approx((4 + evaluations) * one, rel=0.05)


def test_settings() -> None:
    assert BootConfig().needs() == Needs(noise=True, models=("teacher",), second_level=True)
    assert BootConfig(distance="probe").needs().features == ("probe",)
    assert BootConfig(num_steps=9).sampling().trained_steps == (0,)
    assert BootConfig(num_steps=9, pixel_weight=0.1).representative() == BootConfig().representative()
    assert BootConfig(solver="heun").representative() != BootConfig().representative()
    assert BootConfig().about() == "BOOT, pixel distance (L2)"
