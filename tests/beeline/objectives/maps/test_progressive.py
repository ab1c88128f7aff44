"""Progressive distillation: on Gaussian data each round learns its teacher's two steps, and the last one their composition."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Literal

import pytest
import small
import torch
from torch import nn

from beeline import counting
from beeline.checkpoint import build
from beeline.config import OptimizerConfig, PhaseConfig, ProbeNetworkConfig, StudentConfig
from beeline.errors import SettingError
from beeline.objectives import Batch, Context
from beeline.objectives.learner import Learner
from beeline.objectives.maps.progressive import Progressive, ProgressiveConfig, rounds
from beeline.sampling.few_step import few_step
from beeline.sampling.solvers import solve
from beeline.schedule import edm_sigmas

OPTIMIZER = OptimizerConfig(lr=1e-3)
DATA = 0.5  # standard deviation of the images
LEVELS = 8
FIRST = ProgressiveConfig(steps=4, num_steps=LEVELS)


class Linear(nn.Module):
    """The denoiser c(sigma) x with one coefficient for each level of a schedule, at first those of Gaussian data."""

    def __init__(self) -> None:
        super().__init__()
        self.levels = edm_sigmas(LEVELS)
        self.coefficients = nn.Parameter(DATA**2 / (DATA**2 + self.levels**2))

    def forward(self, x: torch.Tensor, sigma: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        assert labels is None
        index = (self.levels - sigma.double().reshape(-1, 1)).abs().argmin(dim=1)
        torch.testing.assert_close(self.levels[index], sigma.double().expand(len(index)), rtol=1e-6, atol=0)
        return self.coefficients[index].reshape(-1, 1, 1, 1) * x


def seeded(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def batch(weight: float = 1.0) -> Batch:
    real = DATA * torch.randn(64, 1, 2, 2, generator=seeded(1))
    return Batch(size=64, step=0, total=10, real=real, weight=weight)


def started(config: ProgressiveConfig, average: nn.Module) -> Progressive:
    return config.build(Context(image_shape=(1, 2, 2), num_classes=0, models={}, features={}, average=average))  # pyright: ignore[reportArgumentType]


def gradient(objective: Progressive, student: Linear, weight: float = 1.0) -> torch.Tensor:
    student.zero_grad()
    objective.backward(Learner(student, OPTIMIZER), None, batch(weight), seeded())
    assert student.coefficients.grad is not None
    return student.coefficients.grad.clone()


def learned(config: ProgressiveConfig, average: Linear) -> Linear:
    """The student that minimises the round's loss. The loss is quadratic in each coefficient, so one Newton step suffices."""
    objective, student = started(config, average), Linear()
    first = gradient(objective, student)
    with torch.no_grad():
        student.coefficients.add_(1)
    slope = gradient(objective, student) - first
    with torch.no_grad():
        student.coefficients.sub_(1 + torch.where(slope > 0, first / slope.clamp_min(1e-12), 0.0))
    return student


@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_the_student_takes_its_teachers_two_steps_in_one(solver: Literal["euler", "heun"]) -> None:
    """Also in the last one, which ends at level 0; and the gradient vanishes there."""
    config = dataclasses.replace(FIRST, solver=solver)
    student = learned(config, Linear())
    z = torch.randn(5, 1, 2, 2, generator=seeded())
    images = few_step(student, z, None, steps=config.trained_steps, how=config.sampling())
    torch.testing.assert_close(images, solve(Linear(), z, None, solver=solver, num_steps=LEVELS), rtol=1e-4, atol=1e-6)
    unlearned = few_step(Linear(), z, None, steps=config.trained_steps, how=config.sampling())
    assert float((images - unlearned).detach().abs().max()) > 0.1
    objective = started(config, Linear())
    small_, large = (float(gradient(objective, model).abs().max()) for model in (student, Linear()))
    assert small_ < 1e-4 * large
    torch.testing.assert_close(gradient(objective, Linear(), weight=0.5), 0.5 * gradient(objective, Linear()))


def test_the_last_round_composes_all_steps() -> None:
    """8 -> 4 -> 2 -> 1: one step is eight of Euler's."""
    z, student = torch.randn(5, 1, 2, 2, generator=seeded()), Linear()
    wanted = solve(Linear(), z, None, solver="euler", num_steps=LEVELS)
    for steps in (4, 2, 1):
        config = dataclasses.replace(FIRST, steps=steps)
        student = learned(config, student)
        images = few_step(student, z, None, steps=config.trained_steps, how=config.sampling())
        torch.testing.assert_close(images, wanted, rtol=1e-3, atol=1e-6)


