"""Constant acceleration flow: exact on curves, and N steps cost N + 1 evaluations."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal

import pytest
import small
import torch
from torch import nn

from beeline import counting
from beeline.checkpoint import build, dump, load, write_model
from beeline.config import EvaluateConfig, OptimizerConfig, ProbeNetworkConfig, to_dict
from beeline.denoiser import Denoiser
from beeline.errors import BeelineError
from beeline.objectives import Batch, Context, Needs
from beeline.objectives.ema import ema_update
from beeline.objectives.learner import Learner
from beeline.objectives.lines import point
from beeline.objectives.maps import curves
from beeline.objectives.maps.caf import AccelerationConfig
from beeline.sampling import Sampling, generate
from beeline.sampling.few_step import FewStep, few_step
from beeline.sampling.inference import prepare
from beeline.schedule import edm_sigmas
from evaluation.samplings import samplings_of
from trainers.student import start_from

CONFIG = AccelerationConfig()
PROBE = ProbeNetworkConfig(widths=(8, 12), strides=(1, 2))
GUESSED, KNOWN = 0.3, 0.5
"""Images are KNOWN times their noise, as of a Gaussian's ODE; the guess network says GUESSED times."""


class Guess(Denoiser):
    """V: its guess of the image is GUESSED times the noise."""

    def __init__(self) -> None:
        super().__init__(nn.Identity(), img_resolution=2, img_channels=1, label_dim=0)
        self.calls = 0

    def forward(
        self, x: torch.Tensor, sigma: torch.Tensor, labels: torch.Tensor | None = None, *rest: Any, **more: Any
    ) -> torch.Tensor:
        self.calls += 1
        return GUESSED * x / sigma.reshape(-1, 1, 1, 1)


class Exact(Denoiser):
    """A: knows the image from the point of the curve and the guess, plus a deviation that learns."""

    def __init__(self, deviation: float = 0.0) -> None:
        super().__init__(nn.Identity(), img_resolution=2, img_channels=1, label_dim=0)
        self.guess, self.calls = Guess(), 0
        self.deviation = nn.Parameter(torch.tensor(deviation))

    def forward(
        self,
        x: torch.Tensor,
        sigma: torch.Tensor,
        labels: torch.Tensor | None = None,
        augment_labels: torch.Tensor | None = None,
        to: torch.Tensor | None = None,
        guidance: torch.Tensor | None = None,
        guess: torch.Tensor | None = None,
    ) -> torch.Tensor:
        assert guess is not None
        self.calls += 1
        ones = torch.ones(len(x), 1, 1, 1)
        factor = curves.point(KNOWN * ones, GUESSED * ones, ones, sigma)  # the point is this times the noise
        torch.testing.assert_close(guess, GUESSED * x / factor, rtol=1e-4, atol=1e-5)
        return (KNOWN + self.deviation) * x / factor


