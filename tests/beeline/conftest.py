"""Fixtures for tests of the mathematics: one CPU thread, and small networks whose weights are far from zero initialisation."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from beeline.checkpoint import build
from beeline.config import NetworkConfig, ProbeNetworkConfig
from beeline.denoiser import Denoiser
from beeline.features.probe import Probe


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def scrambled(model: torch.nn.Module, seed: int = 0) -> None:
    """Draw random weights of moderate size, because zero-initialised layers would hide errors."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.1
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)


@pytest.fixture(scope="session")
def make_denoiser() -> Callable[..., Denoiser]:
    """Build a small denoiser of 8x8 images in eval mode; keyword arguments change its NetworkConfig."""

    def make(**changes: object) -> Denoiser:
        arguments = {"kind": "ddpmpp", "img_resolution": 8, "img_channels": 2, "model_channels": 16, "channel_mult": (1, 2)}
        model = build(NetworkConfig(**{**arguments, "num_blocks": 1, "attn_resolutions": (4,), **changes}))  # pyright: ignore[reportArgumentType]
        scrambled(model)
        return model.eval().requires_grad_(False)

    return make


@pytest.fixture
def probe() -> Probe:
    """Build an untrained, frozen probe of 8x8 images with one channel."""
    torch.manual_seed(0)
    made = Probe(ProbeNetworkConfig(widths=(8, 12, 16), strides=(1, 2, 1)), channels=1, num_classes=10)
    return made.eval().requires_grad_(False)
