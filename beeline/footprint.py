"""Bytes that one process of a training holds: the networks that learn and those that do not, without activations.

A network that learns has its weights, gradients and Adam's two moments in float32. In bf16, autocast keeps a copy of its
weights while a step needs them. Averages and targets are float32. Frozen models and feature networks have the run's
precision. Networks are built on the meta device (counting.py), so that the largest takes a second and no memory.

Activations come in addition. They grow with a process's micro-batch: `accumulate` divides them, and nothing else.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from dataclasses import replace
from typing import Literal

import torch
from torch import nn

from beeline import counting
from beeline.config import NetworkConfig, ProbeNetworkConfig, StudentConfig, TeacherConfig
from beeline.objectives import ObjectiveConfig
from beeline.sampling.inference import DTYPES, prepare

LEARNING = 3  # gradient and two moments, in units of the weights
Precision = Literal["fp32", "bf16"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Footprint:
    """Bytes of one process, by the networks that they belong to."""

    student: int
    """Weights, gradients and moments; weights alone of a frozen network that makes the guess."""
    averages: int
    critic: int = 0
    """The same as `student`, of a discriminator or fake score."""
    state: int = 0
    """The objective's own networks and statistics: targets, a teacher of its own, learned weightings, queues of features."""
    frozen: int = 0
    """Models and feature networks that do not learn."""
    casts: int = 0
    """Copies of learning weights in bf16. They exist within a step."""

    @property
    def total(self) -> int:
        """The sum."""
        return sum(dataclasses.astuple(self))


def footprint(network: NetworkConfig, probe: ProbeNetworkConfig, config: StudentConfig | TeacherConfig) -> Footprint:
    """The largest footprint of the phases of a training of `network`. `probe` is the losses' probe."""
    network, averages = replace(network, dropout=0.0), len(config.half_lives)
    phases = [
        _of_phase(network, probe, phase.objective.representative(), config.precision, averages)
        for phase in config.running.values()
    ]
    return max(phases, key=lambda phase: phase.total)


@functools.cache
def _of_phase(
    network: NetworkConfig, probe: ProbeNetworkConfig, config: ObjectiveConfig, precision: Precision, averages: int
) -> Footprint:
    modules, objective = counting.built(network, probe, config)
    needs, student = config.needs(), modules[counting.STUDENT]
    models = [_held(prepare(modules[counting.FROZEN], precision=precision)) for _ in needs.models]
    features = [_held(modules[name], DTYPES[precision]) for name in needs.features]
    casts = _trained(student) + _trained(objective.critic)
    return Footprint(
        student=_learning(student),
        averages=averages * _held(student),
        critic=_learning(objective.critic),
        state=_learning(objective.state()),
        frozen=sum(models) + sum(features),
        casts=casts * DTYPES[precision].itemsize if precision != "fp32" else 0,
    )


def _learning(module: nn.Module | None) -> int:
    """Bytes of a network with gradients and moments of the parameters that learn; 0 for None."""
    return _held(module) + LEARNING * counting.FLOAT * _trained(module)


def _trained(module: nn.Module | None) -> int:
    """Number of parameters that learn; 0 for None."""
    return 0 if module is None else sum(part.numel() for part in module.parameters() if part.requires_grad)


def _held(module: nn.Module | None, dtype: torch.dtype | None = None) -> int:
    """Bytes of parameters and buffers, in `dtype` if given; 0 for None."""
    if module is None:
        return 0
    tensors = itertools.chain(module.parameters(), module.buffers())
    return sum(tensor.numel() * (tensor.dtype if dtype is None else dtype).itemsize for tensor in tensors)
