"""sCM: its tangent is the published one, vanishes at the true consistency function, and is the limit of a discrete step."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any, Literal

import pytest
import small
import torch
from closed_form import ClosedForm
from torch import nn

from beeline import counting
from beeline.checkpoint import build
from beeline.config import OptimizerConfig, ProbeNetworkConfig
from beeline.denoiser import Denoiser
from beeline.errors import SettingError
from beeline.objectives import Batch, Context, Needs
from beeline.objectives.derivative import rate
from beeline.objectives.learner import Learner
from beeline.objectives.maps.scm import SCMConfig, tangent

PLAIN = SCMConfig(normalisation=None, weight="uniform", learned_weight=False, derivative="jvp")
ADAM = OptimizerConfig(lr=1e-3)
SD = 0.5


def shaped(sigma: torch.Tensor) -> torch.Tensor:
    return sigma.reshape(-1, 1, 1, 1)


class Gaussian(ClosedForm):
    """The consistency function of data N(0, SD^2), plus `error` times another function of x and sigma."""

    def __init__(self, error: float = 0.0) -> None:
        super().__init__(side=2)
        self.error = nn.Parameter(torch.tensor(error, dtype=torch.float64))

    def output(self, x: torch.Tensor, t: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        spread = (SD**2 + t**2).sqrt()
        return SD * x / spread + self.error * t * torch.tanh(x / spread) / (1 + t)


class Smooth(ClosedForm):
    """A random smooth denoiser in float64: EDM's preconditioning around a perceptron on all pixels and ln sigma."""

    def __init__(self, seed: int) -> None:
        super().__init__(side=2)
        torch.manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 4)).double()

    def raw(self, x: torch.Tensor, angle: torch.Tensor) -> torch.Tensor:
        """TrigFlow's F, of x at unit variance and the angle (B,)."""
        level = (SD * angle.tan()).log().reshape(-1, 1) / 4
        return self.model(torch.cat([x.flatten(1), level], 1)).reshape(x.shape)

    def output(self, x: torch.Tensor, t: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        angle = (t / SD).atan()
        x = x * angle.cos()
        return angle.cos() * x - SD * angle.sin() * self.raw(x / SD, angle.flatten())


class Ideal(ClosedForm):
    """The denoiser of data N(0, SD^2)."""

    def __init__(self) -> None:
        super().__init__(side=2)

    def output(self, x: torch.Tensor, t: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        return SD**2 * x / (SD**2 + t**2)


def images(count: int) -> Batch:
    real = SD * torch.randn(count, 1, 2, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return Batch(size=count, step=0, total=1, real=real)


def gradient(config: SCMConfig, student: nn.Module, rows: Batch, teacher: Denoiser) -> tuple[torch.Tensor, dict[str, float]]:
    """The gradient of a step, and its figures."""
    student.zero_grad()
    context = Context(image_shape=(1, 2, 2), num_classes=0, models={"teacher": teacher}, features={}, average=teacher)
    figures = config.build(context).backward(Learner(student, ADAM), None, rows, torch.Generator().manual_seed(2))
    parts = [parameter.grad for parameter in student.parameters() if parameter.grad is not None]
    return torch.cat([part.flatten() for part in parts]), {name: float(value) for name, value in figures.items()}


def drawn(config: SCMConfig, rows: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """The noisy images and levels of a step with that generator and ln t ~ N(p_mean, p_std^2)."""
    assert rows.real is not None
    generator = torch.Generator().manual_seed(2)
    sigma = (config.p_mean + config.p_std * torch.randn(rows.size, generator=generator)).exp().clamp(0.002, 80)
    return rows.real + shaped(sigma) * torch.randn(rows.real.shape, generator=generator), sigma


@pytest.mark.parametrize("r", [0.0, 0.3, 1.0])
def test_the_tangent_is_the_published_one(r: float) -> None:
    """g of Lu & Song's algorithm 1, in TrigFlow's coordinates x cos(theta) and theta = arctan(t / sigma_data)."""
    model, rows = Smooth(0), images(6)
    x, sigma = drawn(replace(PLAIN, p_mean=0.0, p_std=2.0), rows)
    reference = Smooth(1)(x, sigma).detach()
    denoised, derivative = rate(model, x, sigma, None, x - reference, derivative="jvp")
    ours = tangent(denoised, reference, derivative, sigma, r)

    angle = (sigma.double() / SD).atan()
    sine, cosine = shaped(angle).sin(), shaped(angle).cos()
    x = x * cosine
    slope = (cosine * x - reference) / sine  # dx / dtheta
    along = (slope, torch.ones_like(angle))
    f, df = torch.func.jvp(lambda x, angle: SD * model.raw(x / SD, angle), (x, angle), along)[:2]
    published = -(cosine**2) * (f - slope) - r * cosine * sine * (x + df)
    torch.testing.assert_close(ours, published, rtol=1e-4, atol=1e-5)  # levels are float32


def test_distillation_ends_at_the_consistency_function() -> None:
    rows = images(64)
    slope, figures = gradient(PLAIN, Gaussian(), rows, Ideal())
    assert figures["tangent"] < 1e-12
    assert float(slope.abs().max()) < 1e-6
    wrong, figures = gradient(PLAIN, Gaussian(0.1), rows, Ideal())
    assert figures["tangent"] > 1e-4
    assert float(wrong) > 1e-3  # descent makes the error smaller


def test_training_ends_there_in_expectation() -> None:
    """Without a teacher, single tangents do not vanish, but their mean does."""
    config = replace(PLAIN, reference="data", p_mean=0.0, p_std=0.5)
    slopes = [float(gradient(config, Gaussian(error), images(100_000), Ideal())[0]) for error in (-0.1, 0.0, 0.1)]
    assert slopes[0] < 0 < slopes[2]
    assert abs(slopes[1]) < 0.1 * min(-slopes[0], slopes[2])
    assert gradient(config, Gaussian(), images(100), Ideal())[1]["tangent"] > 1e-3


def discrete(student: Denoiser, teacher: Denoiser, config: SCMConfig, rows: Batch, step: float) -> torch.Tensor:
    """The gradient of a consistency step: D at t towards D at t e^-step, with Euler's method and weight 1 / sin^2."""
    x, sigma = drawn(config, rows)
    velocity, shrunk = (x - teacher(x, sigma)).detach(), torch.tensor(-step).exp()
    target = student(x - (1 - shrunk.double()) * velocity, (shrunk.double() * sigma)).detach()
    weight = 1 + SD**2 / shaped(sigma).double() ** 2
    student.zero_grad()
    (weight * (student(x, sigma) - target).square()).mean().backward()
    parts = [parameter.grad for parameter in student.parameters() if parameter.grad is not None]
    return torch.cat([part.flatten() for part in parts]) / step


def test_it_is_the_limit_of_discrete_consistency() -> None:
    student, teacher, rows = Smooth(0), Smooth(1), images(16)
    ours, _ = gradient(PLAIN, student, rows, teacher)
    errors = []
    for step in (1e-2, 1e-3):
        theirs = discrete(student, teacher, PLAIN, rows, step) / SD
        errors.append(float((ours - theirs).norm() / ours.norm()))
    assert errors[1] < 2e-3
    assert errors[1] == pytest.approx(errors[0] / 10, rel=0.2)  # first order
    secant, _ = gradient(replace(PLAIN, secant=0.5), student, rows, teacher)
    torch.testing.assert_close(secant, discrete(student, teacher, PLAIN, rows, 0.5) / SD, rtol=1e-4, atol=1e-6)


def test_the_warm_up_begins_at_the_teacher() -> None:
    """With r = 0, the loss is that of a diffusion model: (D - ref)^2 cos^4 / sin^2."""
    config = replace(PLAIN, tangent_warmup=10**9)
    rows, student, teacher = images(16), Smooth(0), Smooth(1)
    x, sigma = drawn(config, rows)
    cosine2 = SD**2 / (SD**2 + shaped(sigma).double() ** 2)
    expected = ((student(x, sigma) - teacher(x, sigma)) ** 2 * cosine2**2 / (1 - cosine2)).mean()
    assert gradient(config, student, rows, teacher)[1]["tangent"] == pytest.approx(float(expected.detach()), rel=1e-4)
    half = gradient(replace(config, tangent_warmup=4), student, replace(rows, step=1), teacher)[0]
    torch.testing.assert_close(half, gradient(replace(PLAIN, tangent_weight=0.5), student, rows, teacher)[0])


def test_tangents_are_limited_and_weighted() -> None:
    rows, student, teacher = images(8), Smooth(0), Smooth(1)
    x, sigma = drawn(PLAIN, rows)
    reference = teacher(x, sigma).detach()
    denoised, derivative = rate(student, x, sigma, None, x - reference, derivative="jvp")
    h = tangent(denoised, reference, derivative, sigma, 1.0)

    def loss(**changes: Any) -> float:
        return gradient(replace(PLAIN, **changes), student, rows, teacher)[1]["loss"]

    rms = h.square().mean((1, 2, 3), keepdim=True).sqrt()
    assert loss() == pytest.approx(float(h.square().mean()), rel=1e-4)
    assert loss(normalisation=0.1) == pytest.approx(float((h / (rms + 0.1)).square().mean()), rel=1e-4)
    assert loss(normalisation=0.0) == pytest.approx(1.0, rel=1e-4)
    assert loss(clamp=0.05) == pytest.approx(float(h.clamp(-0.05, 0.05).square().mean()), rel=1e-4)
    assert loss(weight="1/t") == pytest.approx(float((h.square() / shaped(sigma)).mean()), rel=1e-4)
    whole, part = (gradient(PLAIN, student, replace(rows, weight=weight), teacher)[0] for weight in (1.0, 0.25))
    torch.testing.assert_close(part, whole / 4)


def test_the_learned_weight_is_the_logarithm_of_the_mean_loss() -> None:
    torch.manual_seed(0)
    config = replace(PLAIN, learned_weight=True, weight="1/t")
    objective = config.build(context_of(Ideal()))
    state = objective.state()
    assert state is not None
    optimizer = torch.optim.Adam(state.parameters(), lr=1e-2)
    for _ in range(400):
        sigma = torch.randn(256).exp()
        error = (sigma**2 / (1 + sigma)) * torch.randn(256).square()  # with the weight 1/t: mean t / (1 + t)
        loss = objective.weighted(error, sigma).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    levels = torch.tensor([0.3, 1.0, 3.0])
    torch.testing.assert_close(state(levels).exp(), levels / (1 + levels), rtol=0.25, atol=0)


def context_of(model: Denoiser) -> Context:
    frozen = copy.deepcopy(model).eval().requires_grad_(False)
    return Context(
        image_shape=model.image_shape, num_classes=model.label_dim, models={"teacher": frozen}, features={}, average=frozen
    )


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("labels", "changes"), [
    (True, {}),
    (False, {"reference": "data", "levels": "schedule", "derivative": "jvp"}),
    (True, {"secant": 0.5}),
])  # fmt: skip
def test_a_student_trains(precision: Literal["fp32", "bf16"], labels: bool, changes: dict[str, Any]) -> None:
    torch.manual_seed(0)
    network = replace(small.NETWORK, label_dim=small.CLASSES * labels, dropout=0.1)
    config = SCMConfig(tangent_warmup=2, **changes)
    student = build(network).train()
    objective = config.build(context_of(student))
    learner, before = Learner(student, ADAM, precision=precision), copy.deepcopy(student)
    for step in range(3):
        rows = Batch(
            size=8, step=step, total=3, real=torch.rand(8, 1, 8, 8) - 0.5,
            real_labels=torch.eye(small.CLASSES)[torch.arange(8) % small.CLASSES] if labels else None,
        )  # fmt: skip
        figures = objective.backward(learner, None, rows, torch.Generator().manual_seed(step))
        assert all(math.isfinite(value) and not value.requires_grad for value in figures.values())
        assert learner.update(step, 3)["grad_norm"] > 0
    assert any(not torch.equal(a, b) for a, b in zip(before.parameters(), student.parameters(), strict=True))
    state = objective.state()
    assert state is not None
    assert all(parameter.requires_grad and parameter.grad is not None for parameter in state.parameters())


def test_needs_sampling_and_cost() -> None:
    config = SCMConfig(num_steps=6)
    assert config.needs() == Needs(images=True, models=("teacher",))
    assert replace(config, reference="data").needs() == Needs(images=True)
    how = config.sampling()
    assert (how.num_steps, how.rule, how.line, how.trained_steps) == (6, "fresh_noise", "ve", None)
    assert config.about() == "continuous-time consistency, sCD"
    assert replace(config, reference="data").about() == "continuous-time consistency, sCT"
    assert replace(config, learned_weight=False).build(context_of(Ideal())).state() is None
    with pytest.raises(SettingError, match="normalisation is -1"):
        replace(config, normalisation=-1.0)
    probe, one = ProbeNetworkConfig(widths=(8,), strides=(1,)), counting.evaluation(small.NETWORK)
    costs = {"student, teacher, two differences": config, "no teacher": replace(config, reference="data")}
    costs |= {"one difference": replace(config, secant=0.5)}
    found = [counting.phase_flops(small.NETWORK, probe, cost) / one for cost in costs.values()]
    assert found == pytest.approx([6, 5, 5], rel=0.05)
