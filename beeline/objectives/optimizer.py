"""Optimisers and the learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn

from beeline.config import OptimizerConfig


def make_optimizer(parameters: Iterable[nn.Parameter], config: OptimizerConfig) -> torch.optim.Optimizer:
    """The optimiser that `config` names."""
    cls = {"adam": torch.optim.Adam, "radam": torch.optim.RAdam}[config.kind]
    extra = {"fused": True} if config.kind == "adam" else {"foreach": True}
    return cls(list(parameters), lr=config.lr, betas=config.betas, **extra)


def learning_rate(config: OptimizerConfig, step: int, total: int) -> float:
    """The learning rate of `step` of `total`: linear warm-up, then constant or a cosine down to 5 % of `config.lr`."""
    rate = config.lr * min(1.0, (step + 1) / max(config.warmup, 1))
    if config.decay == "cosine":
        rate *= 0.05 + 0.95 * (1 + math.cos(math.pi * step / total)) / 2
    return rate
