"""Students of score distillation on CIFAR-10, and one that descends the Fréchet distance.

Optimisers are Adam's: the weight decay of 0.01 in DMD and DMD2 is left out. Settings whose source is not at hand are ours: the
weight of regression, batch, warm-up, clipping and iterations of DMD, clipping of DMD2 and f-distill, batch and iterations of
DI, c and iterations of SIM, iterations of SiDA.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from beeline.config import OptimizerConfig, StudentConfig
from beeline.objectives.fd_loss import FrechetLossConfig
from beeline.objectives.scores.dmd import DMD2Config, DMDConfig
from beeline.objectives.scores.sid import SiDAConfig, SiDConfig, SIMConfig
from beeline.recipes.cifar10_methods.student import student

TOP = 80.0  # level of the student's input in DMD and DMD2
STEADY: dict[str, Any] = {"kind": "adam", "betas": (0.0, 0.999), "clip": 0.0}
FAKE = OptimizerConfig(lr=1e-5, **STEADY)
SID: dict[str, Any] = {  # training of SiD; its average has a half-life of 500,000 images
    "lr": 1e-5, "optimizer": STEADY, "decay": 0.5 ** (256 / 500_000), "ema_ramp": 0.05, "batch_size": 256, "dropout": 0.13,
}  # fmt: skip


def scores(base: StudentConfig) -> dict[str, StudentConfig]:
    """Methods without real images: DMD (Yin et al. 2024), Diff-Instruct (Luo et al. 2023), SiD (Zhou et al. 2024) and SIM (Luo
    et al. 2024)."""
    warm: dict[str, Any] = {"kind": "adam", "warmup": 500, "clip": 10.0}
    dmd = DMDConfig(
        start_levels=(TOP,), span=(0.02, 0.98), fake_levels="karras", fake_optimizer=OptimizerConfig(**warm, lr=5e-5),
        regression_weight=0.25, distance="lpips", resize=224,
    )  # fmt: skip
    di = DMDConfig(start_levels=(1.0,), levels="lognormal", scaled=False, fake_optimizer=FAKE)
    return {
        "dmd": student(base, "dmd", dmd, 300_000, lr=5e-5, optimizer=warm, batch_size=392),
        "di": student(base, "di", di, 200_000, **SID),
        "sid": student(base, "sid", SiDConfig(fake_optimizer=FAKE), 3_125_000, **SID),
        "sim": student(base, "sim", SIMConfig(fake_optimizer=FAKE), 1_000_000, **SID),
    }


def adversarial_scores(base: StudentConfig) -> dict[str, StudentConfig]:
    """Methods with real images: DMD2 (Yin et al. 2024) and f-distill (Xu et al. 2025) as in FastGen's configs, with DMD2's own
    discriminator and its weights; SiDA (Zhou et al. 2025) from the student of SiD."""
    quick: dict[str, Any] = {"kind": "adam", "clip": 10.0}
    dmd2 = DMD2Config(
        start_levels=(TOP,), span=(0.002, 0.998), fake_steps=5, fake_optimizer=OptimizerConfig(**quick, lr=1e-4), flip=True
    )  # fmt: skip
    sida = SiDAConfig(fake_optimizer=FAKE, flip=True)
    large: dict[str, Any] = {"optimizer": quick, "batch_size": 2048}
    return {
        "dmd2": student(base, "dmd2", dmd2, 100_000, lr=1e-4, **large),
        "fdistill": student(base, "fdistill", replace(dmd2, divergence="kl"), 100_000, lr=1e-4, **large),
        "sida": student(base, "sida", sida, 1_000_000, init="students/sid", **SID),
    }


def fine_tuning(base: StudentConfig) -> dict[str, StudentConfig]:
    """FD-loss (arXiv 2604.28190) from the main student; its paper trains on ImageNet, so all but rates and sizes are ours.

    The loss sees networks that no measurement of this recipe uses: Inception, DINOv2 and the measuring probe judge it.
    """
    networks = ("vgg16", "tf_efficientnet_lite0", "deit_base_distilled_patch16_224")
    loss = FrechetLossConfig(networks=networks, resize=224, queue=50_000)
    adam: dict[str, Any] = {"kind": "adam"}
    return {"fd": student(base, "fd", loss, 62_500, lr=1e-6, optimizer=adam, batch_size=1024, init="students/lmm")}
