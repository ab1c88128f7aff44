"""Demo recipe: 8x8 digits, minutes on a CPU."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from beeline.config import (
    EvaluateConfig,
    ImagesConfig,
    NetworkConfig,
    OptimizerConfig,
    PairsConfig,
    PhaseConfig,
    ProbeConfig,
    ProbeNetworkConfig,
    Recipe,
    StudentConfig,
    SweepConfig,
    TeacherConfig,
    WorkersConfig,
)
from beeline.objectives.discriminator import DiscriminatorConfig
from beeline.objectives.fd_loss import FrechetLossConfig
from beeline.objectives.lmm import LinesMatchingConfig
from beeline.recipes.methods import ablations


def digits(seed: int = 0) -> Recipe:
    """scikit-learn's 1,797 handwritten digits, 8x8, ten classes: the whole method in minutes on two CPU cores."""
    pair_of_cores = WorkersConfig(count=2, threads=1)
    both_cores: dict[str, Any] = {"min_actors": 2, "max_actors": 2}
    return Recipe(
        name="digits",
        images=ImagesConfig(source="digits", resolution=8, channels=1, shard_size=600),
        probe=ProbeConfig(
            losses=ProbeNetworkConfig(widths=(32, 64, 64, 64), strides=(1, 1, 2, 1), activation="relu", seed=2 * seed + 1),
            measure=ProbeNetworkConfig(
                widths=(24, 48, 96, 64), strides=(1, 2, 1, 1), kernel=3, activation="gelu", norm=False, seed=2 * seed + 2
            ),
            iterations=500,
        ),
        teacher=TeacherConfig(
            network=NetworkConfig(
                kind="ddpmpp", img_resolution=8, img_channels=1, label_dim=10, model_channels=32, channel_mult=(1, 2),
                num_blocks=1, attn_resolutions=(),
            ),
            iterations=700, batch_size=128, optimizer=OptimizerConfig(lr=2e-3, warmup=100, decay="cosine"), ema_half_life=200,
            seed=seed, checkpoint_every=500, workers=pair_of_cores,
        ),
        pairs=PairsConfig(count=2500, shard_size=500, batch_size=250, seed=seed, **both_cores),
        students=_students(seed, pair_of_cores),
        few_steps=("0", "0,8", "0,6,12"),
        sweep=SweepConfig(trials=4, schedules=("0", "0,8"), ema_half_lives=(50.0,), iterations=40, max_concurrent=2),
        evaluate=EvaluateConfig(
            features=("probe", "probe_losses"), shard_size=599, batch_size=300, seed=1000 + seed, **both_cores
        ),
    )  # fmt: skip


def _students(seed: int, workers: WorkersConfig) -> dict[str, StudentConfig]:
    """The main student on `workers`; the others on one core each, so that they train side by side."""
    lines = LinesMatchingConfig(distance="probe", pixel_weight=0.1)
    optimizer = OptimizerConfig(lr=1e-3, warmup=50, decay="cosine")
    reconstruction = PhaseConfig(iterations=300, optimizer=optimizer, objective=lines)
    critic = DiscriminatorConfig(optimizer=OptimizerConfig(lr=2e-3, betas=(0.5, 0.9)), augment=("translation",))
    sot = PhaseConfig(
        iterations=200,
        optimizer=replace(optimizer, lr=5e-4, warmup=20),
        objective=replace(lines, steps=(0,), discriminator=critic),
    )
    adversarial = replace(sot, objective=replace(sot.objective, adversarial_weight=0.3))
    frechet = PhaseConfig(
        iterations=120, optimizer=replace(optimizer, lr=2e-5, warmup=20), objective=FrechetLossConfig(queue=2048)
    )
    lmm = StudentConfig(
        name="lmm", phases={"reconstruction": reconstruction, "adversarial": adversarial, "frechet": frechet}, batch_size=128,
        ema_half_lives=(50,), phase_switch="restart", seed=seed, checkpoint_every=200, workers=workers,
    )  # fmt: skip
    one_core = replace(lmm, workers=WorkersConfig(count=1, threads=1))
    return {"lmm": lmm, **ablations(one_core, reconstruction, sot)}
