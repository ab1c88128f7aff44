"""Distribution matching: gradients in closed form on Gaussians, the discriminator's part, and steps through real networks."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import small
import torch
import torch.distributed
from closed_form import ClosedForm, Gaussian
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from beeline import counting
from beeline.checkpoint import build
from beeline.config import OptimizerConfig, ProbeNetworkConfig
from beeline.denoiser import Denoiser
from beeline.errors import SettingError
from beeline.objectives import Batch, Context
from beeline.objectives.learner import Learner
from beeline.objectives.scores.dmd import DMD, DMD2, WEIGHTS, DMD2Config, DMDConfig, balanced_weights
from beeline.objectives.scores.fake_score import error_scale, noisy

ADAM = OptimizerConfig(lr=1e-3, clip=0.0)
SD, STD, MEAN = 0.5, 0.3, 0.2
NARROW = (0.35, 0.35 + 1e-9)
"""A range of u that holds one level."""
PROBE = ProbeNetworkConfig(widths=(4,), strides=(1,))


class Generator(ClosedForm):
    """y = std z + mean, of the input sigma z."""

    def __init__(self, std: float, mean: float) -> None:
        super().__init__()
        self.std = nn.Parameter(torch.tensor(std, dtype=torch.float64))
        self.mean = nn.Parameter(torch.tensor(mean, dtype=torch.float64))

    def output(self, x: torch.Tensor, t: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        return self.std * x / t + self.mean


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def gaussian_step(config: DMDConfig, student: Generator, count: int = 200_000) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The student's gradient, of std and mean, with an exact fake score."""
    exact = Gaussian(float(student.std.detach()), float(student.mean.detach()))
    context = Context(
        image_shape=(1, 1, 1), num_classes=0, models={"teacher": Gaussian(SD).requires_grad_(False)}, features={}, average=exact
    )
    objective = replace(config, fake_start="student").build(context)
    noise = torch.randn(count, 1, 1, 1, generator=seeded(1), dtype=torch.float64)
    learner, critic = Learner(student, ADAM), Learner(objective.critic or exact, ADAM)
    batch = Batch(size=count, step=0, total=1, noise=noise)
    figures = objective.backward(learner, critic, batch, seeded())
    assert student.std.grad is not None
    assert student.mean.grad is not None
    return torch.stack([student.std.grad, student.mean.grad]), figures


def level_of(span: tuple[float, float]) -> float:
    return (0.002 ** (1 / 7) + span[0] * (80 ** (1 / 7) - 0.002 ** (1 / 7))) ** 7


def test_unscaled_it_is_the_gradient_of_kl() -> None:
    """s^2 KL(N(m, a^2 + s^2) | N(0, sd^2 + s^2)), differentiated by a and m."""
    config = DMDConfig(scaled=False, span=NARROW)
    student, s = Generator(STD, MEAN), level_of(NARROW)
    ours, figures = gaussian_step(config, student)
    a, m = (torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (STD, MEAN))
    ratio = (a**2 + s**2) / (SD**2 + s**2)
    kl = s**2 * 0.5 * (ratio + m**2 / (SD**2 + s**2) - 1 - ratio.log())
    torch.testing.assert_close(ours, torch.stack(torch.autograd.grad(kl, (a, m))), rtol=0.02, atol=0)
    assert float(figures["image_mean"]) == pytest.approx(MEAN, abs=0.01)
    assert float(figures["image_std"]) == pytest.approx(STD, rel=0.01)


@pytest.mark.parametrize("config", [DMDConfig(), DMDConfig(scaled=False, levels="lognormal", start_levels=(1.0,))])
def test_it_vanishes_at_the_data(config: DMDConfig) -> None:
    still, figures = gaussian_step(config, Generator(SD, 0.0), 1000)
    assert float(still.abs().max()) < 1e-12
    assert float(figures["gap"]) < 1e-12
    narrow, _ = gaussian_step(config, Generator(0.4, 0.1), 10_000)
    assert float(narrow[0]) < 0 < float(narrow[1])  # descent widens it, and moves it back


def networks(labels: bool = True, *, seed: int = 0) -> tuple[Denoiser, Denoiser]:
    """A student and a teacher with different random weights."""
    torch.manual_seed(seed)
    made = [build(replace(small.NETWORK, label_dim=small.CLASSES if labels else 0)) for _ in range(2)]
    for model in made:
        for parameter in model.parameters():
            nn.init.normal_(parameter, 0, 0.1)
    return made[0].train(), made[1].eval().requires_grad_(False)


