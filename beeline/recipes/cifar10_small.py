"""Small CIFAR-10 recipe, without pretrained weights."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from beeline.config import (
    NetworkConfig,
    OptimizerConfig,
    PhaseConfig,
    Recipe,
    StudentConfig,
    TeacherConfig,
    WorkersConfig,
)
from beeline.objectives.discriminator import DiscriminatorConfig
from beeline.objectives.lmm import LinesMatchingConfig
from beeline.recipes.methods import ablations, baselines
from beeline.recipes.published import cifar10


def cifar10_small(seed: int = 0) -> Recipe:
    """CIFAR-10 at 32x32 with small networks, without pretrained weights: about 100 PFLOP in bf16 including the teacher and all
    students, an estimated 20 minutes on one H200. Reads any zip in EDM's layout: `--images.source FILE`."""
    recipe = cifar10(seed)
    one_gpu = WorkersConfig(count=1, gpus=1, threads=4)
    one_actor: dict[str, Any] = {"max_actors": 1}
    return replace(
        recipe,
        name="cifar10_small",
        images=replace(recipe.images, source="cifar10-train.zip"),
        probe=replace(recipe.probe, iterations=4000, gpus=0.5),
        teacher=TeacherConfig(
            network=NetworkConfig(
                kind="ddpmpp", img_resolution=32, img_channels=3, label_dim=10, model_channels=64, channel_mult=(1, 2, 2),
                num_blocks=2, attn_resolutions=(16,),
            ),
            iterations=15_000, batch_size=256, optimizer=OptimizerConfig(lr=1e-3, warmup=500, decay="cosine"),
            ema_half_life=1000, flip=True, precision="bf16", seed=seed, checkpoint_every=2000, workers=one_gpu,
        ),
        pairs=replace(recipe.pairs, count=50_000, shard_size=4096, batch_size=512, **one_actor),
        students=_students(recipe.main, one_gpu),
        sweep=replace(recipe.sweep, trials=4, learning_rates=(1e-4, 5e-4), adversarial_weights=(0.0, 0.3), iterations=500),
        evaluate=replace(recipe.evaluate, features=("probe",), count=10_000, **one_actor),
    )  # fmt: skip


def _students(published: StudentConfig, workers: WorkersConfig) -> dict[str, StudentConfig]:
    """The students of digits, longer, on `workers`."""
    lines = LinesMatchingConfig(distance="probe", pixel_weight=0.1)
    optimizer = OptimizerConfig(lr=5e-4, warmup=200, decay="cosine")
    reconstruction = PhaseConfig(iterations=3000, optimizer=optimizer, objective=lines)
    critic = DiscriminatorConfig(optimizer=OptimizerConfig(lr=1e-3, betas=(0.5, 0.9)), networks=("probe",), mirror=True)
    sot = PhaseConfig(
        iterations=1500,
        optimizer=replace(optimizer, lr=2e-4),
        objective=replace(lines, steps=(0,), discriminator=critic),
    )
    adversarial = replace(sot, objective=replace(sot.objective, adversarial_weight=0.3))
    lmm = replace(
        published, phases={"reconstruction": reconstruction, "adversarial": adversarial}, batch_size=256, ema_half_lives=(200,),
        phase_switch="restart", compiled=False, checkpoint_every=500, validate_every=500, workers=workers,
    )  # fmt: skip
    return {"lmm": lmm, **ablations(lmm, reconstruction, sot), **baselines(lmm, reconstruction)}
