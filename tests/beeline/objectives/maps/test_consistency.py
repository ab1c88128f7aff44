"""Consistency models: fixed points on Gaussian data, where the teacher and its ODE are known; boundaries, targets, dropout."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import pytest
import torch
from torch import nn

from beeline.config import OptimizerConfig
from beeline.denoiser import Denoiser
from beeline.features import Frozen
from beeline.features.probe import Probe
from beeline.objectives import Batch, Context
from beeline.objectives.learner import Learner
from beeline.objectives.maps.consistency import ConsistencyConfig
from beeline.objectives.perceptual import l2
from beeline.sampling.solvers import ode_step
from beeline.schedule import edm_sigmas

OPTIMIZER = OptimizerConfig(lr=1e-3)
SD = 0.5  # standard deviation of the Gaussian data
ECT = ConsistencyConfig()
CD = ConsistencyConfig(teacher="teacher", levels="schedule", num_steps=6, weighting="none", distance="l2")


class Gaussian(nn.Module):
    """The denoiser of data N(0, SD^2)."""

    def forward(self, x: torch.Tensor, sigma: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        return x * (SD**2 / (SD**2 + sigma**2)).reshape(-1, 1, 1, 1)


class KnownMap(nn.Module):
    """The consistency function of data N(0, SD^2): the end of the ODE x_s = x_t sqrt((SD^2 + s^2) / (SD^2 + t^2))."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, x: torch.Tensor, sigma: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        return x * (self.factor * SD / (SD**2 + sigma.double() ** 2).sqrt()).reshape(-1, 1, 1, 1)