def context_of(student: Denoiser, teacher: Denoiser) -> Context:
    average = copy.deepcopy(student).eval().requires_grad_(False)
    return Context(
        image_shape=student.image_shape,
        num_classes=student.label_dim,
        models={"teacher": teacher},
        features={},
        average=average,
    )


def rows(config: DMDConfig | DMD2Config, *, labels: bool = True, size: int = 6, step: int = 0, **changes: Any) -> Batch:
    """A batch of random tensors that `config` needs."""
    generator, needs = seeded(step), config.needs()
    images = {name: torch.randn(size, 1, 8, 8, generator=generator) for name in ("noise", "x1", "real")}
    classes = torch.eye(small.CLASSES)[torch.arange(size) % small.CLASSES] if labels else None
    return Batch(
        size=size,
        step=step,
        total=100,
        noise=images["noise"],
        labels=classes,
        x1=images["x1"] if needs.pairs else None,
        real=images["real"] if needs.images else None,
        real_labels=classes if needs.images else None,
        **changes,
    )


def test_each_row_is_divided_by_its_scale() -> None:
    student, teacher = networks()
    images = torch.randn(6, 1, 8, 8)
    gradients = {}
    for scaled in (True, False):
        objective = DMDConfig(scaled=scaled).build(context_of(student, teacher))
        assert objective.critic is not None
        for parameter in objective.critic.parameters():
            parameter.data *= 0.9
        batch = rows(objective.config)
        gradients[scaled], _ = objective.gradient(Learner(objective.critic, ADAM), images, batch, seeded())
    x, sigma = noisy(images, "karras", (0.0, 0.8), seeded())
    scale = error_scale(images, teacher(x, sigma, batch.labels))
    torch.testing.assert_close(gradients[True] * scale, gradients[False])
    gap = objective.critic(x, sigma, batch.labels) - teacher(x, sigma, batch.labels)
    torch.testing.assert_close(gradients[False], gap.detach() / images.numel())


def test_regression_adds_the_distance_on_pairs() -> None:
    """One call of the student: fresh noise for the divergence, and the pairs' own noise for the regression."""
    student, teacher = networks()
    config = DMDConfig(regression_weight=0.5)
    context, learner = context_of(student, teacher), Learner(student, ADAM)
    objective, plain = config.build(context), DMDConfig().build(context)
    batch = rows(config)
    assert batch.noise is not None
    assert batch.x1 is not None
    assert objective.critic is not None
    images = objective.draw(learner, batch, seeded(), gradients=True)
    assert images.requires_grad
    start = torch.full((6,), 2.5)
    torch.testing.assert_close(images[6:], student(2.5 * batch.noise, start, batch.labels))
    fresh = torch.randn(6, 1, 8, 8, generator=seeded())
    torch.testing.assert_close(images[:6], student(2.5 * fresh, start, batch.labels))
    alone = objective.draw(learner, batch, seeded(), gradients=False)
    torch.testing.assert_close(alone, images[:6].detach())
    leaf = images.detach().requires_grad_()
    ours, figures = objective.gradient(Learner(objective.critic, ADAM), leaf, batch, seeded())
    theirs, _ = plain.gradient(Learner(objective.critic, ADAM), leaf[:6], batch, seeded())
    torch.testing.assert_close(ours[:6], theirs)
    difference = leaf[6:].detach() - batch.x1
    torch.testing.assert_close(ours[6:], 0.5 * 2 * difference / difference.numel())
    torch.testing.assert_close(figures["regression"], difference.square().mean())


PHI: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "reverse_kl": lambda r: -r.log(),
    "kl": lambda r: r * r.log(),
    "js": lambda r: r * r.log() - (r + 1) * ((r + 1) / 2).log(),
    "jeffreys": lambda r: (r - 1) * r.log(),
    "hellinger": lambda r: 1 - r.sqrt(),
    "softened": lambda r: (r + 1) * (1 + 1 / r).log(),
    "neyman": lambda r: (1 - r) ** 2 / r,
}


