"""Consistency models: fixed points on Gaussian data, where the teacher and its ODE are known; laws of levels; boundaries."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import numpy as np
import pytest
import torch
from torch import nn

from beeline import counting
from beeline.config import NetworkConfig, OptimizerConfig, ProbeNetworkConfig
from beeline.denoiser import Denoiser
from beeline.errors import SettingError
from beeline.features import Frozen
from beeline.features.probe import Probe
from beeline.objectives import Batch, Context, Needs
from beeline.objectives.consistency import ConsistencyConfig, draw_indices, ect_following, lognormal_law
from beeline.objectives.discriminator import DiscriminatorConfig
from beeline.objectives.learner import Learner
from beeline.objectives.perceptual import l2, pseudo_huber
from beeline.sampling.solvers import ode_step
from beeline.schedule import edm_sigmas

OPTIMIZER = OptimizerConfig(lr=1e-3)
SD = 0.5  # standard deviation of the Gaussian data
ECT = ConsistencyConfig()
CD = ConsistencyConfig(teacher="teacher", levels="schedule", num_steps=6, weighting="none", distance="l2")
CT = ConsistencyConfig(levels="ct", weighting="none", distance="l2", target_decay=0.9)
ICT = ConsistencyConfig(levels="ict", neighbours="lognormal", huber_c=None)
ADVERSARIAL = replace(CD, adversarial_weight=0.5, discriminator=DiscriminatorConfig(optimizer=OPTIMIZER, width=8, augment=()))


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


def test_equal_images_have_a_finite_gradient() -> None:
    """The plain norm would have the gradient of sqrt(0)."""
    x = torch.ones(2, 1, 2, 2, requires_grad=True)
    pseudo_huber(x, torch.ones(2, 1, 2, 2), c=1e-8).sum().backward()
    assert x.grad is not None
    assert float(x.grad.abs().max()) == 0
    norms = pseudo_huber(torch.zeros(1, 1, 2, 2), torch.full((1, 1, 2, 2), 3.0), c=1e-8)
    assert float(norms) == pytest.approx(6.0)
    assert float(pseudo_huber(torch.zeros(1, 1, 2, 2), torch.full((1, 1, 2, 2), 3.0))) == pytest.approx(
        math.sqrt(36 + 0.00108**2) - 0.00108
    )


# Laws of the levels


def test_sizes_and_decays_of_growing_schedules() -> None:
    """Against values by hand: CT with s0 2, s1 150, mu0 .9; iCT with K' = floor(K / (log2(128) + 1))."""
    assert [CT.size(k, 800_000) for k in (0, 1, 200_000, 400_000, 800_000)] == [2, 3, 76, 107, 151]
    assert CT.decay(0, 800_000) == pytest.approx(0.9)
    assert CT.decay(800_000, 800_000) == pytest.approx(math.exp(2 * math.log(0.9) / 151))
    sizes = [ICT.size(k, 400_000) for k in (0, 49_999, 50_000, 100_000, 349_999, 350_000, 400_000)]
    assert sizes == [11, 11, 21, 41, 641, 1281, 1281]
    assert [replace(ICT, sizes=(4, 16)).size(k, 2) for k in (0, 1)] == [5, 9]
    assert (CD.size(0, 10), CD.size(9, 10)) == (6, 6)
    assert replace(CD, target_decay=0.95).decay(7, 10) == 0.95
    assert replace(ECT, target_decay=0.95).decay(7, 10) == 0.95


def test_levels_of_ect() -> None:
    """r(t) by hand at t = 1, where n(t) = 1 + 8 / (1 + e) = 3.15153; stages of equal length."""
    t = torch.ones(1)
    wanted = [0.0, 1 - 3.15153 / 4, 1 - 3.15153 / 8, 1 - 3.15153 / 256]
    assert [float(ect_following(t, stage, 2.0)) for stage in (0, 1, 2, 7)] == pytest.approx(wanted, abs=1e-5)
    assert float(ect_following(torch.tensor([80.0]), 0, 2.0)) == pytest.approx(40.0)
    for step, stage in ((0, 0), (12, 0), (13, 1), (99, 7)):  # 100 steps, 8 stages of 12.5
        batch = Batch(size=50_000, step=step, total=100)
        t, u = ECT.draw(batch, seeded())
        torch.testing.assert_close(u, ect_following(t, stage, 2.0))
    assert float(t.log().mean()) == pytest.approx(-1.1, abs=0.05)
    assert float(t.log().std()) == pytest.approx(2.0, abs=0.05)
    assert bool((u < t).all())


