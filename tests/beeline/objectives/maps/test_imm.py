"""IMM: the MMD is 0 for equal sets and is that of the formula; the exact flow map is nearly a fixed point."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Literal

import pytest
import small
import torch

from beeline import counting
from beeline.checkpoint import build
from beeline.config import OptimizerConfig, ProbeNetworkConfig
from beeline.objectives import Batch, Context, Needs
from beeline.objectives.learner import Learner
from beeline.objectives.maps.flow_map import jump
from beeline.objectives.maps.imm import IMM, IMMConfig, mmd


def test_the_mmd_of_equal_sets_is_0() -> None:
    torch.manual_seed(0)
    images, ones = torch.randn(6, 2, 3, 3, dtype=torch.float64).requires_grad_(True), torch.ones(6, 6, dtype=torch.float64)
    scale = torch.full((6,), 0.05, dtype=torch.float64)
    loss = mmd(images, images.detach().flip(0), ones, scale).mean()
    loss.backward()
    assert images.grad is not None
    assert float(loss.detach().abs()) < 1e-12
    assert float(images.grad.abs().max()) < 1e-12
    assert float(mmd(images, images.detach() + 0.1, ones, scale).mean()) > 1e-3


def test_the_mmd_is_that_of_its_groups() -> None:
    """Written out for two groups of different size."""
    torch.manual_seed(0)
    a, b = torch.randn(2, 5, 1, 2, 2, dtype=torch.float64)
    group = torch.tensor([0, 0, 1, 1, 1])
    scale = torch.tensor([0.3, 0.3, 2.0, 2.0, 2.0], dtype=torch.float64)

    def kernel(x: torch.Tensor, y: torch.Tensor, c: float) -> float:
        return math.exp(-float((x - y).norm()) / (4 * c))

    expected = []
    for rows, c in ((range(2), 0.3), (range(2, 5), 2.0)):
        couples = [(i, j) for i in rows for j in rows]
        sums = [kernel(a[i], a[j], c) + kernel(b[i], b[j], c) - 2 * kernel(a[i], b[j], c) for i, j in couples]
        expected.append(sum(sums) / len(couples))
    found = mmd(a, b, (group[:, None] == group).double(), scale)
    assert float(found[:2].mean()) == pytest.approx(expected[0])
    assert float(found[2:].mean()) == pytest.approx(expected[1])


def test_a_jump_lies_on_the_line() -> None:
    x, image, t = torch.randn(3, 1, 2, 2), torch.randn(3, 1, 2, 2), torch.tensor([0.5, 2.0, 80.0])
    torch.testing.assert_close(jump(x, image, t, t), x)
    torch.testing.assert_close(jump(x, image, t, 0 * t), image)
    torch.testing.assert_close(
        jump(image + t.reshape(-1, 1, 1, 1) * x, image, t, t / 4), image + t.reshape(-1, 1, 1, 1) / 4 * x
    )


def test_levels() -> None:
    objective = IMM(IMMConfig(decrement=0.5))
    t, r, s = objective._draw_levels(10_000, torch.Generator().manual_seed(0))
    assert bool(((s <= r) & (r <= t) & (s > 0.0019) & (t < 80.1)).all())
    torch.testing.assert_close(r, torch.where(t - s > 0.5, t - 0.5, s))
    assert float((t / (1 + t)).mean()) == pytest.approx(0.5, abs=0.02)
    assert float((s / (1 + s)).mean()) == pytest.approx(0.25, abs=0.02)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("labels", [True, False])
def test_a_student_trains(precision: Literal["fp32", "bf16"], labels: bool) -> None:
    torch.manual_seed(0)
    network = replace(small.NETWORK, label_dim=small.CLASSES * labels, second_level=True, dropout=0.1)
    student = build(network).train()
    frozen = copy.deepcopy(student).eval()
    context = Context(image_shape=(1, 8, 8), num_classes=small.CLASSES * labels, models={}, features={}, average=frozen)
    learner, objective = Learner(student, OptimizerConfig(), precision=precision), IMMConfig(decrement=5.0).build(context)
    classes = torch.eye(small.CLASSES)[torch.arange(10) % small.CLASSES] if labels else None
    for step in range(3):
        rows = Batch(size=10, step=step, total=3, real=torch.rand(10, 1, 8, 8) - 0.5, real_labels=classes)
        figures = objective.backward(learner, None, rows, torch.Generator().manual_seed(step))
        assert math.isfinite(float(figures["mmd"]))
        norms = learner.update(step, 3)
        assert norms["grad_norm"] > 0
        assert norms["skipped"] == 0
    assert any(not torch.equal(a, b) for a, b in zip(frozen.parameters(), student.parameters(), strict=True))


def test_needs_sampling_and_cost() -> None:
    config = IMMConfig(num_steps=6)
    assert config.needs() == Needs(images=True, second_level=True)
    assert (config.sampling().num_steps, config.sampling().rule, config.sampling().line) == (6, "line", "ve")
    assert config.about() == "inductive moment matching, groups of 4"
    found = counting.phase_flops(small.NETWORK, ProbeNetworkConfig(widths=(8,), strides=(1,)), config)
    assert found / counting.evaluation(small.NETWORK) == pytest.approx(4, rel=0.1)