@pytest.mark.parametrize("divergence", PHI)
def test_weights_turn_the_gradient_into_that_of_another_divergence(divergence: Any) -> None:
    """Compare with E phi(r) over generated images, on a grid of x = y + s n: gradients by std and mean are parallel."""
    s = 0.4
    x = torch.linspace(-6, 6, 20_001, dtype=torch.float64)
    a, m = (torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (STD, MEAN))

    def density(variance: torch.Tensor | float, mean: torch.Tensor | float) -> torch.Tensor:
        return (-((x - mean) ** 2) / (2 * variance)).exp() / (2 * math.pi * torch.as_tensor(variance)).sqrt()

    made, data = density(a**2 + s**2, m), density(SD**2 + s**2, 0.0)
    wanted = torch.stack(torch.autograd.grad((made * PHI[divergence](data / made)).sum(), (a, m)))
    made = made.detach()
    level = torch.full((len(x),), s)
    fake, teacher = (model(x.reshape(-1, 1, 1, 1), level).flatten().detach() for model in (Gaussian(STD, MEAN), Gaussian(SD)))
    weighted = made * WEIGHTS[divergence](data / made) * (fake - teacher)
    noise = STD * (x - MEAN) / (STD**2 + s**2)  # the mean of z for a given x
    ours = torch.stack([(weighted * noise).sum(), weighted.sum()])
    torch.testing.assert_close(ours / ours.norm(), wanted / wanted.norm(), rtol=1e-3, atol=1e-3)
    assert WEIGHTS.keys() == PHI.keys()


def judged(config: DMD2Config, student: Denoiser, teacher: Denoiser) -> tuple[DMD2, Learner]:
    torch.manual_seed(0)
    objective = config.build(context_of(student, teacher))
    assert objective.critic is not None
    for parameter in objective.critic.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return objective, Learner(objective.critic, ADAM)


def test_the_ratio_is_the_discriminators() -> None:
    student, teacher = networks()
    images, gradients, config = torch.randn(6, 1, 8, 8).requires_grad_(), {}, DMD2Config(adversarial_weight=0)
    for divergence in ("reverse_kl", "kl"):
        objective, critic = judged(replace(config, divergence=divergence), student, teacher)
        batch = rows(config)
        gradients[divergence], figures = objective.gradient(critic, images, batch, seeded())
    x, sigma = noisy(images.detach(), "karras", (0.0, 0.8), seeded())
    ratio = critic.model(None, (x, sigma, batch.labels))[1].detach().exp()
    assert float(ratio.std()) > 1e-4
    assert ((ratio > 0.1) & (ratio < 10)).all()
    wanted = gradients["reverse_kl"] * (ratio / ratio.mean()).reshape(-1, 1, 1, 1)
    torch.testing.assert_close(gradients["kl"], wanted)
    torch.testing.assert_close(figures["ratio"], ratio.mean())
    torch.testing.assert_close(balanced_weights(torch.tensor([1.0, 3.0]), "kl"), torch.tensor([0.5, 1.5]))
    with pytest.raises(SettingError, match="ratios is "):
        DMD2Config(ratios=(2.0, 1.0))


def grads(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def stepped(config: DMD2Config, **changes: Any) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], DMD2]:
    """The gradients of student and critic after a step, and the objective."""
    student, teacher = networks()
    objective, critic = judged(config, student, teacher)
    objective.backward(Learner(student, ADAM), critic, rows(config, **changes), seeded())
    return grads(student), grads(critic.model), objective


def same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_neither_network_gets_the_gradients_of_the_other() -> None:
    config = DMD2Config(fake_steps=2, judged_levels="lognormal", adversarial_weight=1, critic_weight=1)
    student, critic, objective = stepped(config)  # the critic's turn
    assert objective.critic is not None
    assert student == {}
    assert critic.keys() == dict(objective.critic.named_parameters()).keys()
    assert all(float(gradient.abs().sum()) > 0 for gradient in critic.values())
    student, critic, objective = stepped(config, step=1)
    assert student.keys() == dict(networks()[0].named_parameters()).keys()
    quiet, critic_alone, _ = stepped(replace(config, adversarial_weight=0), step=1)
    assert same(critic, critic_alone)
    assert not same(student, quiet)
    loud, changed, _ = stepped(replace(config, critic_weight=5), step=1)
    assert same(student, loud)
    assert not same(critic, changed)
    assert grads(objective.teacher) == {}


def test_the_discriminator_learns_from_real_and_generated_images() -> None:
    """Steps of the critic alone tell images of two kinds apart: logits of real ones rise above those of the student's."""
    student, teacher = networks()
    config = DMD2Config(fake_steps=1000, judged_levels="lognormal", critic_weight=1)
    objective = config.build(context_of(student, teacher))
    assert objective.critic is not None
    critic, figures = Learner(objective.critic, OptimizerConfig(lr=5e-3, clip=0.0)), []
    batch = replace(rows(config, size=8), real=torch.ones(8, 1, 8, 8) - 0.1 * torch.rand(8, 1, 8, 8))
    for step in range(30):
        figures.append(objective.backward(Learner(student, ADAM), critic, replace(batch, step=step), seeded(step)))
        critic.update(step, 30)
    assert float(figures[0]["critic"]) == pytest.approx(2 * math.log(2), rel=0.2)
    assert sum(float(row["critic"]) for row in figures[-5:]) / 5 < 0.7
    sigma = torch.full((8,), 0.1)
    made = objective.draw(Learner(student, ADAM), batch, seeded(), gradients=False)
    real, fake = (critic.model(None, (x, sigma, batch.labels))[1] for x in (batch.real, made))
    assert float(real.detach().min()) > 0 > float(fake.detach().max())