class Gains(nn.Module):
    """A learnable factor per level: f(x, t_i) = gains_i x. It can represent the fixed point of any schedule."""

    def __init__(self, levels: torch.Tensor, gains: torch.Tensor) -> None:
        super().__init__()
        self.levels, self.gains = levels, nn.Parameter(gains)

    def forward(self, x: torch.Tensor, sigma: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        assert bool((sigma > 0).all())
        i = (self.levels.log()[None] - sigma.double().log()[:, None]).abs().argmin(dim=1)
        return self.gains[i].reshape(-1, 1, 1, 1) * x


def solver_factor(t: float, u: float, solver: str) -> float:
    """x_u / x_t of one step of the Gaussian teacher's ODE, dx/dt = x t / (SD^2 + t^2)."""

    def slope(level: float) -> float:
        return level / (SD**2 + level**2)

    euler = 1 + (u - t) * slope(t)
    return euler if solver == "euler" or u == 0 else 1 + (u - t) / 2 * (slope(t) + euler * slope(u))


def fixed_point(levels: torch.Tensor, solver: str) -> torch.Tensor:
    """Gains of a consistency model of the solver's path: products of its steps from each level to 0, float64 (N,)."""
    ends = [*levels.tolist(), 0.0]
    steps = torch.tensor([solver_factor(t, u, solver) for t, u in itertools.pairwise(ends)], dtype=torch.float64)
    return steps.flip(0).cumprod(0).flip(0)


def gaussian_batch(count: int, step: int = 0, total: int = 10, weight: float = 1.0) -> Batch:
    real = SD * torch.randn(count, 1, 1, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return Batch(size=count, step=step, total=total, real=real, weight=weight)


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def context(average: nn.Module, teacher: nn.Module | None = None, probe: Probe | None = None) -> Context:
    torch.manual_seed(0)
    return Context(
        image_shape=getattr(average, "image_shape", (1, 1, 2)),
        num_classes=getattr(average, "label_dim", 0),
        models={} if teacher is None else {"teacher": teacher},  # pyright: ignore[reportArgumentType]
        features={} if probe is None else {"probe": Frozen(probe)},
        average=average,  # pyright: ignore[reportArgumentType]
    )


def gradient(config: ConsistencyConfig, model: nn.Module, batch: Batch) -> torch.Tensor:
    """The gradient of one batch with the Gaussian teacher, flattened."""
    model.zero_grad()
    objective = config.build(context(model, Gaussian() if config.teacher else None))
    objective.backward(Learner(model, OPTIMIZER), None, batch, seeded())
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


# CD: one trajectory, so the loss itself vanishes at the fixed point


@pytest.mark.parametrize("solver", ["heun", "euler"])
def test_distillation_ends_at_the_solvers_path(solver: Literal["heun", "euler"]) -> None:
    """The gradient vanishes at the products of the solver's steps, and at no other gains; those approach the known map."""
    levels, config = edm_sigmas(6), replace(CD, solver=solver)
    exact = fixed_point(levels, solver)
    at_end = gradient(config, Gains(levels, exact.clone()), gaussian_batch(256))
    off = gradient(config, Gains(levels, 1.05 * exact), gaussian_batch(256))
    assert float(at_end.abs().max()) < 1e-3 * float(
        off[-1].abs()
    )  # a common factor breaks only the boundary, at the last level
    fine = edm_sigmas(300)
    known = SD / (SD**2 + fine**2).sqrt()
    error = float((fixed_point(fine, solver) / known - 1).abs().max())
    assert error < {"heun": 1e-3, "euler": 5e-2}[solver]


def test_gradients_are_those_of_the_formula() -> None:
    """At arbitrary gains, with no gradient through the target, and with the batch's weight."""
    levels = edm_sigmas(6)
    ends = [*levels.tolist(), 0.0]
    gains = torch.linspace(0.2, 0.9, 6, dtype=torch.float64)
    config, batch, generator = replace(CD, weighting="inverse"), gaussian_batch(64), seeded()
    assert batch.real is not None
    t = config.draw(batch, generator)[0]
    x_t = batch.real + t.reshape(-1, 1, 1, 1) * torch.randn(batch.real.shape, generator=generator)
    wanted = torch.zeros(6, dtype=torch.float64)
    for row in range(64):
        i = min(range(6), key=lambda i: abs(ends[i] - float(t[row])))
        step = solver_factor(ends[i], ends[i + 1], "heun")
        following = float(gains[i + 1]) if i < 5 else 1.0
        error = (float(gains[i]) - following * step) * x_t[row]
        wanted[i] += (2 * error * x_t[row]).mean() / (ends[i] - ends[i + 1]) / 64
    torch.testing.assert_close(gradient(config, Gains(levels, gains.clone()), batch), wanted, rtol=1e-4, atol=1e-7)
    half = gradient(config, Gains(levels, gains.clone()), replace(batch, weight=0.5))
    torch.testing.assert_close(half, 0.5 * wanted, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("config", [replace(CD, num_steps=300), replace(CD, levels="ect", stages=12)])
def test_the_known_map_minimises_distillation_on_fine_levels(config: ConsistencyConfig) -> None:
    batch = gaussian_batch(512, step=99, total=100)

    def loss(model: nn.Module) -> float:
        objective = config.build(context(model, Gaussian()))
        return float(objective.backward(Learner(model, OPTIMIZER), None, batch, seeded())["consistency"])

    class Start(KnownMap):
        def forward(self, x: torch.Tensor, sigma: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
            return self.factor * Gaussian()(x, sigma)

    assert loss(KnownMap()) < 1e-3 * loss(Start())


# CT: the target is noisy, so the expected gradient vanishes


def test_training_from_data_ends_at_eulers_path() -> None:
    """E[x_u | x_t] is the Euler step of the ODE: training from data has the same fixed point as distillation with Euler."""
    levels, batch = edm_sigmas(6), gaussian_batch(1 << 18)
    config, exact = replace(CD, teacher=None), fixed_point(levels, "euler")
    scale = 2 * (SD**2 + levels**2) / 6  # of the gradient with respect to each gain: 2 E x_t^2 p(i)
    error = gradient(config, Gains(levels, exact.clone()), batch) / scale / exact
    assert float(error.abs().max()) < 0.01
    shifted = exact * torch.tensor([1.0, 1.05, 1.0, 1.05, 1.0, 1.05], dtype=torch.float64)
    error = gradient(config, Gains(levels, shifted), batch) / scale / shifted
    torch.testing.assert_close(error[1::2], torch.full((3,), 0.05 / 1.05, dtype=torch.float64), rtol=0, atol=0.01)


def test_first_stage_of_ect_is_denoising() -> None:
    """With r = 0 the target is the image: the loss is a diffusion's, and its minimiser the denoiser."""
    config, batch = replace(ECT, q=1.0001, p_std=0.5, distance="l2", weighting="none"), gaussian_batch(1 << 16)
    assert float(config.draw(batch, seeded())[1].max()) == 0
    levels = torch.logspace(-2, 1.5, 60, dtype=torch.float64)
    denoiser = Gains(levels, SD**2 / (SD**2 + levels**2))
    at_end = gradient(config, denoiser, batch)
    off = gradient(config, Gains(levels, SD / (SD**2 + levels**2).sqrt()), batch)
    assert float(at_end.norm()) < 0.1 * float(off.norm())


# Boundaries, targets, dropout


def images(count: int, channels: int = 2) -> torch.Tensor:
    return torch.randn(count, channels, 8, 8, generator=torch.Generator().manual_seed(1)).clamp(-1, 1)


@pytest.mark.parametrize("solver", ["heun", "euler"])
def test_boundary(solver: Literal["heun", "euler"], make_denoiser: Callable[..., Denoiser]) -> None:
    """In the last interval the target is the point itself: the image, or the teacher's Euler step to level 0."""
    model, teacher = copy.deepcopy(make_denoiser()).requires_grad_(True), make_denoiser(num_blocks=2)
    batch = Batch(size=4, step=0, total=10, real=images(4))
    assert batch.real is not None
    config = replace(CD, num_steps=1, solver=solver)
    generator = seeded()
    t, u = config.draw(batch, generator)
    assert (t.tolist(), u.tolist()) == ([80.0] * 4, [0.0] * 4)
    x_t = batch.real + 80 * torch.randn(batch.real.shape, generator=generator)
    for which, target in ((config, teacher(x_t, t)), (replace(config, teacher=None), batch.real)):
        objective = which.build(context(model, teacher))
        figures = objective.backward(Learner(model, OPTIMIZER), None, batch, seeded())
        assert float(figures["consistency"]) == pytest.approx(float(l2(model(x_t, t), target).mean().detach()), rel=1e-4)


def test_targets_start_equal_and_follow(make_denoiser: Callable[..., Denoiser]) -> None:
    """An average with decay mu: equal to the student at first, then w <- mu w + (1 - mu) student; in the checkpoint."""
    student, teacher = copy.deepcopy(make_denoiser()).requires_grad_(True), make_denoiser(num_blocks=2)
    average = copy.deepcopy(student).eval().requires_grad_(False)
    batch = Batch(size=4, step=0, total=10, real=images(4))
    losses = {}
    for decay in (0.0, 0.75):
        objective = replace(CD, target_decay=decay).build(context(average, teacher))
        student.zero_grad()
        losses[decay] = objective.backward(Learner(student, OPTIMIZER), None, batch, seeded())["consistency"]
        assert objective.state() is objective.target
        assert (objective.target is None) == (decay == 0)
    assert float(losses[0.0]) == float(losses[0.75])
    target = objective.target
    assert target is not None
    assert not any(parameter.requires_grad for parameter in target.parameters())
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(1.0)
    objective.after_step(student)
    for ours, before in zip(target.parameters(), average.parameters(), strict=True):
        torch.testing.assert_close(ours, before + 0.25)
    student.zero_grad()
    followed = objective.backward(Learner(student, OPTIMIZER), None, batch, seeded())["consistency"]
    own = replace(CD).build(context(average, teacher)).backward(Learner(student, OPTIMIZER), None, batch, seeded())
    assert float(followed) != pytest.approx(float(own["consistency"]), rel=1e-3)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SameLevels(ConsistencyConfig):
    """Pairs with t = u."""

    def draw(self, batch: Batch, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        t, _ = super().draw(batch, generator)
        return t, t


@pytest.mark.parametrize("decay", [0.0, 0.9])
def test_both_sides_share_the_dropout_mask(decay: float, make_denoiser: Callable[..., Denoiser]) -> None:
    student = copy.deepcopy(make_denoiser(dropout=0.5)).requires_grad_(True).train()
    average = copy.deepcopy(student).eval().requires_grad_(False)
    x, t = images(4), torch.ones(4)
    assert not torch.equal(student(x, t), student(x, t))
    config = SameLevels(levels="schedule", weighting="none", distance="l2", target_decay=decay)
    objective = config.build(context(average))
    batch = Batch(size=4, step=0, total=10, real=x)
    assert float(objective.backward(Learner(student, OPTIMIZER), None, batch, seeded())["consistency"]) == 0


def test_real_images_are_mirrored_where_asked() -> None:
    """With images [a, 0], the student sees 0 and a swapped in about half of the rows."""
    seen: list[torch.Tensor] = []

    class Watched(KnownMap):
        def forward(self, x: torch.Tensor, sigma: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
            seen.append(x)
            return super().forward(x, sigma)

    batch = Batch(size=400, step=0, total=10, real=torch.tensor([1000.0, 0.0], dtype=torch.float64).expand(400, 1, 1, 2))
    for flip, low, high in ((False, 0, 0), (True, 150, 250)):
        model = Watched()
        replace(ECT, flip=flip, p_std=0.1).build(context(model)).backward(Learner(model, OPTIMIZER), None, batch, seeded())
        assert low <= int((seen[-2][..., 1] > 500).sum()) <= high


def test_teachers_step_is_heuns() -> None:
    """The closed form of these tests is the step of the solvers."""
    x = torch.randn(3, 1, 1, 2, dtype=torch.float64)
    t, u = torch.tensor([80.0, 2.0, 0.1]), torch.tensor([20.0, 1.0, 0.0])
    factors = [solver_factor(a, b, "heun") for a, b in zip(t.tolist(), u.tolist(), strict=True)]
    stepped = ode_step(Gaussian(), x, t.double(), u.double(), None, solver="heun")
    torch.testing.assert_close(stepped, x * torch.tensor(factors, dtype=torch.float64).reshape(-1, 1, 1, 1))
