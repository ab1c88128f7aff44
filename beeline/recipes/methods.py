"""Students other than the main one: ablations and other methods, on the same pairs at the same cost."""

from __future__ import annotations

from dataclasses import replace

from beeline.config import PhaseConfig, StudentConfig
from beeline.objectives.kd import DistillationConfig
from beeline.objectives.lmm import LinesMatchingConfig
from beeline.objectives.rectified_flow import RectifiedFlowConfig


def others(base: StudentConfig, reconstruction: PhaseConfig, sot: PhaseConfig) -> dict[str, StudentConfig]:
    """Students that differ from `base` in their phases alone, by name.

    l2: `reconstruction` with the squared pixel distance. sot: `sot`, from the weights of students/lmm/reconstruction.
    kd and rf: knowledge distillation and rectified flow at the cost of `reconstruction`.
    """
    lines = reconstruction.objective
    assert isinstance(lines, LinesMatchingConfig)
    phases = {
        "l2": {"reconstruction": replace(reconstruction, objective=replace(lines, distance="l2"))},
        "sot": {"adversarial": sot},
        "kd": {"distillation": replace(reconstruction, objective=DistillationConfig(num_steps=lines.num_steps))},
        "rf": {"flow": replace(reconstruction, objective=RectifiedFlowConfig(num_steps=lines.num_steps))},
    }
    init = {"sot": "students/lmm/reconstruction"}
    return {name: replace(base, name=name, init=init.get(name, base.init), phases=each) for name, each in phases.items()}