CONFIGS: dict[str, DMDConfig | DMD2Config] = {
    "dmd": DMDConfig(),
    "two levels": DMDConfig(start_levels=(20.0, 1.0)),
    "regression": DMDConfig(regression_weight=0.25),
    "dmd2": DMD2Config(fake_steps=2, flip=True),
    "f-distill": DMD2Config(fake_steps=1, divergence="jeffreys"),
}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("labels", [True, False])
@pytest.mark.parametrize("name", CONFIGS)
def test_steps_through_networks(name: str, labels: bool, precision: Any) -> None:
    config = CONFIGS[name]
    student, teacher = networks(labels)
    before = copy.deepcopy([student.state_dict(), teacher.state_dict()])
    objective = config.build(context_of(student, teacher))
    assert objective.critic is not None
    learner, critic = Learner(student, ADAM, precision=precision), Learner(objective.critic, ADAM, precision=precision)
    fake = copy.deepcopy(objective.critic.state_dict())
    for step in range(4):
        figures = objective.backward(learner, critic, rows(config, labels=labels, step=step), seeded(step))
        assert all(value.ndim == 0 and bool(value.isfinite()) and not value.requires_grad for value in figures.values())
        if objective.turns(step).student:
            assert {"gap", "a"} < figures.keys()
            norm = learner.update(step, 4)["grad_norm"]
            assert norm > 0 or step == 0  # f starts as T, so that the first gap is 0
        assert critic.update(step, 4)["grad_norm"] > 0
    assert not same(objective.critic.state_dict(), fake)
    assert not same(student.state_dict(), before[0])
    assert same(teacher.state_dict(), before[1])


def test_parts_of_a_batch_are_weighted() -> None:
    whole, critic, _ = stepped(DMD2Config(fake_steps=1))
    part, part_critic, _ = stepped(DMD2Config(fake_steps=1), weight=0.25)
    for ours, theirs in ((whole, part), (critic, part_critic)):
        for name, gradient in ours.items():
            torch.testing.assert_close(theirs[name], gradient / 4)


@pytest.fixture
def one_rank(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'group'}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("name", CONFIGS)
def test_wrapped_for_parallel_training_it_is_the_same(name: str, one_rank: None) -> None:
    """The wrapper refuses parameters without gradients, and a second backward pass."""
    config = CONFIGS[name]
    weights = []
    for parallel in (nn.Identity(), DistributedDataParallel):
        student, teacher = networks()
        torch.manual_seed(0)
        objective = config.build(context_of(student, teacher))
        assert objective.critic is not None
        learner, critic = (Learner(model, ADAM, parallel=parallel) for model in (student, objective.critic))
        for step in range(3):
            objective.backward(learner, critic, rows(config, step=step), seeded(step))
            if objective.turns(step).student:
                learner.update(step, 3)
            critic.update(step, 3)
        weights.append({**student.state_dict(), **{f"critic {k}": v for k, v in objective.critic.state_dict().items()}})
    for key, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][key], tensor)


def test_costs() -> None:
    """In forward passes per image: y 1, f and T 2, backward 2, and 3 for the fake score."""

    def cost(config: DMDConfig | DMD2Config) -> float:
        return counting.step_evaluations(small.NETWORK, PROBE, config)

    assert cost(DMDConfig()) == pytest.approx(8, rel=0.01)
    assert cost(DMDConfig(fake_steps=5, start_levels=(80.0, 2.5))) == pytest.approx(4 + 4 / 5 + 1 / 2, rel=0.01)
    assert 9 < cost(DMD2Config(fake_steps=1, divergence="kl")) < 12


def test_names() -> None:
    assert DMDConfig().about() == "distribution matching (DMD)"
    assert DMDConfig(scaled=False).about() == "distribution matching (Diff-Instruct)"
    assert (
        DMDConfig(regression_weight=1, distance="probe").about().endswith("regression on pairs by perceptual distance (probe)")
    )
    assert DMDConfig(regression_weight=1, distance="probe").needs().features == ("probe",)
    assert DMDConfig(distance="probe").needs().features == ()
    assert DMD2Config(divergence="kl").about() == "distribution matching (f-distill, kl), adversarial term on noisy images"
    assert isinstance(DMDConfig(fake_start="student").build(context_of(*networks())), DMD)
