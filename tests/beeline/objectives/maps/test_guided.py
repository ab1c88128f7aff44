"""Guided distillation: on Gaussian data the student's minimiser is the extrapolated denoiser, for every weight."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import pytest
import small
import torch
from torch import nn

from beeline import counting
from beeline.checkpoint import build, dump, restore
from beeline.config import NetworkConfig, OptimizerConfig, ProbeNetworkConfig, to_dict
from beeline.denoiser import Denoiser
from beeline.errors import BeelineError, SettingError
from beeline.objectives import Batch, Context, Needs, Objective
from beeline.objectives.learner import Learner
from beeline.objectives.maps.guided import GuidedConfig
from beeline.objectives.maps.progressive import ProgressiveConfig
from beeline.sampling import Sampling, generate
from beeline.sampling.few_step import few_step
from beeline.sampling.inference import prepare
from beeline.sampling.solvers import solve
from beeline.schedule import edm_sigmas

STRONG, WEAK, LEVELS = 0.5, 0.8, 4
"""Standard deviations of the images, and of those that the weak model knows; levels of progressive distillation."""
CONFIG = GuidedConfig(weak="students/weak", guidance_max=2.0)
OPTIMIZER = OptimizerConfig(lr=1e-3)
PROBE = ProbeNetworkConfig(widths=(8, 12), strides=(1, 2))


class Gaussian(nn.Module):
    """The denoiser of N(0, std^2)."""

    def __init__(self, std: float) -> None:
        super().__init__()
        self.std = std

    def forward(self, x: torch.Tensor, sigma: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        return x * (self.std**2 / (self.std**2 + sigma**2)).reshape(-1, 1, 1, 1)


class Guided(nn.Module):
    """The guided denoiser, plus deviations from it that learn: a + b w, times x / sqrt(1 + sigma^2)."""

    def __init__(self, a: float = 0.0, b: float = 0.0) -> None:
        super().__init__()
        self.deviation = nn.Parameter(torch.tensor([a, b]))

    def forward(
        self,
        x: torch.Tensor,
        sigma: torch.Tensor,
        labels: torch.Tensor | None = None,
        augment_labels: torch.Tensor | None = None,
        to: torch.Tensor | None = None,
        guidance: torch.Tensor | None = None,
    ) -> torch.Tensor:
        assert guidance is not None
        w = guidance.reshape(-1, 1, 1, 1)
        strong, weak = Gaussian(STRONG)(x, sigma), Gaussian(WEAK)(x, sigma)
        deviation = (self.deviation[0] + self.deviation[1] * w) * x / (1 + sigma**2).sqrt().reshape(-1, 1, 1, 1)
        return strong + w * (strong - weak) + deviation


def seeded(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def context(average: nn.Module, classes: int, models: Mapping[str, Any]) -> Context:
    return Context(image_shape=(1, 8, 8), num_classes=classes, models=models, features={}, average=average)  # pyright: ignore[reportArgumentType]


def gradient(objective: Objective, student: Guided, weight: float = 1.0) -> torch.Tensor:
    real = STRONG * torch.randn(64, 1, 2, 2, generator=seeded(1))
    student.zero_grad()
    objective.backward(Learner(student, OPTIMIZER), None, Batch(size=64, step=0, total=9, real=real, weight=weight), seeded())
    assert student.deviation.grad is not None
    return student.deviation.grad.clone()


def test_the_guided_denoiser_is_the_minimiser() -> None:
    models = {"teacher": Gaussian(STRONG), "students/weak": Gaussian(WEAK)}
    objective = CONFIG.build(context(Guided(), 0, models))
    at, off = gradient(objective, Guided()), gradient(objective, Guided(0.1, 0.1))
    assert float(at.abs().max()) < 1e-6
    assert float(off.min()) > 0.1
    torch.testing.assert_close(gradient(objective, Guided(0.1, 0.1), weight=0.5), 0.5 * off)
    assert (
        float(gradient(CONFIG.build(context(Guided(), 0, models | {"students/weak": Gaussian(1.0)})), Guided()).abs().max())
        > 0.1
    )


def test_at_weight_0_it_is_the_teacher() -> None:
    x, sigma = torch.randn(5, 1, 2, 2), torch.rand(5) + 0.1
    torch.testing.assert_close(Guided()(x, sigma, guidance=torch.zeros(5)), Gaussian(STRONG)(x, sigma))
    assert float(CONFIG.draw_weights(4000, seeded()).mean()) == pytest.approx(1.0, abs=0.05)
    weights = CONFIG.draw_weights(4000, seeded())
    assert (float(weights.min()) < 0.01, float(weights.max()) > 1.99, float(weights.max()) < 2) == (True, True, True)


def test_rounds_keep_the_weight() -> None:
    """Teacher and student get the same weight, another in each row. Settings without guidance stay as they were."""
    config = ProgressiveConfig(steps=2, num_steps=LEVELS, guidance_max=2.0, guidance=1.5)
    seen: list[torch.Tensor] = []

    class Student(Guided):
        def forward(self, *inputs: Any, **options: Any) -> torch.Tensor:
            seen.append(inputs[5])
            return super().forward(*inputs, **options)

    objective = config.build(context(Student(), 0, {}))
    gradient(objective, Student())
    assert len(seen) == 3  # the teacher twice, the student once
    assert seen[0].unique().numel() == 64
    assert all(torch.equal(seen[0], weights) for weights in seen)
    plain = dataclasses.replace(config, guidance_max=0.0, guidance=0.0)
    assert (config.needs(), plain.needs()) == (Needs(images=True, guidance=True), Needs(images=True))
    assert config.sampling() == dataclasses.replace(plain.sampling(), guidance=1.5)
    assert "guided" in config.about()
    assert "guided" not in plain.about()
    assert config.representative() != plain.representative()
    assert config.representative() == dataclasses.replace(config, guidance_max=3.0, guidance=0.5).representative()


def test_sampling_takes_the_students_own_weight() -> None:
    """Or another; both by steps and by solvers, whose levels are the same here."""
    z, how = torch.randn(3, 1, 2, 2, generator=seeded()), dataclasses.replace(CONFIG.sampling(), num_steps=LEVELS)

    def weighted(w: float) -> torch.Tensor:
        def denoiser(x: torch.Tensor, sigma: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
            return Guided()(x, sigma, guidance=torch.tensor(w)).detach()

        return solve(denoiser, z, None, solver="euler", num_steps=LEVELS)

    for w in (0.5, 1.0):
        by = few_step(Guided(), z, None, steps=range(LEVELS), how=dataclasses.replace(how, guidance=w)).detach()
        torch.testing.assert_close(by, weighted(w))
    assert float((weighted(0.5) - weighted(1.0)).abs().max()) > 1e-3
    assert edm_sigmas(LEVELS)[0] == 80


@pytest.mark.parametrize("kind", ["ddpmpp", "ncsnpp", "adm"])
def test_the_input_is_0_at_the_start_and_then_not(kind: Literal["ddpmpp", "ncsnpp", "adm"]) -> None:
    network = dataclasses.replace(small.NETWORK, kind=kind, model_channels=64 if kind == "adm" else 16)
    plain, model = build(network), build(dataclasses.replace(network, guidance=True, second_level=True))
    for parameter in plain.parameters():
        nn.init.normal_(parameter, 0, 0.05)
    model.load_state_dict(model.state_dict() | plain.state_dict())
    x, sigma, labels = torch.randn(4, 1, 8, 8), torch.full((4,), 3.0), torch.arange(4)
    w = torch.tensor([0.0, 0.5, 1.0, 4.0])
    wanted = plain(x, sigma, labels)
    for options in ({}, {"guidance": w}, {"guidance": torch.tensor(2.0), "to": torch.zeros(4)}):
        torch.testing.assert_close(model(x, sigma, labels, **options), wanted)
    model(x, sigma, labels, guidance=w).square().mean().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    nn.init.normal_(dict(model.named_parameters())["model.map_guidance.layer1.weight"], 0, 5.0)
    found = [model(x, sigma, labels, guidance=weight) for weight in (None, torch.zeros(4), w, w)]
    assert torch.equal(found[0], found[1])
    torch.testing.assert_close(found[2][0], found[1][0])
    assert float((found[2] - found[1])[1:].detach().abs().amax(dim=(1, 2, 3)).min()) > 1e-4
    with pytest.raises(ValueError, match="no input for it; build it with guidance"):
        plain(x, sigma, labels, guidance=w)


def student() -> Denoiser:
    model = build(dataclasses.replace(small.NETWORK, guidance=True))
    for parameter in model.parameters():
        nn.init.normal_(parameter, 0, 0.1)
    model.few_step = dataclasses.replace(CONFIG.sampling(), num_steps=LEVELS)
    return model.eval().requires_grad_(False)


def test_a_folder_keeps_input_and_weight() -> None:
    model = student()
    again = restore(dump(model, {}), "here")
    assert isinstance(again, Denoiser)
    assert again.takes_guidance
    own = generate(model, 3, steps=(0, 2))
    assert torch.equal(generate(again, 3, steps=(0, 2)), own)
    assert torch.equal(generate(again, 3, steps=(0, 2), guidance=1.0), own)
    for solver in ("euler", "heun"):
        default = generate(model, 3, solver=solver, num_steps=3)
        assert torch.equal(generate(model, 3, solver=solver, num_steps=3, guidance=1.0), default)
        assert not torch.allclose(generate(model, 3, solver=solver, num_steps=3, guidance=0), default, atol=1e-4)
    assert not torch.allclose(generate(again, 3, steps=(0, 2), guidance=0), own, atol=1e-4)
    fast = prepare(model, batch_size=4)
    torch.testing.assert_close(generate(fast, 3, steps=(0, 2), guidance=2.0), generate(model, 3, steps=(0, 2), guidance=2.0))
    plain = build(small.NETWORK).eval()
    assert generate(plain, 1, num_steps=2, guidance=0).shape == (1, 1, 8, 8)
    with pytest.raises(BeelineError, match=r"guidance 1\.5 was given, but this model takes no weight"):
        generate(plain, 1, num_steps=2, guidance=1.5)


def test_identities_without_guidance_stay() -> None:
    """Plans of earlier versions do not name the new settings."""
    for config in (small.NETWORK, ProgressiveConfig(steps=1), small.FEW_STEP):
        assert not [name for name in to_dict(config, resources=False) if "guidance" in name]
    assert to_dict(dataclasses.replace(small.NETWORK, guidance=True), resources=False)["guidance"] is True
    assert NetworkConfig(kind="adm", img_resolution=8, img_channels=1).guidance is False
    with pytest.raises(SettingError, match=r"guidance is 3\.0; expected at most guidance_max, 2"):
        dataclasses.replace(CONFIG, guidance=3.0)


@pytest.mark.parametrize("config", [CONFIG, ProgressiveConfig(steps=1, num_steps=4, guidance_max=2.0)])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("classes", [4, 0])
def test_a_network_learns(config: Any, precision: Literal["fp32", "bf16"], classes: int) -> None:
    torch.manual_seed(0)
    network = dataclasses.replace(small.NETWORK, label_dim=classes)
    teacher, weak = build(network).eval(), build(network).eval()
    for parameter in (*teacher.parameters(), *weak.parameters()):
        nn.init.normal_(parameter, 0, 0.05)
    model = build(dataclasses.replace(network, guidance=True)).train()
    model.load_state_dict(model.state_dict() | teacher.state_dict())
    objective = config.build(context(model, classes, {"teacher": teacher, "students/weak": weak}))
    labels = torch.eye(4)[torch.arange(8) % 4] if classes else None
    learner, losses = Learner(model, OptimizerConfig(lr=2e-3), precision=precision), []
    before = [parameter.detach().clone() for parameter in model.parameters()]
    for step in range(30):
        batch = Batch(size=8, step=step, total=30, real=torch.randn(8, 1, 8, 8, generator=seeded()), real_labels=labels)
        losses += objective.backward(learner, None, batch, seeded()).values()
        assert not learner.update(step, 30)["skipped"]
    assert losses[-1] < 0.5 * losses[0]
    assert not any(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_cost() -> None:
    """A student's step with gradients is about three evaluations; each of the two models is one."""
    flops = counting.phase_flops(small.NETWORK, PROBE, CONFIG)
    assert flops == pytest.approx(5 * counting.evaluation(small.NETWORK), rel=0.05)
    assert CONFIG.needs() == Needs(images=True, models=("teacher", "students/weak"), guidance=True)
    assert counting.step_evaluations(small.NETWORK, PROBE, CONFIG) == pytest.approx(5, rel=0.05)
    assert Sampling(steps=(0, 2)).nfe == 2
