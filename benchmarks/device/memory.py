"""The largest batch that fits in both phases. Speeds are measured again when nothing else runs (speeds.py), and then need not
be compiled again."""

from __future__ import annotations

from benchmarks.device.checks import COMPILING, Check, Checks, Outcome, Setting, Skip, measured
from benchmarks.device.networks import network_config, random_denoiser
from benchmarks.device.speeds import largest, worded


def checks(setting: Setting) -> Checks:
    """The checks of this section."""

    def fits() -> Outcome:
        if not setting.gpu:
            raise Skip("for GPUs")
        found = largest(setting, random_denoiser(network_config(setting, augment_dim=0)).to(setting.device))
        return measured(f"{worded(found)} (beside other sections)", **found)

    yield Check("largest batch of both phases, bf16 compiled", fits, COMPILING)
