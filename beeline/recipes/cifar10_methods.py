"""CIFAR-10 with a student of every method, at the settings of their papers or of the authors' code.

Where a paper has no CIFAR-10 run (AYF, BOOT, shortcut models), the settings are ours and marked so. None has been trained yet.
"""

from __future__ import annotations

import functools
import math
import operator
from dataclasses import replace
from typing import Any

from beeline.config import OptimizerConfig, PhaseConfig, Recipe, StudentConfig
from beeline.config.student import SCRATCH
from beeline.objectives import ObjectiveConfig
from beeline.objectives.lmm import LinesMatchingConfig
from beeline.objectives.maps.ayf import AlignYourFlowConfig
from beeline.objectives.maps.boot import BootConfig
from beeline.objectives.maps.consistency import ConsistencyConfig
from beeline.objectives.maps.ctm import CTMConfig
from beeline.objectives.maps.imm import IMMConfig
from beeline.objectives.maps.meanflow import MeanFlowConfig
from beeline.objectives.maps.progressive import ProgressiveConfig, rounds
from beeline.objectives.maps.scm import SCMConfig
from beeline.objectives.maps.shortcut import ShortcutConfig
from beeline.objectives.rectified_flow import RectifiedFlowConfig
from beeline.recipes.published import cifar10


def cifar10_methods(seed: int = 0) -> Recipe:
    """CIFAR-10, class-conditional, with a student of every method (pairs of the teacher, LPIPS with VGG16 at 224 pixels)."""
    recipe = cifar10(seed)
    families = [family(recipe.main) for family in (_consistency, _flow_maps, _flows, _others)]
    students = functools.reduce(operator.or_, families, recipe.students)
    return replace(recipe, name="cifar10_methods", students=students)


def _consistency(base: StudentConfig) -> dict[str, StudentConfig]:
    """CD and CT (Song et al. 2023), iCT (Song & Dhariwal 2023), ECT (Geng et al. 2024), sCM (Lu & Song 2025)."""
    pair = ConsistencyConfig(weighting="none", distance="lpips", resize=224, flip=True)
    cd = replace(pair, teacher="teacher", levels="schedule")
    ct = replace(pair, levels="ct", target_decay=0.9)
    ict = ConsistencyConfig(levels="ict", neighbours="lognormal", huber_c=None, flip=True)
    scm = SCMConfig(tangent_warmup=10_000)
    smooth: dict[str, Any] = {"betas": (0.9, 0.99)}
    return {
        "cd": _student(base, "cd", cd, 800_000, lr=4e-4),
        "ct": _student(base, "ct", ct, 800_000, lr=4e-4, init=SCRATCH),
        "ict": _student(base, "ict", ict, 400_000, lr=1e-4, decay=0.99993, batch_size=1024, dropout=0.3, init=SCRATCH),
        "ect": _student(base, "ect", ConsistencyConfig(flip=True), 200_000, lr=1e-4, batch_size=128, dropout=0.2),
        "scd": _student(base, "scd", scm, 500_000, lr=1e-4, optimizer=smooth),
        "sct": _student(base, "sct", replace(scm, reference="data"), 350_000, lr=1e-4, optimizer=smooth, dropout=0.2),
    }