def test_law_of_ict() -> None:
    """p(i) is the mass of N(-1.1, 2^2) between neighbours in ln t, by numerical integration, and draws follow it."""
    levels = edm_sigmas(11)
    grid = np.linspace(-40, math.log(80), 400_001)
    density = np.exp(-((grid + 1.1) ** 2) / 8)
    which = np.searchsorted(-np.log(levels.numpy()), -grid, side="right") - 1
    mass = np.bincount(which.clip(0, 10), weights=density, minlength=11)
    law = lognormal_law(torch.cat([levels, torch.zeros(1, dtype=torch.float64)]), -1.1, 2.0)
    np.testing.assert_allclose(law.numpy(), mass / mass.sum(), atol=2e-5)
    shares = torch.bincount(draw_indices(200_000, 11, law, seeded()), minlength=11) / 200_000
    torch.testing.assert_close(shares.double(), law, rtol=0, atol=0.005)
    t, u = ICT.draw(Batch(size=200_000, step=0, total=10), seeded())
    counts = torch.stack([(t == level).double().mean() for level in levels.float()])
    torch.testing.assert_close(counts, law, rtol=0, atol=0.005)
    following = torch.cat([levels[1:], torch.zeros(1)]).float()
    assert {*zip(t.tolist(), u.tolist(), strict=True)} == {*zip(levels.float().tolist(), following.tolist(), strict=True)}


def test_uniform_neighbours() -> None:
    t, _ = CD.draw(Batch(size=60_000, step=0, total=10), seeded())
    shares = torch.stack([(t == level).double().mean() for level in edm_sigmas(6).float()])
    torch.testing.assert_close(shares, torch.full((6,), 1 / 6, dtype=torch.float64), rtol=0, atol=0.01)


# Adversarial term, settings, cost


def test_the_discriminator_warms_up_first(make_denoiser: Callable[..., Denoiser], probe: Probe) -> None:
    """Until `adversarial_start` the student's gradient is that of the distance alone, while the discriminator learns."""
    teacher, found = make_denoiser(num_blocks=2, img_channels=1), {}
    for name, config in (("plain", CD), ("late", replace(ADVERSARIAL, adversarial_start=0.5)), ("now", ADVERSARIAL)):
        student = copy.deepcopy(make_denoiser(img_channels=1)).requires_grad_(True).train()
        objective = config.build(context(student, teacher, probe))
        critic = None if objective.critic is None else Learner(objective.critic, OPTIMIZER)
        learner = Learner(student, OPTIMIZER)
        for step in (4, 5):
            student.zero_grad()
            batch = Batch(size=4, step=step, total=10, real=images(4, 1))
            objective.backward(learner, critic, batch, seeded())
            found[name, step] = torch.cat([p.grad.flatten() for p in student.parameters() if p.grad is not None])
            if critic is not None:
                assert any(p.grad is not None and bool(p.grad.any()) for p in critic.parameters)
    scale = float(found["plain", 4].abs().max())
    torch.testing.assert_close(found["late", 4], found["plain", 4], rtol=1e-3, atol=1e-4 * scale)
    assert float((found["late", 5] - found["plain", 5]).abs().max()) > 0.01 * scale
    assert float((found["now", 4] - found["plain", 4]).abs().max()) > 0.01 * scale