def test_the_weight_is_the_truncated_snr() -> None:
    """The gradient of each coefficient is 2 max(1, 1/t^2) (c - c*) mean(x^2), at the rows of its level."""
    objective, student, target = started(FIRST, Linear()), Linear(), learned(FIRST, Linear())
    with torch.no_grad():
        student.coefficients.copy_(target.coefficients + 1)
    generator = seeded()
    index = 2 * torch.randint(4, (64,), generator=generator)
    t = edm_sigmas(LEVELS)[index].float().reshape(-1, 1, 1, 1)
    real = batch().real
    assert real is not None
    x = real + t * torch.randn(real.shape, generator=generator)
    rows = 2 * (1 / t.square()).clamp_min(1).flatten() * x.square().mean(dim=(1, 2, 3)) / 64
    wanted = torch.zeros(LEVELS).index_add(0, index, rows)
    torch.testing.assert_close(gradient(objective, student).float(), wanted, rtol=1e-3, atol=1e-6)


def test_images_are_mirrored_where_asked() -> None:
    """The loss of images and of their mirror images differs, unless both are mirrored at random."""

    def loss(config: ProgressiveConfig) -> float:
        return float(started(config, Linear()).backward(Learner(Linear(), OPTIMIZER), None, batch(), seeded())["progressive"])

    assert loss(dataclasses.replace(FIRST, flip=True)) != loss(FIRST)


def test_the_teacher_is_a_copy_and_stays() -> None:
    average = Linear()
    objective = started(FIRST, average)
    assert [name for name, _ in objective.state().named_parameters()] == ["coefficients"]
    before = gradient(objective, Linear())
    with torch.no_grad():
        average.coefficients.zero_()
    torch.testing.assert_close(gradient(objective, Linear()), before)


def test_rounds_are_phases_of_a_student() -> None:
    first = ProgressiveConfig(steps=8, num_steps=16, solver="heun", distance="huber")
    phases = rounds(first, (50, 40, 30, 60), OPTIMIZER)
    student = StudentConfig(name="pd", phases=phases, phase_switch="restart")
    assert list(student.models()) == ["students/pd/steps-8", "students/pd/steps-4", "students/pd/steps-2", "students/pd"]
    assert [phase.iterations for phase in phases.values()] == [50, 40, 30, 60]
    configs = [phase.objective for phase in phases.values()]
    assert configs == [
        first, *(dataclasses.replace(first, steps=steps, solver="euler") for steps in (4, 2, 1))
    ]  # fmt: skip
    assert [config.sampling().trained_steps for config in configs if isinstance(config, ProgressiveConfig)] == [
        (0, 2, 4, 6, 8, 10, 12, 14), (0, 4, 8, 12), (0, 8), (0,)
    ]  # fmt: skip
    for one, other in itertools.pairwise(configs[1:]):
        assert one.representative() == other.representative()
    assert configs[0].representative() != configs[1].representative()
    assert configs[1].about() == "progressive distillation to 4 steps, pixel distance (Huber)"
    assert configs[3].about().startswith("progressive distillation to 1 step,")
    with pytest.raises(SettingError, match="num_steps is 12; expected a multiple of twice steps, 16"):
        ProgressiveConfig(steps=8, num_steps=12)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("labelled", [True, False])
def test_a_network_learns(precision: Literal["fp32", "bf16"], labelled: bool) -> None:
    torch.manual_seed(0)
    network = dataclasses.replace(small.NETWORK, label_dim=small.CLASSES if labelled else 0)
    teacher = build(network).eval()
    for parameter in teacher.parameters():
        nn.init.normal_(parameter, 0, 0.05)
    student = build(network).train()
    student.load_state_dict(teacher.state_dict())
    config = ProgressiveConfig(steps=1, num_steps=4)
    objective = config.build(
        Context(image_shape=(1, 8, 8), num_classes=network.label_dim, models={}, features={}, average=teacher)
    )
    labels = torch.eye(small.CLASSES)[torch.arange(8) % small.CLASSES] if labelled else None
    rows = Batch(size=8, step=0, total=30, real=torch.randn(8, 1, 8, 8), real_labels=labels)
    learner = Learner(student, OptimizerConfig(lr=2e-3), precision=precision)
    losses = []
    for step in range(30):
        losses.append(float(objective.backward(learner, None, rows, seeded())["progressive"]))
        assert not learner.update(step, 30)["skipped"]
    assert losses[-1] < 0.5 * losses[0]


def test_cost_is_that_of_the_networks_calls() -> None:
    """A student's step with gradients is about three evaluations; the teacher's two steps are two or four."""
    one, probe = counting.evaluation(small.NETWORK), ProbeNetworkConfig(widths=(8, 12), strides=(1, 2))
    for config, evaluations in ((FIRST, 2), (dataclasses.replace(FIRST, solver="heun"), 4)):
        flops = counting.phase_flops(small.NETWORK, probe, config)
        assert flops == pytest.approx((3 + evaluations) * one, rel=0.05)
    own = counting.phase_bytes(small.NETWORK, probe, FIRST)[1]
    assert own == counting.network_bytes(small.NETWORK)


def test_phases_hold_the_settings() -> None:
    (phase,) = rounds(FIRST, (7,), OPTIMIZER).values()
    assert phase == PhaseConfig(iterations=7, optimizer=OPTIMIZER, objective=FIRST)