def _flow_maps(base: StudentConfig) -> dict[str, StudentConfig]:
    """CTM (Kim et al. 2024), MeanFlow (Geng et al. 2025), AYF (Sabour et al. 2025; ours), IMM (Zhou et al. 2025; batch and
    iterations ours), shortcut models (Frans et al. 2025; ours)."""
    adversarial = base.phases["adversarial"].objective
    assert isinstance(adversarial, LinesMatchingConfig)
    ctm = CTMConfig(distance="lpips_avg", resize=224, flip=True)
    fooled = replace(ctm, adversarial_weight=1.0, discriminator=adversarial.discriminator)
    first = _student(base, "ctm", ctm, 50_000, lr=4e-4, decay=0.999, batch_size=256)
    second = replace(first.phases["training"], iterations=30_000, objective=fooled)
    adam: dict[str, Any] = {"kind": "adam"}
    return {
        "ctm": replace(first, phases=first.phases | {"adversarial": second}),
        "meanflow": _student(
            base, "meanflow", MeanFlowConfig(flip=True), 800_000, lr=6e-4, optimizer=adam | {"warmup": 10_000},
            batch_size=1024, dropout=0.2, init=SCRATCH,
        ),
        "ayf": _student(base, "ayf", AlignYourFlowConfig(warmup=10_000, flip=True), 50_000, lr=1e-4, optimizer=adam),
        "imm": _student(base, "imm", IMMConfig(), 400_000, lr=1e-4, batch_size=1024, dropout=0.2, init=SCRATCH),
        "shortcut": _student(base, "shortcut", ShortcutConfig(), 200_000, lr=1e-4, optimizer=adam),
    }  # fmt: skip


def _flows(base: StudentConfig) -> dict[str, StudentConfig]:
    """Rectified flow and its distillation (Liu et al. 2023), OT-CFM (Tong et al. 2024), 2-RF++ (Lee et al. 2024)."""
    images = RectifiedFlowConfig(data="images", flip=True)
    adam: dict[str, Any] = {"kind": "adam", "warmup": 5000, "clip": 1.0}
    scratch: dict[str, Any] = {"init": SCRATCH, "optimizer": adam, "batch_size": 128}
    end = LinesMatchingConfig(steps=(0,), distance="lpips", resize=224)
    plus = RectifiedFlowConfig(times="u_shaped", distance="lpips", resize=224)
    own: dict[str, Any] = {"init": "students/rf", "pairs": "students/rf"}
    return {
        "cfm": _student(base, "cfm", images, 600_000, lr=2e-4, decay=0.999999, dropout=0.15, **scratch),
        "ot_cfm": _student(base, "ot_cfm", replace(images, coupling="ot"), 400_000, lr=2e-4, **scratch),
        "rf_plus": _student(base, "rf_plus", plus, 800_000, lr=2e-4),
        "rf_distilled": _student(base, "rf_distilled", end, 80_000, lr=2e-4, **own),
        "rf3": _student(base, "rf3", RectifiedFlowConfig(), 300_000, lr=2e-4, **own),
    }


def _others(base: StudentConfig) -> dict[str, StudentConfig]:
    """Progressive distillation (Salimans & Ho 2022) and BOOT (Gu et al. 2023; ours)."""
    halving = ProgressiveConfig(num_steps=4096, steps=2048, flip=True)
    halved = rounds(halving, (50_000,) * 10 + (100_000,) * 2, OptimizerConfig(lr=5e-5, decay="cosine"))
    pd = _student(base, "pd", halving, 1, lr=5e-5)
    return {
        # Validation samples at all steps of a round, thousands in the first ones.
        "pd": replace(pd, phases=halved, phase_switch="restart", validate_every=0),
        "boot": _student(base, "boot", BootConfig(), 200_000, lr=1e-4),
    }


def _student(
    base: StudentConfig,
    name: str,
    objective: ObjectiveConfig,
    iterations: int,
    *,
    lr: float,
    decay: float = 0.9999,
    optimizer: dict[str, Any] | None = None,
    **changes: Any,
) -> StudentConfig:
    """A student of one phase, RAdam without clipping unless `optimizer` says otherwise, and an average with this decay."""
    settings = OptimizerConfig(**({"kind": "radam", "lr": lr, "clip": 0} | (optimizer or {})))
    phase = PhaseConfig(iterations=iterations, optimizer=settings, objective=objective)
    half_life = round(math.log(0.5) / math.log(decay), 1)
    return replace(base, name=name, phases={"training": phase}, ema_half_lives=(half_life,), **changes)
