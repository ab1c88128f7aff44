"""Optimisers and the learning-rate schedule."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from typing import Literal

import torch
from torch import nn

from beeline.settings import Amount, Positive, Settings, ShareBelow1, Whole


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig(Settings):
    """Adam or RAdam with linear warm-up, then a constant or cosine learning rate."""

    kind: Literal["adam", "radam"] = "adam"
    lr: Positive = 1e-3
    betas: tuple[ShareBelow1, ShareBelow1] = (0.9, 0.999)
    warmup: Whole = 0
    """Steps of linear warm-up."""
    decay: Literal["constant", "cosine"] = "constant"
    """"cosine" falls to 5 % of `lr` at the last step."""
    clip: Amount = 1.0
    """Gradient norm above which gradients are scaled down; 0 disables clipping."""


def make_optimizer(parameters: Iterable[nn.Parameter], config: OptimizerConfig) -> torch.optim.Optimizer:
    """Build the optimiser that `config` describes."""
    cls = {"adam": torch.optim.Adam, "radam": torch.optim.RAdam}[config.kind]
    extra = {"fused": True} if config.kind == "adam" else {"foreach": True}
    return cls(list(parameters), lr=config.lr, betas=config.betas, **extra)


def learning_rate(config: OptimizerConfig, step: int, total: int) -> float:
    """The learning rate of `step` of `total`: linear warm-up, then constant or a cosine down to 5 % of `config.lr`."""
    rate = config.lr * min(1.0, (step + 1) / max(config.warmup, 1))
    if config.decay == "cosine":
        rate *= 0.05 + 0.95 * (1 + math.cos(math.pi * step / total)) / 2
    return rate
