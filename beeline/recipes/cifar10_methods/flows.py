"""Students of flows on CIFAR-10: rectified flow, flow matching, constant acceleration."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from beeline.config import StudentConfig
from beeline.config.student import SCRATCH
from beeline.objectives.lmm import LinesMatchingConfig
from beeline.objectives.maps.caf import AccelerationConfig
from beeline.objectives.rectified_flow import RectifiedFlowConfig
from beeline.recipes.cifar10_methods.student import discriminator_of, student


def flows(base: StudentConfig) -> dict[str, StudentConfig]:
    """Rectified flow and its distillation (Liu et al. 2023), OT-CFM (Tong et al. 2024), 2-RF++ (Lee et al. 2024), CAF (Park et
    al. 2024; iterations ours, and the first guess is that of `kd`)."""
    images = RectifiedFlowConfig(data="images", flip=True)
    adam: dict[str, Any] = {"kind": "adam", "warmup": 5000, "clip": 1.0}
    scratch: dict[str, Any] = {"init": SCRATCH, "optimizer": adam, "batch_size": 128}
    end = LinesMatchingConfig(steps=(0,), distance="lpips", resize=224)
    plus = RectifiedFlowConfig(times="u_shaped", distance="lpips", resize=224)
    own: dict[str, Any] = {"init": "students/rf", "pairs": "students/rf"}
    return {
        "cfm": student(base, "cfm", images, 600_000, lr=2e-4, decay=0.999999, dropout=0.15, **scratch),
        "ot_cfm": student(base, "ot_cfm", replace(images, coupling="ot"), 400_000, lr=2e-4, **scratch),
        "rf_plus": student(base, "rf_plus", plus, 800_000, lr=2e-4),
        "rf_distilled": student(base, "rf_distilled", end, 80_000, lr=2e-4, **own),
        "rf3": student(base, "rf3", RectifiedFlowConfig(), 300_000, lr=2e-4, **own),
        "caf": _acceleration(base),
    }


def _acceleration(base: StudentConfig) -> StudentConfig:
    """CAF from the guess of `kd`: reconstruction, then with a discriminator. Batches of 160 per GPU, as in its code. Its Huber
    distance is a squared one here."""
    critic = discriminator_of(base)
    critic = replace(critic, optimizer=replace(critic.optimizer, kind="adam", lr=1e-3))
    curve = AccelerationConfig(distance="lpips", resize=224, pixel_weight=1.0)
    fooled = replace(curve, adversarial_weight=1.0, discriminator=critic)
    first = student(
        base, "caf", curve, 200_000, lr=1e-4, optimizer={"kind": "adam"}, init="students/kd",
        batch_size=160 * base.workers.count,
    )  # fmt: skip
    phase = first.phases["training"]
    second = replace(phase, iterations=20_000, optimizer=replace(phase.optimizer, lr=2e-5), objective=fooled)
    return replace(first, phases={"acceleration": phase, "adversarial": second})
