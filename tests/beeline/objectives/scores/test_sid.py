"""SiD, SIM and SiDA: on Gaussians their gradients are those of the divergences."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import pytest
import small
import torch
from torch import nn

from beeline import counting
from beeline.checkpoint import build
from beeline.config import OptimizerConfig, ProbeNetworkConfig
from beeline.denoiser import Denoiser
from beeline.errors import SettingError
from beeline.networks.songunet import SongUNet
from beeline.objectives import Batch, Context, Needs
from beeline.objectives.learner import Learner
from beeline.objectives.scores.sid import JudgingEncoder, ScoreMatchingConfig, SiDAConfig, SiDConfig, SIMConfig, sid, sim
from beeline.sampling.few_step import FewStep

DATA, LEVEL = 1.0, 0.8  # standard deviations of the images and of the noise
A = 0.6  # standard deviation of the generated images a z, before the gradient


def quadrature(count: int = 60) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Pairs of normal numbers z and n, each (count^2, 1, 1, 1), and weights (count^2,) with which sums over them are means."""
    points, weights = (torch.from_numpy(part) for part in np.polynomial.hermite_e.hermegauss(count))
    z, n = (part.reshape(-1, 1, 1, 1) for part in torch.meshgrid(points, points, indexing="ij"))
    weights = weights / weights.sum()
    return z, n, torch.outer(weights, weights).flatten()


