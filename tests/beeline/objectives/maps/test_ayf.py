"""Align Your Flow: the teacher's map solves both equations, special cases are flow matching, and it trains a real network."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch
from flow_map_checks import check_training, context, gradient, rows
from gaussian_map import STD, GaussianMap, data

from beeline.config import OptimizerConfig
from beeline.denoiser import Denoiser
from beeline.errors import SettingError
from beeline.objectives import Needs
from beeline.objectives.discriminator import DiscriminatorConfig
from beeline.objectives.learner import Learner
from beeline.objectives.maps.ayf import AlignYourFlowConfig, end_rate

EMD = AlignYourFlowConfig(r=1.0, normalisation=None, derivative="jvp")
LMD = AlignYourFlowConfig(equation="lmd", normalisation=None)
SIDE: dict[str, Any] = {
    "adversarial_weight": 0.5,
    "discriminator": DiscriminatorConfig(optimizer=OptimizerConfig(), width=8, augment=()),
}
LAWS: list[dict[str, Any]] = [
    {"law": "lognormal", "t_normal": (0.0, 1.5), "s_normal": (-1.0, 1.5)},
    {"law": "gap", "top": 0.2, "zero": 0.3},
    {"law": "schedule"},
]


class Teacher(Denoiser):
    """The denoiser of N(0, STD^2), times `factor`."""

    def __init__(self, factor: float = 1.0) -> None:
        super().__init__(torch.nn.Identity(), img_resolution=1, img_channels=1, label_dim=0)
        self.factor = factor

    def forward(self, x: torch.Tensor, sigma: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return self.factor * STD**2 * x.double() / (STD**2 + sigma.double().reshape(-1, 1, 1, 1) ** 2)


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize(("config", "accuracy"), [(EMD, 1e-6), (LMD, 1e-3)])
def test_the_known_map_is_the_minimiser(config: AlignYourFlowConfig, accuracy: float, law: dict[str, Any]) -> None:
    """The gradient of any few images vanishes at the teacher's map, but not beside it. LMD's derivative is a difference."""
    config, few = dataclasses.replace(config, **law), rows(data(200))
    exact = gradient(config, GaussianMap(), few, teacher=Teacher())
    for deviation in ((0.05, 0.0, 0.0), (0.0, 0.05, 0.0), (0.0, 0.0, 0.05)):
        off = gradient(config, GaussianMap(deviation), few, teacher=Teacher())
        assert float(exact.norm()) < accuracy * float(off.norm())
    assert float(gradient(config, GaussianMap(), few, teacher=Teacher(1.1)).norm()) > 0.01


@pytest.mark.parametrize("config", [EMD, LMD])
@pytest.mark.parametrize("normalisation", [None, 0.1])
def test_equal_levels_are_flow_matching(config: AlignYourFlowConfig, normalisation: float | None) -> None:
    """For s -> t the tangent is U - v, the error of the velocity."""
    config = dataclasses.replace(config, same=1.0, normalisation=normalisation)
    model, few = GaussianMap((0.1, 0.2, 0.3)), rows(data(50))
    found = gradient(config, model, few, teacher=Teacher())
    generator = torch.Generator().manual_seed(3)
    t, _ = config.draw(50, generator)
    assert few.real is not None
    level = t.reshape(-1, 1, 1, 1)
    x = few.real + level * torch.randn(few.real.shape, generator=generator)
    error = (model(x, t, to=t) - Teacher()(x, t)) * (1 + level) / level
    if normalisation is not None:
        error = error / (error.detach().abs() + normalisation) ** 0.5  # gradient: the error over its size
    loss = error.square().sum(dim=(1, 2, 3)).mean()
    torch.testing.assert_close(found, torch.autograd.grad(loss, model.deviation)[0], rtol=1e-5, atol=1e-8)


def test_the_warm_up_starts_with_flow_matching() -> None:
    """r rises linearly to its end; the tangent is linear in r."""
    model, config = GaussianMap((0.1, 0.2, 0.3)), dataclasses.replace(EMD, warmup=4)

    def at(step: int, config: AlignYourFlowConfig = config) -> torch.Tensor:
        return gradient(config, model, rows(data(50), step=step), teacher=Teacher())

    start, end = at(0, dataclasses.replace(EMD, r=0.0)), at(0, EMD)
    for step, share in ((0, 0.25), (1, 0.5), (3, 1.0), (9, 1.0)):
        torch.testing.assert_close(at(step), start + share * (end - start))


def test_autoguidance_extrapolates() -> None:
    config = dataclasses.replace(EMD, weak="students/weak", guidance=2.0)
    assert config.needs().models == ("teacher", "students/weak")
    few, model = rows(data(50)), GaussianMap((0.1, 0.2, 0.3))
    found = gradient(config, model, few, **{"teacher": Teacher(1.1), "students/weak": Teacher(0.9)})
    torch.testing.assert_close(found, gradient(EMD, model, few, teacher=Teacher(1.3)))
    wrongs: list[dict[str, Any]] = [{"guidance": 2.0}, {"weak": "students/weak"}]
    for wrong in wrongs:
        with pytest.raises(SettingError, match="guidance"):
            AlignYourFlowConfig(**wrong)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_rate_of_the_end(precision: Literal["fp32", "bf16"], make_denoiser: Callable[..., Denoiser]) -> None:
    """Compare with central differences of the raw network in float64."""
    model = make_denoiser(second_level=True, label_dim=4).requires_grad_(True)
    t, s, labels = torch.tensor([0.5, 4.0, 40.0]), torch.tensor([0.1, 1.0, 30.0]), torch.eye(4)[:3]
    x = torch.randn(3, 2, 8, 8) * (1 + t).reshape(-1, 1, 1, 1)
    found = end_rate(Learner(model, OptimizerConfig(), precision=precision), x, t, s, labels)
    assert not found.requires_grad
    raw = model.double().model

    def at(u: float) -> torch.Tensor:
        level, total = t.double().reshape(-1, 1, 1, 1), (t.double() ** 2 + 0.25).sqrt().reshape(-1, 1, 1, 1)
        end = (s.double().log() + u) / 4
        return 0.5 * level / total * raw(x.double() / total, t.double().log() / 4, labels.double(), None, {"to": end})

    with torch.no_grad():
        expected = ((at(1e-4) - at(-1e-4)) / 2e-4).float()
    for ours, theirs in zip(found, expected, strict=True):
        assert float((ours - theirs).norm()) < 0.01 * float(theirs.norm()) + 3e-5  # rounding errors
        assert float(theirs.norm()) > 1e-4


@pytest.mark.parametrize("equation", ["emd", "lmd"])
def test_it_trains_a_network(equation: Literal["emd", "lmd"]) -> None:
    check_training(AlignYourFlowConfig(equation=equation, flip=True, warmup=2, zero=0.2))


def test_it_trains_against_a_discriminator() -> None:
    check_training(AlignYourFlowConfig(weak="students/weak", guidance=2.0, **SIDE))


def test_the_discriminator_sees_samples_in_one_step(make_denoiser: Callable[..., Denoiser]) -> None:
    """Its images are g(80 z, 80, 0). Both terms come from one call of the student."""
    model, teacher = make_denoiser(second_level=True).requires_grad_(True), make_denoiser()
    config = AlignYourFlowConfig(**SIDE)
    objective = config.build(context(model, {"teacher": teacher}))
    assert objective.adversary is not None
    calls: list[tuple[torch.Tensor, ...]] = []
    seen: list[torch.Tensor] = []
    forward, look = model.forward, objective.adversary.discriminator.look
    model.forward = lambda *inputs: (calls.append(inputs), forward(*inputs))[1]  # pyright: ignore[reportAttributeAccessIssue]
    objective.adversary.discriminator.look = lambda images, generator: (seen.append(images), look(images, generator))[1]
    learner, critic = Learner(model, OptimizerConfig()), Learner(objective.adversary.discriminator, OptimizerConfig())
    objective.backward(learner, critic, rows(torch.randn(4, 2, 8, 8)), torch.Generator().manual_seed(3))
    x, sigma, _, _, to = calls[0]
    assert [len(inputs[0]) for inputs in calls] == [8, 4, 4]  # the others are those of the derivative
    assert torch.equal(sigma[4:], torch.full((4,), 80.0))
    assert torch.equal(to[4:], torch.zeros(4))
    assert float(x[4:].std()) == pytest.approx(80, rel=0.1)
    torch.testing.assert_close(seen[0], forward(x, sigma, None, None, to)[4:])


def test_what_it_says() -> None:
    config = AlignYourFlowConfig(num_steps=6)
    assert config.needs() == Needs(images=True, models=("teacher",), second_level=True)
    sampling = config.sampling()
    assert (sampling.num_steps, sampling.rule, sampling.line, sampling.trained_steps) == (6, "line", "ve", None)
    assert config.about() == "flow map of the teacher (AYF-EMD)"
    full = AlignYourFlowConfig(equation="lmd", weak="students/weak", guidance=2.0, **SIDE)
    assert full.about() == "flow map of the teacher (AYF-LMD), autoguidance 2, adversarial term"
    assert full.representative() == dataclasses.replace(full, guidance=3.0, adversarial_weight=0.1).representative()
    assert config.representative() == dataclasses.replace(config, law="schedule", power=0.5, r=0.5).representative()
    assert len({config.representative(), LMD.representative(), EMD.representative(), full.representative()}) == 4
