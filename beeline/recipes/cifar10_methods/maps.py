"""Students of consistency and flow maps on CIFAR-10, and those of progressive distillation."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from beeline.config import OptimizerConfig, PhaseConfig, StudentConfig
from beeline.config.student import SCRATCH
from beeline.objectives.edm import EDMConfig
from beeline.objectives.maps.ayf import AlignYourFlowConfig
from beeline.objectives.maps.boot import BootConfig
from beeline.objectives.maps.consistency import ConsistencyConfig
from beeline.objectives.maps.ctm import CTMConfig
from beeline.objectives.maps.guided import GuidedConfig
from beeline.objectives.maps.imm import IMMConfig
from beeline.objectives.maps.meanflow import MeanFlowConfig
from beeline.objectives.maps.progressive import ProgressiveConfig, rounds
from beeline.objectives.maps.scm import SCMConfig
from beeline.objectives.maps.shortcut import ShortcutConfig
from beeline.recipes.cifar10_methods.student import discriminator_of, student


def consistency(base: StudentConfig) -> dict[str, StudentConfig]:
    """CD and CT (Song et al. 2023), iCT (Song & Dhariwal 2023), ECT (Geng et al. 2024), sCM (Lu & Song 2025)."""
    pair = ConsistencyConfig(weighting="none", distance="lpips", resize=224, flip=True)
    cd = replace(pair, teacher="teacher", levels="schedule")
    ct = replace(pair, levels="ct", target_decay=0.9)
    ict = ConsistencyConfig(levels="ict", neighbours="lognormal", huber_c=None, flip=True)
    scm = SCMConfig(tangent_warmup=10_000)
    smooth: dict[str, Any] = {"betas": (0.9, 0.99)}
    return {
        "cd": student(base, "cd", cd, 800_000, lr=4e-4),
        "ct": student(base, "ct", ct, 800_000, lr=4e-4, init=SCRATCH),
        "ict": student(base, "ict", ict, 400_000, lr=1e-4, decay=0.99993, batch_size=1024, dropout=0.3, init=SCRATCH),
        "ect": student(base, "ect", ConsistencyConfig(flip=True), 200_000, lr=1e-4, batch_size=128, dropout=0.2),
        "scd": student(base, "scd", scm, 500_000, lr=1e-4, optimizer=smooth),
        "sct": student(base, "sct", replace(scm, reference="data"), 350_000, lr=1e-4, optimizer=smooth, dropout=0.2),
    }


def flow_maps(base: StudentConfig) -> dict[str, StudentConfig]:
    """CTM (Kim et al. 2024), MeanFlow (Geng et al. 2025), AYF (Sabour et al. 2025; ours), IMM (Zhou et al. 2025; batch and
    iterations ours), shortcut models (Frans et al. 2025; ours)."""
    ctm = CTMConfig(distance="lpips_avg", resize=224, flip=True)
    fooled = replace(ctm, adversarial_weight=1.0, discriminator=discriminator_of(base))
    first = student(base, "ctm", ctm, 50_000, lr=4e-4, decay=0.999, batch_size=256)
    second = replace(first.phases["training"], iterations=30_000, objective=fooled)
    adam: dict[str, Any] = {"kind": "adam"}
    return {
        "ctm": replace(first, phases=first.phases | {"adversarial": second}),
        "meanflow": student(
            base, "meanflow", MeanFlowConfig(flip=True), 800_000, lr=6e-4, optimizer=adam | {"warmup": 10_000},
            batch_size=1024, dropout=0.2, init=SCRATCH,
        ),
        "ayf": student(base, "ayf", AlignYourFlowConfig(warmup=10_000, flip=True), 50_000, lr=1e-4, optimizer=adam),
        "imm": student(base, "imm", IMMConfig(), 400_000, lr=1e-4, batch_size=1024, dropout=0.2, init=SCRATCH),
        "shortcut": student(base, "shortcut", ShortcutConfig(), 200_000, lr=1e-4, optimizer=adam),
    }  # fmt: skip


def halving(base: StudentConfig) -> dict[str, StudentConfig]:
    """Progressive distillation (Salimans & Ho 2022), guided distillation (Meng et al. 2023; autoguidance, weak model,
    levels, iterations and the weight in sampling ours) and BOOT (Gu et al. 2023; ours)."""
    adam = OptimizerConfig(lr=5e-5, decay="cosine")
    pd = rounds(ProgressiveConfig(num_steps=4096, steps=2048, flip=True), (50_000,) * 10 + (100_000,) * 2, adam)
    weight: dict[str, Any] = {"guidance_max": 4.0, "guidance": 0.3}
    guided = GuidedConfig(weak="students/weak", flip=True, **weight)
    first = PhaseConfig(iterations=50_000, optimizer=OptimizerConfig(lr=1e-4), objective=guided)
    halved = ProgressiveConfig(num_steps=1024, steps=512, flip=True, **weight)
    rest = rounds(halved, (50_000,) * 8 + (100_000,) * 2, adam)
    boot = student(base, "boot", BootConfig(), 200_000, lr=1e-4)
    # Validation samples at all steps of a round, thousands in the first ones.
    settings: dict[str, Any] = {"phase_switch": "restart", "validate_every": 0}
    return {
        "pd": replace(boot, name="pd", phases=pd, **settings),
        "weak": student(  # a sixteenth of the teacher's images, as in Karras et al. 2024
            base, "weak", EDMConfig(flip=True), 25_000, lr=1e-3, decay=0.999, optimizer={"kind": "adam", "warmup": 2000},
            dropout=0.13, init=SCRATCH,
        ),
        "guided": replace(boot, name="guided", phases={"guidance": first, **rest}, **settings),
        "boot": boot,
    }  # fmt: skip