@pytest.mark.parametrize("labels", [True, False])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("config", [ECT, ICT, replace(ADVERSARIAL, target_decay=0.9), replace(CT, distance="probe")])
def test_trains_the_network(
    config: ConsistencyConfig,
    precision: Literal["fp32", "bf16"],
    labels: bool,
    make_denoiser: Callable[..., Denoiser],
    probe: Probe,
) -> None:
    network = make_denoiser(img_channels=1, label_dim=4 if labels else 0, dropout=0.1)
    student = copy.deepcopy(network).requires_grad_(True).train()
    where = context(network, copy.deepcopy(network), probe)
    objective = config.build(where)
    learner = Learner(student, OPTIMIZER, precision=precision)
    critic = None if objective.critic is None else Learner(objective.critic, OPTIMIZER, precision=precision)
    classes = torch.eye(4)[torch.arange(8) % 4] if labels else None
    for step in range(3):
        batch = Batch(size=8, step=step, total=3, real=images(8, 1), real_labels=classes)
        figures = objective.backward(learner, critic, batch, seeded())
        assert all(value.ndim == 0 and bool(value.isfinite()) and not value.requires_grad for value in figures.values())
        assert learner.update(step, 3)["skipped"] == 0
        if critic is not None:
            assert critic.update(step, 3)["skipped"] == 0
        objective.after_step(student)
    changed = [not torch.equal(a, b) for a, b in zip(student.parameters(), network.parameters(), strict=True)]
    assert all(changed)
    if objective.target is not None:
        assert all(not torch.equal(a, b) for a, b in zip(objective.target.parameters(), network.parameters(), strict=True))


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


def test_needs_and_words() -> None:
    assert ECT.needs() == Needs(images=True)
    assert CD.needs() == Needs(images=True, models=("teacher",))
    assert replace(ADVERSARIAL, distance="lpips").needs().features == ("vgg16", "probe")
    assert ECT.about() == "consistency training with ECT's levels, pixel distance (Huber)"
    assert ADVERSARIAL.about() == "consistency distillation, pixel distance (L2), adversarial term"
    how = CD.sampling()
    assert (how.num_steps, how.rule, how.line, how.trained_steps) == (6, "fresh_noise", "ve", None)


def test_settings_without_a_meaning_are_refused() -> None:
    with pytest.raises(SettingError, match="neighbours is 'lognormal'; expected uniform with levels 'ect'"):
        replace(ECT, neighbours="lognormal")
    with pytest.raises(SettingError, match="sizes is"):
        replace(ECT, sizes=(2, 10))
    with pytest.raises(SettingError, match="sizes is"):
        replace(CT, sizes=(10, 2))
    for change in ({"q": 1.0}, {"target_decay": 1.0}, {"stages": 0}, {"huber_c": 0.0}, {"teacher": "../teacher"}):
        with pytest.raises(SettingError, match=next(iter(change))):
            replace(ECT, **change)


def test_cost_of_a_step() -> None:
    """In evaluations: student 3 (forward and backward), target 1, teacher 1 or 2. Settings of equal cost are counted once."""
    network = NetworkConfig(
        kind="ddpmpp", img_resolution=8, img_channels=1, label_dim=4, model_channels=16, channel_mult=(1,), num_blocks=1,
        attn_resolutions=(8,),
    )  # fmt: skip
    probe = ProbeNetworkConfig(widths=(8, 12), strides=(1, 2))
    one = counting.evaluation(network)
    for config, cost in ((ECT, 4), (CD, 6)):
        assert counting.phase_flops(network, probe, config) / one == pytest.approx(cost, abs=0.1)
    assert counting.phase_flops(network, probe, ADVERSARIAL) > counting.phase_flops(network, probe, CD)
    assert counting.phase_bytes(network, probe, replace(CD, target_decay=0.5))[1] == counting.network_bytes(network)
    assert counting.phase_bytes(network, probe, CD)[1] == 0
    for same in (replace(CD, num_steps=9), replace(CD, levels="ect"), replace(CD, weighting="inverse", pixel_weight=0.3)):
        assert same.representative() == CD.representative()
    for other in (ECT, replace(CD, solver="euler"), replace(CD, target_decay=0.5), replace(CD, distance="probe"), ADVERSARIAL):
        assert other.representative() != CD.representative()


def test_teachers_step_is_heuns() -> None:
    """The closed form of these tests is the step of the solvers."""
    x = torch.randn(3, 1, 1, 2, dtype=torch.float64)
    t, u = torch.tensor([80.0, 2.0, 0.1]), torch.tensor([20.0, 1.0, 0.0])
    factors = [solver_factor(a, b, "heun") for a, b in zip(t.tolist(), u.tolist(), strict=True)]
    stepped = ode_step(Gaussian(), x, t.double(), u.double(), None, solver="heun")
    torch.testing.assert_close(stepped, x * torch.tensor(factors, dtype=torch.float64).reshape(-1, 1, 1, 1))
