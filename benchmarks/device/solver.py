"""Calibrated Adams solver: given levels against the CPU, and a short calibration."""

from __future__ import annotations

import functools
from dataclasses import replace

from beeline.calibrate import calibrate, uniform_levels
from beeline.sampling import Sampling, generate, sample_from
from benchmarks.device.checks import Check, Checks, Outcome, Setting, at_most, rms
from benchmarks.device.networks import classes, network_config, noise, random_denoiser
from benchmarks.device.sampling import LIMITS

CALIBRATED = Sampling(solver="calibrated")


def checks(setting: Setting) -> Checks:
    """List the checks of this section."""
    config = network_config(setting, augment_dim=0)
    count = 2 if setting.small else 4
    model, on_device = random_denoiser(config), random_denoiser(config).to(setting.device)
    model.levels = on_device.levels = tuple(uniform_levels(6 if setting.small else 12).tolist())
    reference = functools.cache(lambda: sample_from(model, noise(setting, config, count), classes(config, count), CALIBRATED))

    def given() -> Outcome:
        latents = noise(setting, config, count).to(setting.device)
        made = sample_from(on_device, latents, classes(config, count), CALIBRATED)
        return at_most(rms(made, reference()), LIMITS["fp32"])

    def generated() -> Outcome:
        made = generate(on_device, count, solver="calibrated")
        return at_most(rms(made, reference().clamp(-1, 1)), LIMITS["fp32"])

    def calibrated() -> Outcome:
        """Calibrate a network of 8x8 pixels: the code is the same, and 128 Heun steps are fast."""
        small = replace(config, img_resolution=8, model_channels=16, channel_mult=(1, 1), num_blocks=1, attn_resolutions=())
        teacher = random_denoiser(small).to(setting.device)
        result = calibrate(teacher, counts=(6,), heun_steps=4, noises=4, held_out=4, trials=4)
        return at_most(result["tried"][0]["rms"], 1.0, levels=result["levels"])

    yield Check("given levels, images against the CPU's", given)
    yield Check("generate() with calibrated levels, against the CPU's", generated)
    yield Check("a short calibration, RMS against Heun with 128 steps", calibrated)