def seeded(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_curves_are_the_papers() -> None:
    """In the paper's coordinates (1 - T^2) z + T^2 x1 + v0 (T - T^2), with v0 = 1.5 (y - z), at any level."""
    x1, y, z = (torch.randn(50, 1, 2, 2, generator=seeded(k), dtype=torch.float64) for k in range(3))
    t = torch.linspace(0, 1, 50, dtype=torch.float64)
    sigma, column = curves.level(t), t.reshape(-1, 1, 1, 1)
    torch.testing.assert_close(curves.time(sigma), t, atol=1e-9, rtol=1e-9)
    paper = (1 - column**2) * z + column**2 * x1 + 1.5 * (y - z) * (column - column**2)
    found = curves.point(x1, y, z, sigma) / curves.scale(sigma).reshape(-1, 1, 1, 1)
    torch.testing.assert_close(found, paper)
    assert (float(sigma[0]), float(sigma[-1])) == (80.0, 0.0)
    torch.testing.assert_close(curves.point(x1, y, z, sigma)[0], 80 * z[0])
    assert float((found - point(x1, z, sigma, "lerp") / curves.scale(sigma).reshape(-1, 1, 1, 1)).abs().max()) > 0.1


def test_a_step_is_the_papers() -> None:
    """x + v0 dT + (T + dT/2) a dT with the acceleration of the prediction, also where it is wrong."""
    image, y, z, x = (torch.randn(4, 1, 2, 2, generator=seeded(k), dtype=torch.float64) for k in range(4))
    sigma, following = 5.0, 0.7
    levels = torch.tensor([sigma, following], dtype=torch.float64)
    (t, s), (c, d), v0 = curves.time(levels), curves.scale(levels), 1.5 * (y - z)
    acceleration = 2 * ((image - x / c + v0 * (t - t**2)) / (1 - t**2) - v0)
    paper = x / c + v0 * (s - t) + (t + (s - t) / 2) * acceleration * (s - t)
    torch.testing.assert_close(curves.move(x, image, y, z, sigma, following), d * paper)


@pytest.mark.parametrize("steps", [(0,), (0, 8), (0, 0.821), (0, 3, 9, 15)])
def test_exact_velocity_and_acceleration_give_the_images(steps: tuple[int | float, ...]) -> None:
    """From each noise its own image; N steps cost N + 1 evaluations, and the guess is made once."""
    model, z = Exact(), torch.randn(5, 1, 2, 2, generator=seeded())
    images = few_step(model, z, None, steps=steps, how=CONFIG.sampling()).detach()
    torch.testing.assert_close(images, KNOWN * z, rtol=1e-4, atol=1e-5)
    assert isinstance(model.guess, Guess)
    assert (model.guess.calls, model.calls) == (1, len(steps))
    (sampling,) = samplings_of(CONFIG.sampling(), EvaluateConfig(steps=("0,8",)), levels=None)
    assert (sampling.nfe, sampling.label, sampling.evaluations, sampling.plain) == (3, "0,8 guess", "3 evaluations", True)
    for other in (sampling, dataclasses.replace(sampling, rule="gamma 0.5")):
        again = Sampling.parse(other.label)
        assert (again, again.guess, again.rule, again.nfe) == (other, True, other.rule, 3)
    assert Sampling(steps=(0, 8)).nfe == 2


def gradient(deviation: float, config: AccelerationConfig = CONFIG, weight: float = 1.0) -> float:
    z = torch.randn(64, 1, 2, 2, generator=seeded(1))
    model = Exact(deviation)
    batch = Batch(size=64, step=0, total=9, noise=z, x1=KNOWN * z, weight=weight)
    context = Context(image_shape=(1, 2, 2), num_classes=0, models={}, features={}, average=model)
    config.build(context).backward(Learner(model, OptimizerConfig()), None, batch, seeded())
    assert model.deviation.grad is not None
    return float(model.deviation.grad)


def test_the_exact_acceleration_is_the_minimiser() -> None:
    assert abs(gradient(0.0)) < 1e-3
    assert gradient(0.1) > 0.1
    assert gradient(-0.1) < -0.1
    assert gradient(0.1, weight=0.5) == pytest.approx(0.5 * gradient(0.1))
    start = dataclasses.replace(CONFIG, steps=(0,))  # T = 0: the weight is 1
    z = torch.randn(64, 1, 2, 2, generator=seeded(1))
    assert gradient(0.1, start) == pytest.approx(0.2 * float(z.square().mean()), rel=1e-4)
    assert abs(gradient(0.0, dataclasses.replace(CONFIG, distance="huber"))) < 1e-3


def teacher(**changes: Any) -> Denoiser:
    model = build(dataclasses.replace(small.NETWORK, **changes))
    for parameter in model.parameters():
        nn.init.normal_(parameter, 0, 0.1)
    return model.eval()


@pytest.mark.parametrize("kind", ["ddpmpp", "ncsnpp", "adm"])
def test_a_student_starts_as_the_model_and_guesses_with_it(kind: Literal["ddpmpp", "ncsnpp", "adm"], tmp_path: Path) -> None:
    plain = teacher(kind=kind, model_channels=64 if kind == "adm" else 16, dropout=0.1)
    student = start_from(plain, needs=Needs(guess=True), dropout=0.1)
    x, sigma, labels = 3 * torch.randn(4, 1, 8, 8), torch.full((4,), 3.0), torch.arange(4)
    wanted = plain(x, sigma, labels)
    for guess in (None, torch.randn(4, 1, 8, 8)):
        torch.testing.assert_close(student.eval()(x, sigma, labels, guess=guess), wanted)
    assert student.guess is not None
    torch.testing.assert_close(student.guess.train()(x, sigma, labels), wanted)  # no dropout
    student.train()(x, sigma, labels).square().mean().backward()
    guesses = [name for name, parameter in student.named_parameters() if parameter.grad is None]
    assert guesses == [f"guess.{name}" for name, _ in plain.named_parameters()]
    with torch.no_grad():
        for name, parameter in student.model.named_parameters():
            parameter.add_(0.05 * torch.randn_like(parameter) * (10 if "guess" in name else 1))
    student.few_step = dataclasses.replace(CONFIG.sampling(), num_steps=4)
    write_model(dump(student.eval(), {}), tmp_path)
    again, own = load(tmp_path), generate(student, 3, steps=(0, 2))
    torch.testing.assert_close(generate(again, 3, steps=(0, 2)), own)
    fast = prepare(again, batch_size=4)
    torch.testing.assert_close(generate(fast, 3, steps=(0, 2)), own, atol=1e-4, rtol=1e-4)
    assert prepare(again, precision="bf16")(x, sigma, labels).dtype == torch.float32
    assert not torch.allclose(again(x, sigma, labels, guess=torch.zeros_like(x)), again(x, sigma, labels), atol=1e-4)
    later = start_from(again, needs=Needs(guess=True))
    torch.testing.assert_close(later.eval()(x, sigma, labels), again(x, sigma, labels))
    with pytest.raises(ValueError, match="no input for it; build it with guess"):
        plain(x, sigma, labels, guess=x)


def test_rules_and_identities_without_a_guess_stay() -> None:
    plain = teacher()
    with pytest.raises(BeelineError, match="needs a student that makes a first guess"):
        few_step(plain, torch.randn(1, 1, 8, 8), torch.zeros(1), steps=(0, 1), how=FewStep(num_steps=4, rule="acceleration"))
    for config in (small.NETWORK, small.FEW_STEP):
        assert "guess" not in to_dict(config, resources=False)
    with pytest.raises(BeelineError, match="follows no ODE"):
        CONFIG.sampling().check_solver()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("classes", [4, 0])
def test_a_network_learns(precision: Literal["fp32", "bf16"], classes: int) -> None:
    """The guess network stays as it is, also in averages."""
    torch.manual_seed(0)
    student = start_from(teacher(label_dim=classes), needs=Needs(guess=True))
    average = start_from(student, needs=Needs(guess=True)).eval()
    before = {name: value.clone() for name, value in student.state_dict().items()}
    labels = torch.eye(4)[torch.arange(8) % 4] if classes else None
    noise, x1 = torch.randn(8, 1, 8, 8), torch.full((8, 1, 8, 8), 0.5)
    context = Context(image_shape=(1, 8, 8), num_classes=classes, models={}, features={}, average=average)
    objective = dataclasses.replace(CONFIG, steps=(0, 8)).build(context)
    learner, losses = Learner(student, OptimizerConfig(lr=2e-3), precision=precision), []
    for step in range(30):
        batch = Batch(size=8, step=step, total=30, noise=noise, x1=x1, labels=labels)
        losses += objective.backward(learner, None, batch, seeded()).values()
        assert not learner.update(step, 30)["skipped"]
        ema_update(average, student, 2.0, step + 1, 0.0)
    assert losses[-1] < 0.7 * losses[0]
    for name, value in (*student.state_dict().items(), *average.state_dict().items()):
        assert torch.equal(value, before[name]) == name.startswith("guess."), name


def test_cost() -> None:
    """Three evaluations of a step with gradients, and one of the guess. Adam keeps no moments of the frozen network."""
    assert counting.phase_flops(small.NETWORK, PROBE, CONFIG) == pytest.approx(4 * counting.evaluation(small.NETWORK), rel=0.05)
    assert CONFIG.needs() == Needs(pairs=True, guess=True)
    assert CONFIG.about() == "constant acceleration flow, pixel distance (L2)"
    both = counting.network_bytes(dataclasses.replace(small.NETWORK, guess=True))
    assert both == pytest.approx(2 * counting.network_bytes(small.NETWORK), rel=0.02)
    assert edm_sigmas(18)[0] == 80