def predictions(images: torch.Tensor, n: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The exact denoisers of the data and of the generator, at images + LEVEL n."""
    x = images + LEVEL * n
    return DATA**2 / (DATA**2 + LEVEL**2) * x, A**2 / (A**2 + LEVEL**2) * x


def gap(a: torch.Tensor) -> torch.Tensor:
    """k in v = k x, for the generator of standard deviation a."""
    return DATA**2 / (DATA**2 + LEVEL**2) - a**2 / (a**2 + LEVEL**2)


def slope(value: torch.Tensor, a: torch.Tensor) -> float:
    return float(torch.autograd.grad(value, a)[0])


def fisher(a: torch.Tensor, law: torch.Tensor) -> torch.Tensor:
    """E |v|^2 / 2 of the generator a, for x of the generator `law`."""
    return gap(a).square() * (law.square() + LEVEL**2) / 2


def generator() -> torch.Tensor:
    return torch.tensor(A, dtype=torch.float64, requires_grad=True)


def gradient_of_sid(alpha: float) -> float:
    (z, n, weights), a = quadrature(), generator()
    return slope((weights * sid(a * z, *predictions(a * z, n), alpha)).sum(), a)


def gradient_of_sim(c: float) -> float:
    (z, n, weights), a = quadrature(), generator()
    return slope((weights * sim(a * z, *predictions(a * z, n), c)).sum(), a)


def test_sid_is_the_fisher_divergence() -> None:
    """For alpha = 0.5; for alpha = 1 at a fixed law of x. In between and beyond, the gradient is linear in alpha."""
    a, fixed = generator(), torch.tensor(A, dtype=torch.float64)
    moving, standing = slope(fisher(a, a), a), slope(fisher(a, fixed), a)
    assert standing < moving < -0.1
    assert gradient_of_sid(0.5) == pytest.approx(moving)
    assert gradient_of_sid(1.0) == pytest.approx(standing)
    assert gradient_of_sid(1.2) == pytest.approx(moving + 1.4 * (standing - moving))


@pytest.mark.parametrize("c", [0.05, 0.3, 5.0])
def test_sim_is_the_pseudo_huber_distance_at_a_fixed_law(c: float) -> None:
    a, x = generator(), math.hypot(A, LEVEL) * quadrature(200)[0][::200].flatten()
    weights = torch.from_numpy(np.polynomial.hermite_e.hermegauss(200)[1]) / math.sqrt(2 * math.pi)
    distance = (weights * ((gap(a) * x).square() + c * c).sqrt()).sum()
    assert gradient_of_sim(c) == pytest.approx(slope(distance, a), rel=1e-2)


def test_sim_for_small_differences_is_sid_with_alpha_1() -> None:
    assert 1e4 * gradient_of_sim(1e4) == pytest.approx(gradient_of_sid(1.0), rel=1e-6)
    assert gradient_of_sim(0.05) != pytest.approx(gradient_of_sid(1.0) / 0.05, rel=0.5)


def test_equal_scores_have_no_gradient() -> None:
    """The gradient of a student whose law is that of the data is 0."""
    z, n, weights = quadrature()
    for loss in (lambda y, t: sid(y, t, t, 1.2), lambda y, t: sim(y, t, t, 0.1)):
        a = torch.tensor(DATA, dtype=torch.float64, requires_grad=True)
        real, _ = predictions(a * z, n)
        assert abs(slope((weights * loss(a * z, real)).sum(), a)) < 1e-12


class Scaled(nn.Module):
    """A student that makes images of standard deviation a, and, as the critic, the exact denoiser of those of `follows`."""

    def __init__(self, a: float, follows: Scaled | None = None) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.tensor(a))
        self.follows = [] if follows is None else [follows]  # not a submodule

    def forward(self, x: torch.Tensor, sigma: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        assert labels is None
        s = sigma.reshape(-1, 1, 1, 1)
        if not self.follows:
            return self.a * x / s
        a = self.follows[0].a.detach()
        return a**2 / (a**2 + s**2) * x + 0 * self.a


def teacher_of_gaussians(x: torch.Tensor, sigma: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
    assert labels is None
    return 0.25 / (0.25 + sigma.reshape(-1, 1, 1, 1) ** 2) * x


@pytest.mark.parametrize("config", [SiDConfig(), SiDConfig(alpha=0.5), SIMConfig()])
@pytest.mark.parametrize("start", [0.3, 0.8])
def test_a_student_of_gaussians_becomes_the_data(config: ScoreMatchingConfig, start: float) -> None:
    """From narrower and from wider images, with an exact fake score."""
    student = Scaled(start)
    learner = Learner(student, OptimizerConfig(lr=0.05, decay="cosine"))
    critic = Learner(Scaled(1.0, follows=student), OptimizerConfig())
    config = dataclasses.replace(config, fake_start="student")
    objective = config.build(
        Context(image_shape=(1, 2, 2), num_classes=0, models={"teacher": teacher_of_gaussians}, features={}, average=student)  # pyright: ignore[reportArgumentType]
    )
    generator, figures = torch.Generator().manual_seed(0), {}
    for step in range(40):
        noise = torch.randn(256, 1, 2, 2, generator=generator)
        rows = Batch(size=256, step=step, total=40, noise=noise)
        figures = objective.backward(learner, critic, rows, generator)
        learner.update(step, 40)
        critic.optimizer.zero_grad()
    assert float(student.a.detach()) == pytest.approx(0.5, abs=0.03)
    assert float(figures["image_std"]) == pytest.approx(0.5, abs=0.06)


@pytest.fixture
def networks(make_denoiser: Callable[..., Denoiser]) -> tuple[Denoiser, Denoiser]:
    """A student and its teacher."""
    student = copy.deepcopy(make_denoiser()).requires_grad_(True).train()
    return student, different(student).eval().requires_grad_(False)


def different(model: Denoiser) -> Denoiser:
    """A copy of `model` with other weights."""
    other, generator = copy.deepcopy(model), seeded()
    for parameter in other.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return other


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def context(student: Denoiser, teacher: Denoiser) -> Context:
    average = copy.deepcopy(student).eval().requires_grad_(False)
    models = {"teacher": teacher}
    return Context(image_shape=student.image_shape, num_classes=student.label_dim, models=models, features={}, average=average)


def batch(count: int = 4, step: int = 0, weight: float = 1.0) -> Batch:
    noise = torch.randn(count, 2, 8, 8, generator=torch.Generator().manual_seed(1))
    return Batch(size=count, step=step, total=10, noise=noise, weight=weight)


def gradients(model: nn.Module) -> torch.Tensor:
    return torch.cat([torch.zeros(p.numel()) if p.grad is None else p.grad.flatten() for p in model.parameters()])


def karras(u: torch.Tensor) -> torch.Tensor:
    return (0.002 ** (1 / 7) + u * (80 ** (1 / 7) - 0.002 ** (1 / 7))) ** 7


@pytest.mark.parametrize("config", [SiDConfig(alpha=1.1), SIMConfig(huber_c=0.3)])
def test_gradients_are_those_of_the_formula(config: ScoreMatchingConfig, networks: tuple[Denoiser, Denoiser]) -> None:
    """The student's through x, T and f; the fake score's from its own loss alone; none for the teacher."""
    student, teacher = networks
    twin, rows, generator = copy.deepcopy(student), batch(), seeded()
    assert rows.noise is not None
    y = twin(2.5 * rows.noise, torch.full((4,), 2.5))
    s = karras(0.8 * torch.rand(4, generator=generator))
    x = y + s[:, None, None, None] * torch.randn(y.shape, generator=generator)
    fake, real = different(teacher).requires_grad_(True), teacher(x, s)
    v = real - fake(x, s)
    if isinstance(config, SiDConfig):
        per_image = (v * (real - y - 1.1 * v)).flatten(1).sum(1) / (y - real).detach().abs().flatten(1).mean(1)
    else:
        per_image = (v * (real - v - y)).flatten(1).sum(1) / (v.square().flatten(1).sum(1) + 0.09).sqrt()
    per_image.mean().backward()
    wanted = gradients(twin)
    fake.zero_grad()
    s = (1.2 * torch.randn(4, generator=generator) - 1.2).exp()
    x = y.detach() + s[:, None, None, None] * torch.randn(y.shape, generator=generator)
    ((1 / s**2 + 4) * (fake(x, s) - y.detach()).square().flatten(1).mean(1)).mean().backward()

    objective, learner = config.build(context(student, teacher)), Learner(student, OptimizerConfig())
    critic = Learner(different(teacher).requires_grad_(True), OptimizerConfig())
    figures = objective.backward(learner, critic, rows, seeded())
    assert set(figures) == {"image_mean", "image_std", "gap", "a", "fake"}
    assert float(figures["gap"]) == pytest.approx(float(v.detach().square().mean().sqrt()), rel=1e-3)
    assert float(figures["a"]) == pytest.approx(float((y - real).detach().abs().mean()), rel=1e-3)
    for model, expected in ((student, wanted), (critic.model, gradients(fake))):
        torch.testing.assert_close(gradients(model), expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
    objective.backward(learner, critic, batch(weight=0.5), seeded())
    torch.testing.assert_close(gradients(student), 1.5 * wanted, rtol=1e-3, atol=2e-4 * float(wanted.abs().max()))
    assert all(parameter.grad is None for parameter in teacher.parameters())


def bottleneck(model: Denoiser, x: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
    """The output of the last block of the encoder, caught by a hook."""
    caught: list[Any] = []
    assert isinstance(model.model, SongUNet)
    block = list(model.model.enc.values())[-1]
    with block.register_forward_hook(lambda module, inputs, output: caught.append(output)):
        model(x, s)
    return caught[0]


def test_the_encoder_judges(networks: tuple[Denoiser, Denoiser]) -> None:
    """SiDA's gradients are those of its formulas, and the fake score has no new weights."""
    student, teacher = networks
    twin, generator = copy.deepcopy(student), seeded()
    rows = dataclasses.replace(batch(), real=torch.randn(4, 2, 8, 8, generator=seeded()), step=5)
    assert rows.noise is not None
    assert rows.real is not None
    y = twin(2.5 * rows.noise, torch.full((4,), 2.5))
    s = karras(0.8 * torch.rand(4, generator=generator))
    x = y + s[:, None, None, None] * torch.randn(y.shape, generator=generator)
    fake, real = different(teacher).requires_grad_(True), teacher(x, s)
    v, a = real - fake(x, s), (y - real).detach().abs().flatten(1).mean(1)
    matching = ((v * (real - y - 1.2 * v)).flatten(1).sum(1) / a).mean()
    fooling = (1 + (-bottleneck(fake, x, s).mean(1)).exp()).log().mean()
    (matching + 0.1 * 128 * (1 / a).mean() * fooling).backward()
    wanted = gradients(twin)
    fake.zero_grad()
    s = (1.2 * torch.randn(4, generator=generator) - 1.2).exp()
    n = s[:, None, None, None] * torch.randn(y.shape, generator=generator)
    y = y.detach()
    weight, error = 1 / s**2 + 4, (fake(y + n, s) - y).square().flatten(1).mean(1)
    judged = [(1 + (sign * bottleneck(fake, z + n, s).mean(1)).exp()).log().mean() for sign, z in ((1, y), (-1, rows.real))]
    ((weight * error).mean() + 0.3 / 128 * weight.mean() * (judged[0] + judged[1]) / 2).backward()

    config = SiDAConfig(adversarial_weight=0.1, adversarial_start=0.5, critic_weight=0.3)
    objective, learner = config.build(context(student, teacher)), Learner(student, OptimizerConfig())
    assert isinstance(objective.critic, JudgingEncoder)
    assert len(list(objective.critic.parameters())) == len(list(student.parameters()))
    objective.critic.denoiser = different(teacher).requires_grad_(True)
    critic = Learner(objective.critic, OptimizerConfig())
    figures = objective.backward(learner, critic, rows, seeded())
    assert set(figures) == {"image_mean", "image_std", "gap", "a", "adversarial", "fake", "critic"}
    for model, expected in ((student, wanted), (objective.critic, gradients(fake))):
        torch.testing.assert_close(gradients(model), expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
    early = []  # before its start there is no adversarial term
    for other, judge in ((config, objective.critic), (SiDConfig(), objective.critic.denoiser)):
        student.zero_grad()
        fake_learner = Learner(judge, OptimizerConfig())
        other.build(context(student, teacher)).backward(learner, fake_learner, dataclasses.replace(rows, step=4), seeded())
        early.append(gradients(student))
    torch.testing.assert_close(early[0], early[1], rtol=1e-3, atol=1e-4 * float(early[1].abs().max()))


def test_the_fake_score_may_learn_in_more_steps(networks: tuple[Denoiser, Denoiser]) -> None:
    student, teacher = networks
    objective = SiDConfig(fake_steps=2).build(context(student, teacher))
    assert isinstance(objective.critic, Denoiser)
    critic = Learner(objective.critic, OptimizerConfig())
    for step, learns in ((0, False), (1, True)):
        student.zero_grad()
        critic.optimizer.zero_grad()
        objective.backward(Learner(student, OptimizerConfig()), critic, batch(step=step), seeded())
        assert (objective.turns(step).student, objective.turns(step).critic) == (learns, True)
        assert bool(gradients(student).any()) == learns
        assert bool(gradients(objective.critic).any())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize("config", [SIMConfig(), SiDAConfig()])
def test_networks_learn(config: ScoreMatchingConfig, precision: Literal["fp32", "bf16"], labelled: bool) -> None:
    """Student and fake score learn, with one call of the student's for gradients in each step; the teacher stays."""
    torch.manual_seed(0)
    network = dataclasses.replace(small.NETWORK, label_dim=small.CLASSES if labelled else 0)
    teacher = build(network).eval().requires_grad_(False)
    for parameter in teacher.parameters():
        nn.init.normal_(parameter, 0, 0.05)
    student, calls = copy.deepcopy(teacher).train().requires_grad_(True), []

    def watched(model: nn.Module) -> Callable[..., torch.Tensor]:
        return lambda *inputs: calls.append(torch.is_grad_enabled()) or model(*inputs)

    objective = config.build(context(student, teacher))
    assert objective.critic is not None
    optimizer = OptimizerConfig(lr=1e-3, betas=(0.0, 0.999), clip=0.0)
    learner = Learner(student, optimizer, parallel=watched, precision=precision)  # pyright: ignore[reportArgumentType]
    critic = Learner(objective.critic, optimizer, precision=precision)
    before, losses = copy.deepcopy(teacher.state_dict()), []
    labels = torch.eye(small.CLASSES)[torch.arange(8) % small.CLASSES] if labelled else None
    noise, real = (torch.randn(8, 1, 8, 8, generator=seeded()) for _ in range(2))
    rows = Batch(size=8, step=0, total=8, noise=noise, labels=labels, real=real, real_labels=labels)
    for step in range(8):
        figures = objective.backward(learner, critic, dataclasses.replace(rows, step=step), seeded())
        losses.append(float(figures["fake"]))
        assert not learner.update(step, 8)["skipped"]
        assert not critic.update(step, 8)["skipped"]
    assert calls == [True] * 8
    assert losses[-1] < losses[0]
    assert not torch.equal(weights_of(student), weights_of(teacher))
    for name, value in teacher.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)


def weights_of(model: nn.Module) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def test_cost_is_that_of_the_networks_calls() -> None:
    """A step is 10 evaluations: 3 for the student, 2 each for teacher and frozen fake score, 3 for the fake score's own loss.
    A step of the fake score alone is 4. SiDA's encoder judges B images for the student and 2 B for the fake score."""
    one, probe = counting.evaluation(small.NETWORK), ProbeNetworkConfig(widths=(8, 12), strides=(1, 2))
    assert counting.phase_flops(small.NETWORK, probe, SiDConfig()) == pytest.approx(10 * one, rel=0.05)
    assert counting.phase_flops(small.NETWORK, probe, SIMConfig(fake_steps=2)) == pytest.approx((10 + 4) / 2 * one, rel=0.05)
    judging = counting.phase_flops(small.NETWORK, probe, SiDAConfig())
    assert 11 * one < judging < 12 * one  # the encoder is a fifth of this network
    assert counting.phase_bytes(small.NETWORK, probe, SiDAConfig()) == counting.phase_bytes(small.NETWORK, probe, SiDConfig())


def test_settings() -> None:
    for config in (SiDConfig(), SIMConfig()):
        assert config.needs() == Needs(noise=True, models=("teacher",))
        assert SiDAConfig().needs() == config.needs() | Needs(images=True)
        assert config.sampling() == FewStep(num_steps=1, levels=(2.5,), trained_steps=(0,))
    assert SiDConfig(start_levels=(80.0,)).sampling().sigmas((0,)) == [80.0]
    assert SiDConfig().about() == "score identity distillation (SiD), alpha 1.2"
    assert SIMConfig().about() == "score implicit matching (SIM), pseudo-Huber distance, c 0.08"
    assert SiDAConfig().about() == "score identity distillation, adversarial term on noisy images (SiDA), alpha 1.2"
    judging = SiDAConfig(alpha=0.5, adversarial_weight=1.0, adversarial_start=0.5, critic_weight=0.1, flip=True)
    assert judging.representative() == SiDAConfig().representative()
    changed = SiDConfig(alpha=0.5, span=(0.1, 0.2), fake_optimizer=OptimizerConfig(lr=1.0))
    assert changed.representative() == SiDConfig().representative()
    assert SIMConfig(huber_c=2.0, fake_steps=2).representative() == SIMConfig(fake_steps=2).representative()
    assert SIMConfig(fake_steps=2).representative() != SIMConfig().representative()
    with pytest.raises(SettingError, match="huber_c is 0"):
        SIMConfig(huber_c=0.0)
