"""Shortcut models: the exact flow map of Gaussian data is a fixed point."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Literal

import pytest
import small
import torch
from closed_form import ClosedForm
from torch import nn

from beeline import counting
from beeline.checkpoint import build
from beeline.config import OptimizerConfig, ProbeNetworkConfig
from beeline.objectives import Batch, Context, Needs
from beeline.objectives.learner import Learner
from beeline.objectives.maps.shortcut import Shortcut, ShortcutConfig

SD = 0.5


class Map(ClosedForm):
    """The flow map of data N(0, SD^2) as a denoiser with a second level, plus `error` times another function."""

    def __init__(self, error: float = 0.0) -> None:
        super().__init__(side=2)
        self.error = nn.Parameter(torch.tensor(error, dtype=torch.float64))

    def output(self, x: torch.Tensor, t: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        velocity = s >= t * (1 - 1e-9)
        s = torch.where(velocity, t / 2, s)
        reached = x * ((SD**2 + s**2) / (SD**2 + t**2)).sqrt()
        image = torch.where(velocity, SD**2 * x / (SD**2 + t**2), (reached - s / t * x) / (1 - s / t))
        return image + self.error * torch.tanh(x / (SD**2 + t**2).sqrt())


def gradient(config: ShortcutConfig, error: float) -> tuple[float, dict[str, float]]:
    """The gradient by `error` of a step, and its figures."""
    student, exact = Map(error), Map().requires_grad_(False)
    real = SD * torch.randn(4000, 1, 2, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    context = Context(image_shape=(1, 2, 2), num_classes=0, models={"teacher": exact}, features={}, average=exact)
    rows = Batch(size=len(real), step=0, total=1, real=real)
    learner = Learner(student, OptimizerConfig())
    figures = config.build(context).backward(learner, None, rows, torch.Generator().manual_seed(2))
    assert student.error.grad is not None
    return float(student.error.grad), {name: float(value) for name, value in figures.items()}


def test_the_exact_map_is_a_fixed_point() -> None:
    """Two exact half steps are an exact step. Only the smallest steps have the error of Euler's method."""
    wrong, figures = gradient(ShortcutConfig(sizes=8, bootstrap=0.5), 0.1)
    assert min(figures.values()) > 0.01
    slope, figures = gradient(ShortcutConfig(sizes=8, bootstrap=0.5), 0.0)
    assert figures["velocity"] < 1e-12
    assert figures["steps"] < 1e-3
    assert abs(slope) < 1e-2 * wrong
    assert gradient(ShortcutConfig(bootstrap=0.0), 0.0)[1].keys() == {"velocity"}
    assert gradient(ShortcutConfig(bootstrap=0.0, reference="data"), 0.0)[1]["velocity"] > 0.1


def test_two_exact_half_steps_are_one() -> None:
    exact = Map().requires_grad_(False)
    context = Context(image_shape=(1, 2, 2), num_classes=0, models={"teacher": exact}, features={}, average=exact)
    objective = Shortcut(ShortcutConfig(), context)
    learner, x = Learner(Map(), OptimizerConfig()), torch.randn(3, 1, 2, 2, dtype=torch.float64)
    levels = tuple(torch.tensor(level) for level in ([0.5, 3.0, 80.0], [0.2, 1.0, 2.0], [0.1, 0.0, 0.0]))
    t, m, s = levels
    found = objective.two_steps(learner, x, (t, m, s), torch.zeros(3, dtype=torch.bool), None)
    torch.testing.assert_close(found, exact(x, t, to=s), rtol=1e-5, atol=1e-6)
    small_steps = objective.two_steps(learner, x, (t, m, s), torch.ones(3, dtype=torch.bool), None)
    assert float((small_steps - found).abs().max()) > 0.01


def test_steps_lie_on_their_grid() -> None:
    exact = Map()
    context = Context(image_shape=(1, 2, 2), num_classes=0, models={"teacher": exact}, features={}, average=exact)
    t, m, s, small_size = Shortcut(ShortcutConfig(sizes=3), context)._draw_steps(3000, torch.Generator().manual_seed(0))
    tau_t, tau_m, tau_s = (level / (1 + level) * 81 / 80 for level in (t, m, s))
    size = tau_t - tau_s
    torch.testing.assert_close(tau_m, (tau_t + tau_s) / 2, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(tau_s / size, (tau_s / size).round(), rtol=0, atol=1e-3)
    for part in (1.0, 0.5, 0.25):
        assert float(((size - part).abs() < 1e-3).float().mean()) == pytest.approx(1 / 3, abs=0.04)
    assert bool((small_size == (size < 0.3)).all())
    assert float(t.max()) == pytest.approx(80, rel=1e-3)
    assert float(s.min()) == 0


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("labels", [True, False])
def test_a_student_trains(precision: Literal["fp32", "bf16"], labels: bool) -> None:
    torch.manual_seed(0)
    network = replace(small.NETWORK, label_dim=small.CLASSES * labels, second_level=True, dropout=0.1)
    student = build(network).train()
    frozen = copy.deepcopy(student).eval().requires_grad_(False)
    context = Context(
        image_shape=(1, 8, 8), num_classes=small.CLASSES * labels, models={"teacher": frozen}, features={}, average=frozen
    )
    learner, objective = Learner(student, OptimizerConfig(), precision=precision), ShortcutConfig().build(context)
    classes = torch.eye(small.CLASSES)[torch.arange(8) % small.CLASSES] if labels else None
    for step in range(3):
        rows = Batch(size=8, step=step, total=3, real=torch.rand(8, 1, 8, 8) - 0.5, real_labels=classes)
        figures = objective.backward(learner, None, rows, torch.Generator().manual_seed(step))
        assert all(math.isfinite(float(value)) for value in figures.values())
        norms = learner.update(step, 3)
        assert norms["grad_norm"] > 0
        assert norms["skipped"] == 0
    assert any(not torch.equal(a, b) for a, b in zip(frozen.parameters(), student.parameters(), strict=True))


def test_needs_sampling_and_cost() -> None:
    config = ShortcutConfig(num_steps=6)
    assert config.needs() == Needs(images=True, models=("teacher",), second_level=True)
    assert replace(config, reference="data").needs().models == ()
    assert (config.sampling().num_steps, config.sampling().rule, config.sampling().line) == (6, "line", "ve")
    assert config.about() == "shortcut model, velocity of the teacher"
    probe, half = ProbeNetworkConfig(widths=(8,), strides=(1,)), replace(config, bootstrap=0.5)
    found = counting.phase_flops(small.NETWORK, probe, half) / counting.evaluation(small.NETWORK)
    assert found == pytest.approx(3 + 2 / 2 + 1 / 2, rel=0.1)
