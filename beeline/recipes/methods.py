"""Students other than the main one: ablations of lines matching, and the baselines that train on the same pairs."""

from __future__ import annotations

from dataclasses import replace

from beeline.config import PhaseConfig, StudentConfig
from beeline.objectives.kd import DistillationConfig
from beeline.objectives.lmm import LinesMatchingConfig
from beeline.objectives.rectified_flow import RectifiedFlowConfig


def ablations(base: StudentConfig, reconstruction: PhaseConfig, sot: PhaseConfig) -> dict[str, StudentConfig]:
    """Students that differ from `base` in their phases alone, by name.

    l2: `reconstruction` with the squared pixel distance. sot: `sot`, from the weights of students/lmm/reconstruction.
    """
    assert isinstance(reconstruction.objective, LinesMatchingConfig)
    pixels = replace(reconstruction, objective=replace(reconstruction.objective, distance="l2"))
    return {
        "l2": replace(base, name="l2", phases={"reconstruction": pixels}),
        "sot": replace(base, name="sot", phases={"adversarial": sot}, init="students/lmm/reconstruction"),
    }


def baselines(base: StudentConfig, reconstruction: PhaseConfig) -> dict[str, StudentConfig]:
    """Knowledge distillation (kd) and rectified flow (rf) on the same pairs, at the cost of `reconstruction`."""
    assert isinstance(reconstruction.objective, LinesMatchingConfig)
    levels = reconstruction.objective.num_steps
    phases = {
        "kd": {"distillation": replace(reconstruction, objective=DistillationConfig(num_steps=levels))},
        "rf": {"flow": replace(reconstruction, objective=RectifiedFlowConfig(num_steps=levels))},
    }
    return {name: replace(base, name=name, phases=each) for name, each in phases.items()}
