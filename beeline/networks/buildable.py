"""Check that a network can be built from its settings, on the meta device, which takes no memory."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from beeline.checkpoint import build
from beeline.config import NetworkConfig, ProbeNetworkConfig
from beeline.errors import BeelineError
from beeline.features.probe import Probe

MAX_PARAMETERS = 10**10  # 40 GB of weights in float32


def check_network(name: str, config: NetworkConfig) -> None:
    """Raise BeelineError, naming the network `name`, unless it can be built and accepts an image of its own size."""

    def attempt() -> nn.Module:
        model = build(config)
        labels = torch.zeros(1, config.label_dim) if config.label_dim else None
        model(torch.zeros(1, *model.image_shape), torch.ones(1), labels)
        return model

    _check(name, attempt)


def check_probe(name: str, config: ProbeNetworkConfig, *, channels: int, num_classes: int) -> None:
    """Raise BeelineError, naming the probe `name`, unless it can be built. It accepts images of any size."""
    _check(name, lambda: Probe(config, channels=channels, num_classes=num_classes))


def _check(name: str, attempt: Callable[[], nn.Module]) -> None:
    try:
        with torch.device("meta"):
            model = attempt()
    except (RuntimeError, ValueError) as error:  # raised by layers for unsupported channels or sides
        reason = " ".join(str(error).splitlines()[0].split()).removesuffix(".")
        raise BeelineError(f"{name} cannot be built: {reason}. Change its channels, levels or resolution") from error
    size = sum(parameter.numel() for parameter in model.parameters())
    if size > MAX_PARAMETERS:
        raise BeelineError(f"{name} would have {size:,} parameters; expected at most {MAX_PARAMETERS:,}. Make it smaller")
