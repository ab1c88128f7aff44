"""Checks that tests of flow-map objectives share."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from typing import Literal

import torch
from small import NETWORK

from beeline import counting
from beeline.checkpoint import build
from beeline.config import OptimizerConfig, ProbeNetworkConfig
from beeline.denoiser import Denoiser
from beeline.features import Frozen
from beeline.features.probe import Probe
from beeline.objectives import Batch, Context, ObjectiveConfig
from beeline.objectives.learner import Learner


def rows(real: torch.Tensor, *, step: int = 0, weight: float = 1.0, labels: torch.Tensor | None = None) -> Batch:
    """A batch of real images (B, C, H, W)."""
    return Batch(size=len(real), step=step, total=10, real=real, real_labels=labels, weight=weight)


PROBE = ProbeNetworkConfig(widths=(8, 12), strides=(1, 2))


def context(model: Denoiser, models: Mapping[str, Denoiser]) -> Context:
    """A context with an untrained probe."""
    probe = Probe(PROBE, channels=model.img_channels, num_classes=10).eval().requires_grad_(False)
    return Context(
        image_shape=model.image_shape,
        num_classes=model.label_dim,
        models=models,
        features={"probe": Frozen(probe)},
        average=copy.deepcopy(model),
    )


def gradient(config: ObjectiveConfig, model: Denoiser, batch: Batch, **models: Denoiser) -> torch.Tensor:
    """The gradient of the objective at a model with one parameter."""
    (parameter,) = model.parameters()
    parameter.grad = None
    objective = config.build(context(model, models))
    objective.backward(Learner(model, OptimizerConfig()), None, batch, torch.Generator().manual_seed(3))
    assert parameter.grad is not None
    return parameter.grad


def check_training(config: ObjectiveConfig) -> None:
    """Train a small network for a few steps: finite figures, in each precision, with and without labels. Count its cost."""
    cases: list[tuple[Literal["fp32", "bf16"], int]] = [("fp32", 4), ("fp32", 0), ("bf16", 4), ("bf16", 0)]
    for precision, classes in cases:
        torch.manual_seed(0)
        network = dataclasses.replace(NETWORK, label_dim=classes)
        teacher = build(network).eval().requires_grad_(False)
        model = build(dataclasses.replace(network, second_level=True, dropout=0.1)).train()
        labels = torch.eye(classes)[torch.arange(6) % classes] if classes else None
        objective = config.build(context(model, {name: teacher for name in config.needs().models}))
        learner = Learner(model, OptimizerConfig(), precision=precision)
        critic = None if objective.critic is None else Learner(objective.critic, OptimizerConfig(), precision=precision)
        before = [parameter.detach().clone() for parameter in model.parameters()]
        for step in range(4):
            batch = rows(torch.randn(6, 1, 8, 8).clamp(-1, 1), step=step, labels=labels)
            figures = objective.backward(learner, critic, batch, torch.Generator().manual_seed(step))
            assert all(value.ndim == 0 and bool(value.isfinite()) and not value.requires_grad for value in figures.values())
            assert learner.update(step, 10)["skipped"] == 0
            if critic is not None:
                assert critic.update(step, 10)["skipped"] == 0
        moved = [not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)]
        assert all(moved)
    assert counting.phase_flops(NETWORK, PROBE, config) > 4 * counting.evaluation(NETWORK)
