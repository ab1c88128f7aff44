"""Largest batch that fits, in both phases. speeds.py measures speeds again while nothing else runs, and need not compile
again."""

from __future__ import annotations

from benchmarks.device.checks import COMPILING, Check, Checks, Outcome, Setting, Skip, measured
from benchmarks.device.networks import network_config, random_denoiser
from benchmarks.device.speeds import largest, worded


def checks(setting: Setting) -> Checks:
    """List the checks of this section."""

    def fits() -> Outcome:
        if not setting.gpu:
            raise Skip("for GPUs")
        found = largest(setting, random_denoiser(network_config(setting, augment_dim=0)).to(setting.device))
        return measured(f"{worded(found)} (while other sections run)", **found)

    yield Check("largest batch of both phases, bf16 compiled", fits, COMPILING)
