"""Networks and data of the checks: the recipes' networks at full size, or small ones of the same kinds, random weights."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import torch

from beeline.checkpoint import build
from beeline.config import NetworkConfig, PhaseConfig, StudentConfig
from beeline.denoiser import Denoiser
from beeline.features.backbones import BACKBONES, build_backbone
from beeline.labels import as_one_hot
from beeline.noise import stream_seed, unit_noise
from beeline.objectives import Batch
from beeline.objectives.lmm import LinesMatchingConfig
from beeline.recipes import RECIPES
from benchmarks.device.checks import Setting


def network_config(setting: Setting, recipe: str = "cifar10", **changes: Any) -> NetworkConfig:
    """Return a recipe's network without dropout, at full size or small."""
    config = replace(RECIPES[recipe](0).teacher.network, dropout=0.0)
    if setting.small:
        width = 64 if config.kind == "adm" else 32
        config = replace(config, img_resolution=16, model_channels=width, channel_mult=(1, 2), num_blocks=1)
        config = replace(config, attn_resolutions=(8,), label_dim=min(config.label_dim, 10))
    return replace(config, **changes)


def random_denoiser(config: NetworkConfig, seed: int = 0) -> Denoiser:
    """Build a denoiser on the CPU with random weights; zero-initialised output layers would hide errors."""
    torch.manual_seed(seed)
    model = build(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.normal_(0, parameter[0].numel() ** -0.5)
    return model


@functools.cache
def backbone(name: str) -> Any:
    """Build a frozen feature network with random weights, on the CPU."""
    torch.manual_seed(1 + BACKBONES.index(name))
    return build_backbone(name)


def student_config(setting: Setting, **changes: Any) -> StudentConfig:
    """Return the paper's CIFAR-10 student, in float32 and not compiled unless `changes` differ; with small features if
    small."""
    config = replace(RECIPES["cifar10"](0).main, precision="fp32", compiled=False)
    if setting.small:
        config = replace(config, phases={name: _with_small_features(phase) for name, phase in config.phases.items()})
    return replace(config, **changes)


def _with_small_features(phase: PhaseConfig) -> PhaseConfig:
    lines = phase.objective
    assert isinstance(lines, LinesMatchingConfig)
    critic = replace(lines.discriminator, networks=("scratch",))
    return replace(phase, objective=replace(lines, resize=32, discriminator=critic))


def noise(setting: Setting, config: NetworkConfig, count: int, seed: int = 0) -> torch.Tensor:
    """Draw unit-variance noise (count, C, H, W) of a run, on the CPU."""
    shape = (config.img_channels, config.img_resolution, config.img_resolution)
    return torch.from_numpy(unit_noise(seed, range(count), shape))


def classes(config: NetworkConfig, count: int) -> torch.Tensor | None:
    """Return labels (count,) on the CPU, or None for a network without classes."""
    return torch.arange(count) % config.label_dim if config.label_dim else None


def images(config: NetworkConfig, count: int, seed: int) -> torch.Tensor:
    """Draw smooth images with a little noise, (count, C, H, W) in [-1, 1], on the CPU. In flat areas max pooling would have
    ties, and its gradient would depend on rounding."""
    generator = torch.Generator().manual_seed(stream_seed(seed, "images"))
    coarse = torch.randn(count, config.img_channels, 4, 4, generator=generator)
    size = (config.img_resolution, config.img_resolution)
    smooth = torch.nn.functional.interpolate(coarse, size=size, mode="bicubic")
    return (0.5 * smooth + 0.1 * torch.randn(smooth.shape, generator=generator)).tanh()


def batch_of(setting: Setting, config: NetworkConfig, count: int, device: torch.device, seed: int = 0) -> Batch:
    """Build a training batch of pairs and real images."""
    labels = as_one_hot(classes(config, count), config.label_dim, count, device)
    return Batch(
        size=count,
        step=0,
        total=1,
        noise=noise(setting, config, count, seed).to(device),
        x1=images(config, count, seed).to(device),
        labels=labels,
        real=images(config, count, seed + 1).to(device),
        real_labels=labels,
    )
