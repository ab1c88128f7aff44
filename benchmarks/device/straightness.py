"""Straightness along lines and along trajectories, with levels on the CPU as in the evaluation."""

from __future__ import annotations

import functools

import torch

from beeline.metrics.straightness import straightness, trajectories
from beeline.schedule import edm_sigmas
from benchmarks.device.checks import Check, Checks, Outcome, Setting, at_most
from benchmarks.device.networks import classes, images, network_config, noise, random_denoiser

LIMIT = 1e-3  # relative error


def checks(setting: Setting) -> Checks:
    """List the checks of this section."""
    config, count, levels = network_config(setting, augment_dim=0), 4, 4 if setting.small else 6
    models = {device: random_denoiser(config).to(device) for device in {torch.device("cpu"), setting.device}}
    labels = classes(config, count)

    @functools.cache
    def along_lines(device: torch.device) -> list[float]:
        x1, z = images(config, count, 0).to(device), noise(setting, config, count).to(device)
        return straightness(models[device], x1, z, labels, edm_sigmas(levels), line="lerp")

    @functools.cache
    def along_trajectories(device: torch.device) -> list[float]:
        straight, uneven = trajectories(
            models[device], noise(setting, config, count).to(device), labels, num_steps=levels
        )  # fmt: skip
        return straight + uneven

    def compared(found: list[float], wanted: list[float]) -> Outcome:
        return at_most(max(abs(a - b) / max(abs(b), 1e-3) for a, b in zip(found, wanted, strict=True)), LIMIT)

    cpu = torch.device("cpu")
    yield Check("along lines, against the CPU's", lambda: compared(along_lines(setting.device), along_lines(cpu)))
    yield Check(
        "along trajectories, against the CPU's",
        lambda: compared(along_trajectories(setting.device), along_trajectories(cpu)),
    )
